//! Tasks: the threads of a model.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use crate::dma::Dma;
use crate::pci::FunctionContext;
use crate::poller::PollGuard;

/// The work of a task's thread.
pub trait Work: Send + 'static {
    /// Works until the thread is interrupted, or until there is nothing left to do for good. After a quiesce, the work
    /// continues from the state in `self` when it is started again.
    fn run(&mut self, thread: &mut ThreadContext);

    /// [`Work::run`] panicked. Returns whether to run it again.
    fn panicked(&mut self) -> bool;
}

/// Why a thread must leave [`Work::run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interruption {
    /// Leave at the next point from which the work can go on later as if nothing had happened.
    Quiesce,
    /// Leave as soon as possible, and abandon what is in progress.
    Stop,
}

/// The interruption of a task. Clones belong to the same task.
#[derive(Clone, Default)]
struct Signal(Arc<AtomicU8>);

const QUIESCE: u8 = 1;
const STOP: u8 = 2;

impl Signal {
    /// A later quiesce does not revoke a stop.
    fn set(&self, interruption: Interruption) {
        let value = match interruption {
            Interruption::Quiesce => QUIESCE,
            Interruption::Stop => STOP,
        };
        self.0.fetch_max(value, Ordering::Release);
    }
}

/// The resources of a task's thread.
pub struct ThreadContext {
    /// Its access to guest memory.
    pub dma: Dma,
    /// The IOMMU's request queue, which the thread can poll while it is awake and does nothing that may take long.
    pub poll: PollGuard,
    signal: Signal,
}

impl ThreadContext {
    /// Whether [`Work::run`] must return, and how soon.
    pub fn interruption(&self) -> Option<Interruption> {
        match self.signal.0.load(Ordering::Acquire) {
            0 => None,
            QUIESCE => Some(Interruption::Quiesce),
            _ => Some(Interruption::Stop),
        }
    }

    /// Whether what is in progress is to be abandoned.
    pub fn is_stopped(&self) -> bool {
        self.interruption() == Some(Interruption::Stop)
    }
}

/// A named thread that does some work, and returns it when it is ended. A panic of the work ends neither the thread nor
/// the process. The work decides whether it runs again.
///
/// The work may park the thread. An interruption unparks it.
pub struct Task<W> {
    name: String,
    signal: Signal,
    thread: JoinHandle<W>,
}

impl<W: Work> Task<W> {
    /// Starts a thread of this name.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(context: &FunctionContext, name: String, mut work: W) -> io::Result<Task<W>> {
        let signal = Signal::default();
        let mut thread = ThreadContext {
            dma: context.dma.open(),
            poll: PollGuard::new(context.poller.clone()),
            signal: signal.clone(),
        };
        let (tracer, endpoint) = (context.tracer.clone(), context.dma.endpoint());
        let run = move || {
            // If `panicked` itself panics, the work is not run again.
            while tracer.catch_panic(endpoint, || work.run(&mut thread)).is_none() {
                if !tracer.catch_panic(endpoint, || work.panicked()).unwrap_or(false) {
                    break;
                }
            }
            work
        };
        let thread = std::thread::Builder::new().name(name.clone()).spawn(run)?;
        Ok(Task { name, signal, thread })
    }

    /// Tells the thread to leave its work, without waiting for that.
    pub fn interrupt(&self, interruption: Interruption) {
        self.signal.set(interruption);
        self.wake();
    }

    /// Unparks the thread.
    pub fn wake(&self) {
        self.thread.thread().unpark();
    }

    /// Makes the thread leave its work, and waits for that. Afterwards the task does no DMA and sends no interrupt.
    /// Returns the work as the thread left it; `None` if the thread itself panicked.
    pub fn end(self, interruption: Interruption) -> Option<W> {
        self.interrupt(interruption);
        let work = self.thread.join();
        if work.is_err() {
            log::error!("The thread {} panicked", self.name);
        }
        work.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::iommu::{EndpointSettings, Iommu, Settings};
    use crate::pci::Slot;
    use viommu_trace::Tracer;

    fn context() -> FunctionContext {
        let endpoints = vec![EndpointSettings { id: 8, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
        Slot::new(&iommu, 8, Tracer::default()).context().clone()
    }

    /// Reports that it runs, waits for an interruption, and reports which one. Before that it panics `panics` times.
    struct Waits {
        panics: u32,
        ran: u32,
        said: Sender<Option<Interruption>>,
    }

    impl Work for Waits {
        fn run(&mut self, thread: &mut ThreadContext) {
            self.ran += 1;
            if self.panics > 0 {
                self.panics -= 1;
                panic!("the test asked for it");
            }
            self.said.send(None).unwrap();
            while thread.interruption().is_none() {
                std::thread::park();
            }
            self.said.send(thread.interruption()).unwrap();
        }

        fn panicked(&mut self) -> bool {
            self.panics > 0 || self.ran < 3
        }
    }

    fn waits(panics: u32) -> (Waits, Receiver<Option<Interruption>>) {
        let (said, heard) = channel();
        (Waits { panics, ran: 0, said }, heard)
    }

    #[test]
    fn work_that_is_quiesced_comes_back_and_goes_on() {
        let (context, (mut work, heard)) = (context(), waits(0));
        for round in 1..=3 {
            let task = Task::start(&context, "waits".into(), work).unwrap();
            assert_eq!(heard.recv().unwrap(), None);
            let interruption = if round == 3 { Interruption::Stop } else { Interruption::Quiesce };
            work = task.end(interruption).unwrap();
            assert_eq!((heard.recv().unwrap(), work.ran), (Some(interruption), round));
        }
    }

    #[test]
    fn a_stop_is_not_taken_back() {
        let (context, (work, heard)) = (context(), waits(0));
        let task = Task::start(&context, "waits".into(), work).unwrap();
        assert_eq!(heard.recv().unwrap(), None);
        task.signal.set(Interruption::Stop);
        task.end(Interruption::Quiesce).unwrap();
        assert_eq!(heard.recv().unwrap(), Some(Interruption::Stop));
    }

    #[test]
    fn work_that_panics_decides_whether_it_goes_on() {
        let (context, (work, heard)) = (context(), waits(2));
        let task = Task::start(&context, "panics".into(), work).unwrap();
        assert_eq!(heard.recv().unwrap(), None, "it ran again");
        assert_eq!(task.end(Interruption::Quiesce).unwrap().ran, 3);
        let (mut work, heard) = waits(1);
        work.ran = 5;
        let task = Task::start(&context, "panics".into(), work).unwrap();
        assert_eq!(task.end(Interruption::Stop).map(|work| work.ran), Some(6));
        assert!(heard.recv().is_err(), "it did not run again");
    }
}
