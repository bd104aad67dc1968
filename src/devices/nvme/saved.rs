//! A controller's state in a form to save.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::admin::{Admin, IoQueueTask};
use super::event::AsyncEvents;
use super::features::SavedFeatures;
use super::log::ErrorLog;
use super::queue::{Completion, CompletionQueue, SavedCompletionQueue, SubmissionQueue};
use super::registers::Registers;
use super::shared::SharedController;
use super::spec::{CSTS_FATAL, CSTS_READY, CSTS_SHUTDOWN, Cc};
use super::worker::IoQueue;

/// The version of [`SavedController`].
pub(super) const VERSION: u32 = 1;

/// Everything of a controller that a host can observe, except for its disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedController {
    pub registers: Registers,
    pub csts: u32,
    /// CC.SHN of a shutdown that is in progress or complete, or 0.
    pub shutdown: u8,
    /// The addresses of shadow doorbells and event indexes; 0 if there are none.
    pub shadow: (u64, u64),
    pub events: AsyncEvents,
    pub error_log: ErrorLog,
    /// The queues of an enabled controller.
    pub admin: Option<SavedAdmin>,
}

impl SavedController {
    /// Checks that this state is possible, except for its queues.
    ///
    /// # Errors
    /// The state is not possible. The error says why.
    pub fn check(&self) -> Result<(), &'static str> {
        let (is_enabled, csts) = (self.registers.is_enabled(), self.csts);
        if csts & !(CSTS_READY | CSTS_FATAL | CSTS_SHUTDOWN) != 0 || self.shutdown > 2 {
            return Err("its status register is impossible");
        }
        let fits = match &self.admin {
            // AQA, ASQ and ACQ may have been written since. The queues keep what they were created with.
            Some(_) => is_enabled && self.registers.is_supported(),
            // A controller that could not be enabled is fatal.
            None => csts & CSTS_READY == 0 && (!is_enabled || csts & CSTS_FATAL != 0),
        };
        if !fits {
            return Err("its queues do not fit its registers");
        }
        if !self.events.are_possible() || !self.error_log.is_possible() {
            return Err("its events or its error log are impossible");
        }
        Ok(())
    }
}

/// The admin queue, and the I/O queues.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedAdmin {
    /// Whether it has processed its last command.
    pub ended: bool,
    pub sq: SubmissionQueue,
    pub sq_doorbell: u32,
    /// The completion queues. The admin queue's comes first, and is there even if the admin queue has ended.
    pub cqs: Vec<SavedCompletionQueue>,
    pub queues: Vec<(SavedIoQueue, u32)>,
    pub commands: SavedCommands,
    pub done: Vec<Completion>,
}

/// The state that admin commands have set, without the queues.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedCommands {
    pub features: SavedFeatures,
    /// The numbers of submission and completion queues that the host may create.
    pub granted: (u16, u16),
    /// The Asynchronous Event Requests that wait, each with the nanoseconds that it has waited.
    pub waiting: Vec<([u64; 8], u64)>,
}

/// An I/O submission queue.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedIoQueue {
    pub sq: SubmissionQueue,
    /// The identifier of its completion queue.
    pub cq: u16,
    /// Commands that were fetched and not executed yet.
    pub entries: Vec<[u64; 8]>,
    /// Completions that are not posted yet.
    pub done: Vec<Completion>,
}

impl Admin {
    /// The state to save. The admin queue must be quiesced.
    pub fn save(&self) -> SavedAdmin {
        let shared = &self.shared;
        let tail = |id: u16| shared.doorbells.get(usize::from(id)).map_or(0, |doorbells| doorbells.tail.value());
        let queue = |(id, queue): (&u16, &IoQueueTask)| match queue {
            IoQueueTask::Resting(Some(resting)) => Some((resting.save(), tail(*id))),
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

    /// Loads a saved state for this value of CC. The admin queue is then quiesced.
    ///
    /// # Errors
    /// The state is not possible. The error says why.
    pub fn load(shared: &Arc<SharedController>, saved: &SavedAdmin, cc: Cc) -> Result<Self, &'static str> {
        let most = shared.disk.config().queues;
        let Some((admin_cq, cqs)) = saved.cqs.split_first() else { return Err("it has no admin completion queue") };
        let fits = |sq: &SubmissionQueue, doorbell: u32| sq.is_possible(most) && doorbell < sq.size();
        if !fits(&saved.sq, saved.sq_doorbell) || saved.sq.id() != 0 || admin_cq.id != 0 {
            return Err("its admin queue is impossible");
        }
        if !saved.cqs.iter().all(|cq| cq.is_possible(most)) {
            return Err("a completion queue is impossible");
        }
        let mut admin = Admin::with_queues(shared, cc.page_size(), saved.sq.clone(), CompletionQueue::load(admin_cq));
        admin.commands.load(&saved.commands)?;
        for cq in cqs {
            if cq.id == 0 || !admin.add_cq(CompletionQueue::load(cq)) {
                return Err("two completion queues have the same identifier");
            }
        }
        for (queue, doorbell) in &saved.queues {
            let id = queue.sq.id();
            let Some(cq) = admin.cqs.get(&queue.cq) else { return Err("a submission queue has no completion queue") };
            if id == 0 || !fits(&queue.sq, *doorbell) {
                return Err("a submission queue is impossible");
            }
            let resting = Box::new(IoQueue::load(shared, queue, cq));
            admin.queues.insert(id, IoQueueTask::Resting(Some(resting)));
            if !admin.commands.queues.add_sq(id, queue.cq) {
                return Err("two submission queues have the same identifier");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_states_are_refused() {
        let power_on = SavedController {
            registers: Registers::default(),
            csts: 0,
            shutdown: 0,
            shadow: (0, 0),
            events: AsyncEvents::default(),
            error_log: ErrorLog::default(),
            admin: None,
        };
        assert_eq!(power_on.check(), Ok(()));
        let changed = |change: fn(&mut SavedController)| {
            let mut state = power_on.clone();
            change(&mut state);
            state.check()
        };
        assert!(changed(|state| state.csts = CSTS_READY).is_err());
        assert!(changed(|state| state.csts = 1 << 8).is_err());
        assert!(changed(|state| state.shutdown = 3).is_err());
        assert!(changed(|state| state.registers.cc = Cc(1)).is_err(), "enabled, but without queues");
        assert_eq!(changed(|state| (state.registers.cc, state.csts) = (Cc(1), CSTS_FATAL)), Ok(()));
    }
}
