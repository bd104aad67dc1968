//! An I/O submission queue, and its thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adaptive_poll::{AdaptivePolling, SPIN};
use super::io::{IoExecutor, Moved};
use super::queue::{Completion, CompletionQueue, Ended, SubmissionQueue};
use super::saved::SavedIoQueue;
use super::shared::SharedController;
use super::spec::{Sqe, Status, nvm};
use crate::devices::kit::{Interruption, ThreadContext, Work};
use viommu_trace::Event;
use viommu_wire::model::Model;
use viommu_wire::nvme::Command;

/// The most entries that are fetched at once.
const BATCH: usize = 32;
/// Completions are posted after this many bytes, even if more commands were fetched, so that the host can go on
/// meanwhile.
const POST_BYTES: u64 = 64 << 10;
/// Completions are posted after this many commands.
const POST_COUNT: usize = 8;

/// An I/O submission queue.
pub(super) struct IoQueue {
    shared: Arc<SharedController>,
    executor: IoExecutor,
    sq: SubmissionQueue,
    cq: Arc<CompletionQueue>,
    polling: AdaptivePolling,
    /// The commands that were fetched last.
    entries: Vec<Sqe>,
    /// How many of these are done.
    executed: usize,
    /// Completions that are not posted yet.
    done: Vec<Completion>,
}

impl IoQueue {
    /// A new, empty queue.
    pub fn new(shared: &Arc<SharedController>, sq: SubmissionQueue, cq: &Arc<CompletionQueue>) -> Self {
        IoQueue {
            shared: shared.clone(),
            executor: IoExecutor::new(shared.clone()),
            sq,
            cq: cq.clone(),
            polling: AdaptivePolling::default(),
            entries: Vec::with_capacity(BATCH),
            executed: 0,
            done: Vec::with_capacity(BATCH),
        }
    }

    /// The name of its thread.
    pub fn name(&self) -> String {
        format!("nvme {:x} q{}", self.shared.context.dma.endpoint(), self.sq.id())
    }

    /// The state to save.
    pub fn save(&self) -> SavedIoQueue {
        SavedIoQueue {
            sq: self.sq.clone(),
            cq: self.cq.id(),
            entries: self.entries[self.executed..].iter().map(Sqe::words).collect(),
            done: self.done.clone(),
        }
    }

    /// A queue in a saved state, with the completion queue `cq`.
    pub fn load(shared: &Arc<SharedController>, saved: &SavedIoQueue, cq: &Arc<CompletionQueue>) -> Self {
        let mut queue = IoQueue::new(shared, saved.sq.clone(), cq);
        queue.entries.extend(saved.entries.iter().copied().map(Sqe::from_words));
        queue.done.extend(saved.done.iter().copied());
        queue
    }

    fn serve(&mut self, thread: &mut ThreadContext) -> Result<std::convert::Infallible, Ended> {
        loop {
            self.execute(thread)?;
            self.wait(thread)?;
            let fetched = self.sq.fetch(&mut thread.dma, BATCH, &mut self.entries);
            self.executed = 0;
            if fetched.is_err() {
                self.entries.clear();
            }
            self.usable(fetched)?;
        }
    }

    /// Waits until there are entries.
    fn wait(&mut self, thread: &mut ThreadContext) -> Result<(), Ended> {
        if self.spin(thread)? {
            return Ok(());
        }
        loop {
            let idle = self.sq.prepare_wait(&mut thread.dma, &self.shared);
            if !self.usable(idle)? {
                return Ok(());
            }
            self.check(thread)?;
            let (begun, before) = (Instant::now(), thread.poll.count());
            std::thread::park();
            // Spinning would also have found the requests that were served meanwhile.
            let finds = (thread.poll.count() - before).min(1000) as u32 + 1;
            if begun.elapsed() / finds < SPIN {
                self.polling.paid();
            }
        }
    }

    /// Polls for entries: once, or for a while if that was worth it recently. Meanwhile the thread also polls the
    /// IOMMU's request queue, and goes on as long as it finds requests there.
    fn spin(&mut self, thread: &mut ThreadContext) -> Result<bool, Ended> {
        let found = self.find(thread);
        if !matches!(found, Ok(true)) {
            thread.poll.release();
        }
        found
    }

    fn find(&mut self, thread: &mut ThreadContext) -> Result<bool, Ended> {
        let mut begun = None;
        loop {
            self.check(thread)?;
            let found = self.sq.poll(&mut thread.dma, &self.shared);
            let found = self.usable(found)?;
            if found {
                if begun.is_some() {
                    self.polling.paid();
                }
                return Ok(true);
            }
            if thread.poll.poll() {
                self.polling.paid();
                begun = Some(Instant::now());
                continue;
            }
            match begun {
                None if !self.polling.worth_it(Instant::now()) => return Ok(false),
                None => begun = Some(Instant::now()),
                Some(begun) if begun.elapsed() > SPIN => {
                    self.polling.wasted();
                    return Ok(false);
                }
                Some(_) => {
                    let before = Instant::now();
                    std::thread::yield_now();
                    if !self.polling.yielded(before, Instant::now()) {
                        return Ok(false);
                    }
                }
            }
            thread.poll.acquire();
        }
    }

    /// Executes the commands that were fetched, and posts all completions.
    fn execute(&mut self, thread: &mut ThreadContext) -> Result<(), Ended> {
        let fetched = Instant::now();
        let mut bytes = 0;
        while let Some(&sqe) = self.entries.get(self.executed) {
            let mut moved = Moved::default();
            let status = match thread.interruption() {
                None => self.executor.execute(thread, &sqe, &mut moved),
                Some(Interruption::Stop) => Status::ABORTED_SQ_DELETION,
                Some(Interruption::Quiesce) => return Err(Ended),
            };
            self.executed += 1;
            self.trace(&sqe, status, moved, fetched.elapsed());
            // Whatever its result is: a submission queue that never becomes empty must not keep the request queue
            // waiting.
            thread.poll.poll();
            self.done.push(Completion { cid: sqe.cid.get(), status, result: 0 });
            bytes += u64::from(moved.len);
            if bytes >= POST_BYTES || self.done.len() >= POST_COUNT {
                self.post(thread)?;
                bytes = 0;
            }
        }
        self.post(thread)
    }

    fn post(&mut self, thread: &mut ThreadContext) -> Result<(), Ended> {
        let sq = (self.sq.id(), self.sq.head());
        self.cq.post(thread, &self.shared, sq, &mut self.done)
    }

    fn trace(&self, sqe: &Sqe, status: Status, moved: Moved, duration: Duration) {
        let has_lba = matches!(sqe.opcode, nvm::READ | nvm::WRITE | nvm::COMPARE | nvm::WRITE_ZEROES);
        let address = if has_lba { sqe.slba() } else { 0 };
        let queue = self.sq.id();
        if status != Status::SUCCESS {
            self.shared.log_error(queue, sqe.cid.get(), status, sqe.nsid.get(), address);
        }
        self.shared.context.tracer.emit(Event::Command {
            endpoint: self.shared.context.dma.endpoint(),
            model: Model::Nvme,
            queue: queue.into(),
            opcode: sqe.opcode,
            id: sqe.cid.get().into(),
            status: status.0.into(),
            len: moved.len,
            duration: duration.as_nanos() as u64,
            part: Command { slba: address, pointer: moved.pointer, data: sqe.data[0].get() }.into(),
        });
    }

    /// Makes the controller fatal if a queue cannot be accessed.
    fn usable<T, E>(&self, result: Result<T, E>) -> Result<T, Ended> {
        result.map_err(|_| {
            self.shared.fatal();
            Ended
        })
    }

    /// Whether to go on: `Err` if the thread must leave.
    fn check(&self, thread: &ThreadContext) -> Result<(), Ended> {
        if thread.interruption().is_some() || self.shared.is_fatal() { Err(Ended) } else { Ok(()) }
    }
}

impl Work for IoQueue {
    fn run(&mut self, thread: &mut ThreadContext) {
        let shared = self.shared.clone();
        let Some(doorbells) = shared.doorbells.get(usize::from(self.sq.id())) else { return };
        doorbells.tail.subscribe();
        // `serve` returns only to end.
        let Err(Ended) = self.serve(thread);
        thread.poll.release();
        doorbells.tail.unsubscribe();
    }

    fn panicked(&mut self) -> bool {
        self.shared.fatal();
        false
    }
}
