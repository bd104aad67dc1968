//! The thread of an I/O submission queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::adaptive_poll::{AdaptivePolling, SPIN};
use super::io::{Executor, Moved};
use super::queue::{Completion, CompletionQueue, Ended, SubmissionQueue};
use super::shared::Shared;
use super::spec::{Sqe, Status, nvm};
use crate::dma::Dma;
use crate::poller::PollGuard;
use viommu_trace::Event;
use viommu_trace::event::Model;

/// Entries that are fetched at once.
const BATCH: usize = 32;
/// After how many bytes completions are posted although more commands are at hand: the host can go on while the rest
/// is done.
const POST_BYTES: u64 = 64 << 10;
/// After how many commands they are.
const POST_COUNT: usize = 8;

/// A running worker.
pub(super) struct Worker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    queue: u16,
    shared: Arc<Shared>,
    /// The completion queue that it posts to.
    pub cq: u16,
}

impl Worker {
    /// Starts the thread of a submission queue.
    pub fn start(
        shared: &Arc<Shared>,
        queue: u16,
        base: u64,
        size: u32,
        cq: &Arc<CompletionQueue>,
    ) -> io::Result<Worker> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut work = Work {
            dma: shared.context.dma.open(),
            executor: Executor::new(shared.clone(), stop.clone()),
            sq: SubmissionQueue::new(queue, base, size),
            cq: cq.clone(),
            stop: stop.clone(),
            shared: shared.clone(),
            queue,
            polling: AdaptivePolling::default(),
            guard: PollGuard::new(shared.context.poller.clone()),
        };
        if let Some(doorbells) = shared.doorbells.get(usize::from(queue)) {
            doorbells.tail.open(size);
        }
        let name = format!("nvme {:x} q{queue}", shared.context.dma.endpoint());
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            let shared = work.shared.clone();
            shared.catch_panic(|| {
                // Only an end leads out.
                let Err(Ended) = work.run();
            });
        });
        let cq = cq.id();
        match spawned {
            Ok(thread) => Ok(Worker { stop, thread, queue, shared: shared.clone(), cq }),
            Err(error) => {
                if let Some(doorbells) = shared.doorbells.get(usize::from(queue)) {
                    doorbells.tail.close();
                }
                Err(error)
            }
        }
    }

    /// Asks it to end. The command that it is in is aborted if it still has much to do.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
    }

    /// Waits until it has ended. There is no DMA and no interrupt of its queue's after that.
    pub fn join(self) {
        self.stop();
        if self.thread.join().is_err() {
            log::error!("The thread of submission queue {} panicked", self.queue);
        }
        if let Some(doorbells) = self.shared.doorbells.get(usize::from(self.queue)) {
            doorbells.tail.close();
        }
    }
}

struct Work {
    shared: Arc<Shared>,
    dma: Dma,
    executor: Executor,
    sq: SubmissionQueue,
    cq: Arc<CompletionQueue>,
    stop: Arc<AtomicBool>,
    queue: u16,
    polling: AdaptivePolling,
    /// Over the request queue of the IOMMU, as long as the thread is awake and does nothing that may take long.
    guard: PollGuard,
}

impl Work {
    fn run(&mut self) -> Result<std::convert::Infallible, Ended> {
        if let Some(doorbells) = self.shared.doorbells.get(usize::from(self.queue)) {
            doorbells.tail.subscribe();
        }
        let mut entries = Vec::with_capacity(BATCH);
        loop {
            self.wait()?;
            let fetched = self.sq.fetch(&mut self.dma, BATCH, &mut entries);
            self.usable(fetched)?;
            self.execute(&entries)?;
        }
    }

    /// Waits until there are entries.
    fn wait(&mut self) -> Result<(), Ended> {
        if self.spin()? {
            return Ok(());
        }
        loop {
            let idle = self.sq.prepare_wait(&mut self.dma, &self.shared);
            if !self.usable(idle)? {
                return Ok(());
            }
            self.check_stop()?;
            let (begun, before) = (Instant::now(), self.guard.count());
            std::thread::park();
            // What the poller had to do meanwhile would have been found too.
            let finds = (self.guard.count() - before).min(1000) as u32 + 1;
            if begun.elapsed() / finds < SPIN {
                self.polling.paid();
            }
        }
    }

    /// Looks for entries, for a while if that was worth it of late. The thread polls the request queue meanwhile, and
    /// goes on with that if it finds some.
    fn spin(&mut self) -> Result<bool, Ended> {
        let found = self.find();
        if !matches!(found, Ok(true)) {
            self.guard.release();
        }
        found
    }

    fn find(&mut self) -> Result<bool, Ended> {
        let mut begun = None;
        loop {
            self.check_stop()?;
            let found = self.sq.poll(&mut self.dma, &self.shared);
            let found = self.usable(found)?;
            if found {
                if begun.is_some() {
                    self.polling.paid();
                }
                return Ok(true);
            }
            if self.guard.poll() {
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
            self.guard.acquire();
        }
    }

    fn execute(&mut self, entries: &[Sqe]) -> Result<(), Ended> {
        let fetched = Instant::now();
        let mut done: Vec<Completion> = Vec::with_capacity(entries.len());
        let mut bytes = 0;
        for sqe in entries {
            let mut moved = Moved::default();
            let status = if self.stop.load(Ordering::Acquire) {
                Status::ABORTED_SQ_DELETION
            } else {
                self.executor.execute(&mut self.dma, sqe, &mut moved, &mut self.guard)
            };
            self.trace(sqe, status, moved, fetched.elapsed());
            // Whatever became of it: a queue that never gets empty is no reason to keep others waiting.
            self.guard.poll();
            done.push(Completion { cid: sqe.cid.get(), status, result: 0 });
            bytes += u64::from(moved.len);
            if bytes >= POST_BYTES || done.len() >= POST_COUNT {
                self.post(&mut done)?;
                bytes = 0;
            }
        }
        self.post(&mut done)
    }

    fn post(&mut self, done: &mut Vec<Completion>) -> Result<(), Ended> {
        let sq = (self.queue, self.sq.head());
        self.cq.post(&mut self.dma, &self.shared, sq, done, &self.stop, &mut self.guard)?;
        done.clear();
        Ok(())
    }

    fn trace(&self, sqe: &Sqe, status: Status, moved: Moved, duration: Duration) {
        let has_lba = matches!(sqe.opcode, nvm::READ | nvm::WRITE | nvm::COMPARE | nvm::WRITE_ZEROES);
        let address = if has_lba { sqe.slba() } else { 0 };
        if status != Status::SUCCESS {
            self.shared.log_error(self.queue, sqe.cid.get(), status, sqe.nsid.get(), address);
        }
        self.shared.context.tracer.emit(Event::Command {
            endpoint: self.shared.context.dma.endpoint(),
            model: Model::Nvme,
            opcode: sqe.opcode,
            queue: self.queue,
            id: sqe.cid.get(),
            status: status.0,
            pointer: moved.pointer,
            address,
            data: sqe.data[0].get(),
            len: moved.len,
            duration: duration.as_nanos() as u64,
        });
    }

    /// A queue that cannot be accessed is fatal.
    fn usable<T, E>(&self, result: Result<T, E>) -> Result<T, Ended> {
        result.map_err(|_| {
            self.shared.fatal();
            Ended
        })
    }

    fn check_stop(&self) -> Result<(), Ended> {
        if self.stop.load(Ordering::Acquire) || self.shared.is_fatal() { Err(Ended) } else { Ok(()) }
    }
}
