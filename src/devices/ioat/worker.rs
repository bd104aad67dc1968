//! The channel's thread, which does all of its DMA.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::channel::{Channel, Job, Status};
use super::descriptor::{Buffer, Descriptor};
use super::interrupt::Interrupt;
use super::registers::Errors;
use crate::dma::Dma;
use crate::pci::FunctionContext;
use viommu_trace::Event;
use viommu_trace::event::{DataPointer, Model};

/// The channel, and its thread.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    context: FunctionContext,
    state: Mutex<State>,
    /// There is a job, or one has ended, or the thread is to end.
    changed: Condvar,
}

struct State {
    channel: Channel,
    quit: bool,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Panics
    /// If the system has no thread to give.
    pub fn start(context: FunctionContext) -> Self {
        let channel = Channel::new(Interrupt::new(context.interrupts.clone()));
        let state = Mutex::new(State { channel, quit: false });
        let shared = Arc::new(Shared { context, state, changed: Condvar::new() });
        let other = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("ioat-{:x}", shared.context.dma.endpoint()))
            .spawn(move || {
                while other.context.tracer.catch_panic(other.context.dma.endpoint(), || other.run()).is_none() {
                    other.panicked();
                }
            })
            .unwrap_or_else(|error| panic!("Cannot start a DMA engine's thread: {error}"));
        Worker { shared, thread: Some(thread) }
    }

    /// Reads the channel, which can have effects, but gives the thread nothing to do.
    pub fn read<R>(&self, call: impl FnOnce(&mut Channel) -> R) -> R {
        call(&mut self.shared.lock().channel)
    }

    /// Changes the channel; a descriptor may be in progress.
    pub fn change(&self, call: impl FnOnce(&mut Channel)) {
        self.shared.traced(&mut self.shared.lock(), call);
        self.shared.changed.notify_all();
    }

    /// Resets the channel. When this returns, no descriptor is in progress.
    pub fn reset(&self) {
        self.change(Channel::reset);
        let mut state = self.shared.lock();
        while state.channel.is_busy() {
            state = self.shared.wait(state);
        }
        self.shared.traced(&mut state, |channel| channel.interrupt.reset());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves a channel whose registers may be odd, and a reset sets them all.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the channel and traces what its state is then, if it is another one.
    fn traced(&self, state: &mut State, call: impl FnOnce(&mut Channel)) {
        let before = traced_state(&state.channel);
        call(&mut state.channel);
        let after = traced_state(&state.channel);
        if after != before {
            let endpoint = self.context.dma.endpoint();
            self.context.tracer.emit(Event::Device { endpoint, model: Model::Ioat, state: after });
        }
    }

    /// Executes descriptors until the end.
    fn run(&self) {
        let mut dma = self.context.dma.open();
        let mut buffer = Buffer::new();
        while let Some(job) = self.next_job() {
            self.execute(&job, &mut dma, &mut buffer);
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.quit {
                return None;
            }
            if let Some(job) = state.channel.take_job() {
                return Some(job);
            }
            state = self.wait(state);
        }
    }

    fn execute(&self, job: &Job, dma: &mut Dma, buffer: &mut Buffer) {
        let begun = Instant::now();
        let fetched = Descriptor::fetch(dma, job.address, job.first);
        let mut outcome = fetched.and_then(|descriptor| descriptor.execute(dma, buffer).map(|()| descriptor));
        let completion = self.lock().channel.completion(job, &outcome);
        if let Some(completion) = completion
            && dma.write(completion.address, &completion.value.to_le_bytes()).is_err()
        {
            outcome = Err(outcome.err().unwrap_or_default() | Errors::COMPLETION_ADDRESS);
        }
        if let Ok(descriptor) = fetched {
            self.trace_command(job, &descriptor, outcome.err().unwrap_or_default(), begun);
        }
        self.traced(&mut self.lock(), |channel| channel.finish(job, &outcome));
        self.changed.notify_all();
    }

    fn trace_command(&self, job: &Job, descriptor: &Descriptor, errors: Errors, begun: Instant) {
        let pointer = if descriptor.moves_data() { DataPointer::Address } else { DataPointer::None };
        self.context.tracer.emit(Event::Command {
            endpoint: self.context.dma.endpoint(),
            model: Model::Ioat,
            opcode: descriptor.operation(),
            queue: 0,
            id: job.index,
            status: errors.bits() as u16,
            pointer,
            address: descriptor.source(),
            data: descriptor.destination(),
            len: descriptor.size(),
            duration: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
        });
    }

    /// The thread panicked: the channel halts, and the thread goes on.
    fn panicked(&self) {
        let endpoint = self.context.dma.endpoint();
        log::error!("The DMA engine of endpoint {endpoint:#x} panicked; its channel is halted");
        self.traced(&mut self.lock(), Channel::fail);
        self.changed.notify_all();
    }
}

/// What [`Event::Device`] says: CHANSTS's state, where a channel that is done counts as active, since it goes from one
/// to the other with each piece of work, and CHANERR.
fn traced_state(channel: &Channel) -> u64 {
    let status = match channel.status() {
        Status::Done => Status::Active,
        other => other,
    };
    u64::from(channel.errors().bits()) << 32 | status as u64
}
