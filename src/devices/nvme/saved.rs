//! A controller's state, to be kept.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::admin::{Admin, Queue};
use super::event::AsyncEvents;
use super::features::SavedFeatures;
use super::log::ErrorLog;
use super::queue::{Completion, CompletionQueue, SavedCompletionQueue, SubmissionQueue};
use super::registers::Registers;
use super::shared::Shared;
use super::spec::page_size;
use super::worker::IoQueue;

/// The form of [`SavedController`].
pub(super) const VERSION: u32 = 1;

/// All of a controller that a host can notice, but for what belongs to its disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedController {
    pub registers: Registers,
    pub csts: u32,
    /// CC.SHN of a shutdown that goes on or is complete.
    pub shutdown: u8,
    /// Where shadow doorbells and event indexes are.
    pub shadow: (u64, u64),
    pub events: AsyncEvents,
    pub error_log: ErrorLog,
    /// While it is enabled.
    pub admin: Option<SavedAdmin>,
}

/// The admin queue, and all that hangs on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedAdmin {
    /// It processes no commands any more.
    pub ended: bool,
    pub sq: SubmissionQueue,
    pub sq_doorbell: u32,
    /// Its completion queue first, which is there also when it has ended.
    pub cqs: Vec<SavedCompletionQueue>,
    pub queues: Vec<(SavedIoQueue, u32)>,
    pub commands: SavedCommands,
    pub done: Vec<Completion>,
}

/// What the admin commands have come to, but for the queues.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedCommands {
    pub features: SavedFeatures,
    /// How many submission and completion queues the host may create.
    pub granted: (u16, u16),
    /// Asynchronous Event Requests that wait, and for how many nanoseconds.
    pub waiting: Vec<([u64; 8], u64)>,
}

/// An I/O submission queue.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedIoQueue {
    pub sq: SubmissionQueue,
    /// Its completion queue.
    pub cq: u16,
    /// Commands that were fetched and are not done.
    pub entries: Vec<[u64; 8]>,
    /// Completions that are not posted.
    pub done: Vec<Completion>,
}

impl Admin {
    /// What it is to go on from. It is quiesced.
    pub fn save(&self) -> SavedAdmin {
        let shared = &self.shared;
        let tail = |id: u16| shared.doorbells.get(usize::from(id)).map_or(0, |doorbells| doorbells.tail.value());
        let queue = |(id, queue): (&u16, &Queue)| match queue {
            Queue::Resting(Some(resting)) => Some((resting.save(), tail(*id))),
            _ => None,
        };
        SavedAdmin {
            ended: self.ended,
            sq: self.sq.clone(),
            sq_doorbell: tail(0),
            cqs: [&self.cq].into_iter().chain(self.cqs.values()).map(|cq| cq.save(shared)).collect(),
            queues: self.queues.iter().filter_map(queue).collect(),
            commands: self.commands.save(),
            done: self.done.clone(),
        }
    }

    /// Goes on from where another one was, with this value of CC; it is to be quiesced. `Err` says what no controller is
    /// like.
    pub fn load(shared: &Arc<Shared>, saved: &SavedAdmin, cc: u32) -> Result<Self, &'static str> {
        let most = shared.disk.config().queues;
        let Some((admin_cq, cqs)) = saved.cqs.split_first() else { return Err("it has no admin completion queue") };
        let fits = |sq: &SubmissionQueue, doorbell: u32| sq.is_possible(most) && doorbell < sq.size();
        if !fits(&saved.sq, saved.sq_doorbell) || saved.sq.id() != 0 || admin_cq.id != 0 {
            return Err("its admin queue");
        }
        if !saved.cqs.iter().all(|cq| cq.is_possible(most)) {
            return Err("its completion queues");
        }
        let mut admin = Admin::with_queues(shared, page_size(cc), saved.sq.clone(), CompletionQueue::load(admin_cq));
        admin.commands.load(&saved.commands)?;
        for cq in cqs {
            if cq.id == 0 || !admin.add_cq(CompletionQueue::load(cq)) {
                return Err("two completion queues of one identifier");
            }
        }
        for (queue, doorbell) in &saved.queues {
            let id = queue.sq.id();
            let Some(cq) = admin.cqs.get(&queue.cq) else { return Err("a queue without a completion queue") };
            if id == 0 || !fits(&queue.sq, *doorbell) {
                return Err("an I/O queue");
            }
            let resting = Box::new(IoQueue::load(shared, queue, cq));
            admin.queues.insert(id, Queue::Resting(Some(resting)));
            if !admin.commands.queues.add_sq(id, queue.cq) {
                return Err("two submission queues of one identifier");
            }
        }
        admin.done.clone_from(&saved.done);
        admin.ended = saved.ended;
        if saved.ended {
            admin.close();
        } else {
            admin.restore_doorbells(saved);
        }
        Ok(admin)
    }

    fn restore_doorbells(&self, saved: &SavedAdmin) {
        let doorbells = |id: u16| self.shared.doorbells.get(usize::from(id));
        let queues = saved.queues.iter().map(|(queue, doorbell)| (&queue.sq, *doorbell));
        for (sq, doorbell) in queues.chain([(&saved.sq, saved.sq_doorbell)]) {
            if let Some(doorbells) = doorbells(sq.id()) {
                doorbells.tail.restore(sq.size(), doorbell);
            }
        }
        for cq in &saved.cqs {
            if let Some(doorbells) = doorbells(cq.id) {
                doorbells.head.restore(cq.ring.size(), cq.doorbell);
            }
        }
    }
}
