//! A model with one thread: a state machine, and an executor for the work that it gives.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::registers::{RegisterMap, RegisterWrite};
use super::{Interruption, Lifecycle, LoadError, SavedState, Task, ThreadContext, Work, trace_mmio};
use crate::pci::{Function, FunctionContext, Identity, PinSource};
use crate::sync;
use viommu_trace::Event;
use viommu_trace::event::Access;
use viommu_wire::model::Model;

/// A model's state: register accesses go in, work and interrupts come out. It does no DMA and knows no thread, so a
/// unit test can put it into any state. The default is the power-on state. Everything that a driver can observe must be
/// serialized.
pub trait StateMachine: Default + Serialize + DeserializeOwned + Send + 'static {
    /// Identifies a register.
    type Register: Copy + Send + Sync + 'static;
    /// A piece of work for the executor.
    type Job;
    /// Executes the jobs, one after the other.
    type Executor: Executor<Self>;

    /// The model's name.
    const NAME: &'static str;
    /// The version of the serialized form. It changes whenever that form does.
    const VERSION: u32;
    /// The model's number in the trace. Without one, the trace has neither the model's state nor accesses to its
    /// registers.
    const TRACED_AS: Option<Model> = None;
    /// The function's identity in configuration space.
    const IDENTITY: Identity;
    /// The registers of BAR 0.
    const REGISTERS: RegisterMap<Self::Register>;

    /// The driver reads a register. Returns its value.
    fn read(&mut self, register: Self::Register) -> u64;

    /// The driver writes a register.
    fn write(&mut self, write: &RegisterWrite<'_, Self::Register>);

    /// The next job, if there is one.
    fn take_job(&mut self) -> Option<Self::Job>;

    /// The executor panicked or has no thread: the job that was taken is over.
    fn fail(&mut self);

    /// Takes the vectors to send now, of the first 32, a bit each. Each is returned once.
    fn take_interrupts(&mut self) -> u32;

    /// The vectors with something that the driver has not acknowledged, a bit each. While there is one, the interrupt
    /// pin is asserted.
    fn reasons(&self) -> u32;

    /// The state as the trace has it, in the form that the model declares in `viommu-wire`. An event is made when it
    /// changes.
    fn traced(&self) -> u64 {
        0
    }

    /// Checks that a state that was loaded is possible at rest.
    ///
    /// # Errors
    /// The state is not possible. The error says why.
    fn check(&self) -> Result<(), &'static str> {
        Ok(())
    }
}

/// Executes a state machine's jobs, in a thread of its own.
pub trait Executor<M: StateMachine>: Default + Send + 'static {
    /// Executes a job, and tells the state machine its result. Jobs must be short, since a reset waits for the one in
    /// progress.
    fn execute(&mut self, job: M::Job, machine: &SharedMachine<M>, thread: &mut ThreadContext);
}

/// A state machine that the registers and the executor share.
pub struct SharedMachine<M> {
    context: FunctionContext,
    machine: Mutex<M>,
}

impl<M: StateMachine> SharedMachine<M> {
    /// The context of the function.
    pub fn context(&self) -> &FunctionContext {
        &self.context
    }

    /// Changes the state, traces the change, and sends the interrupts that are due after it.
    pub fn change<R>(&self, change: impl FnOnce(&mut M) -> R) -> R {
        let mut machine = self.lock();
        let before = machine.traced();
        let result = change(&mut machine);
        let state = machine.traced();
        if let Some(model) = M::TRACED_AS.filter(|_| state != before) {
            self.context.tracer.emit(Event::Device { endpoint: self.context.dma.endpoint(), model, state });
        }
        let vectors = machine.take_interrupts();
        // The pin calls `reasons`, which takes the lock.
        drop(machine);
        (0..32).filter(|vector| vectors >> vector & 1 != 0).for_each(|vector| self.context.interrupts.trigger(vector));
        if vectors == 0 {
            self.context.interrupts.level_changed();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, M> {
        // After a panic under the lock the registers may be inconsistent. A reset sets all of them.
        sync::lock(&self.machine)
    }
}

impl<M: StateMachine> PinSource for SharedMachine<M> {
    fn reasons(&self) -> u32 {
        self.lock().reasons()
    }
}

/// The thread's work.
struct Jobs<M: StateMachine> {
    machine: Arc<SharedMachine<M>>,
    executor: M::Executor,
}

impl<M: StateMachine> Work for Jobs<M> {
    fn run(&mut self, thread: &mut ThreadContext) {
        while thread.interruption().is_none() {
            let job = self.machine.lock().take_job();
            match job {
                Some(job) => self.executor.execute(job, &self.machine, thread),
                None => std::thread::park(),
            }
        }
    }

    fn panicked(&mut self) -> bool {
        self.executor = M::Executor::default();
        self.machine.change(M::fail);
        true
    }
}

/// A model made of a state machine and its executor.
pub struct Engine<M: StateMachine> {
    machine: Arc<SharedMachine<M>>,
    /// `None` while it is quiesced.
    task: Option<Task<Jobs<M>>>,
    at_rest: bool,
}

impl<M: StateMachine> Engine<M> {
    /// A model in its power-on state.
    pub fn new(context: FunctionContext) -> Self {
        let machine = Arc::new(SharedMachine { context, machine: Mutex::default() });
        let source: Arc<dyn PinSource> = machine.clone();
        machine.context.interrupts.set_pin_source(Arc::downgrade(&source));
        let mut engine = Engine { machine, task: None, at_rest: false };
        engine.start();
        engine
    }

    /// Starts the thread. Without one no job will ever be executed, so the state machine fails.
    fn start(&mut self) {
        let context = &self.machine.context;
        let name = format!("{} {:x}", M::NAME, context.dma.endpoint());
        let jobs = Jobs { machine: self.machine.clone(), executor: M::Executor::default() };
        match Task::start(context, name, jobs) {
            Ok(task) => self.task = Some(task),
            Err(error) => {
                log::error!("No thread for the {} of endpoint {:#x}: {error}", M::NAME, context.dma.endpoint());
                self.machine.change(M::fail);
            }
        }
    }

    /// Ends the thread after the job that is in progress.
    fn end(&mut self, interruption: Interruption) {
        if let Some(task) = self.task.take() {
            task.end(interruption);
        }
    }
}

impl<M: StateMachine> Function for Engine<M> {
    fn identity(&self) -> Identity {
        M::IDENTITY
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let mut machine = self.machine.lock();
        M::REGISTERS.read(offset, data, |register| machine.read(register));
        if let Some(model) = M::TRACED_AS {
            trace_mmio(&self.machine.context, model, Access::Read, bar, offset, data);
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if let Some(model) = M::TRACED_AS {
            trace_mmio(&self.machine.context, model, Access::Write, bar, offset, data);
        }
        self.machine.change(|machine| M::REGISTERS.writes(offset, data).for_each(|write| machine.write(&write)));
        self.task.iter().for_each(Task::wake);
    }

    fn reset(&mut self) {
        self.end(Interruption::Stop);
        self.machine.change(|machine| *machine = M::default());
        if !self.at_rest {
            self.start();
        }
    }
}

impl<M: StateMachine> Lifecycle for Engine<M> {
    fn quiesce(&mut self) {
        self.at_rest = true;
        self.end(Interruption::Quiesce);
    }

    fn resume(&mut self) {
        self.at_rest = false;
        if self.task.is_none() {
            self.start();
        }
    }

    fn save(&self) -> SavedState {
        SavedState::new(M::NAME, M::VERSION, &*self.machine.lock())
    }

    fn load(&mut self, state: &SavedState) -> Result<(), LoadError> {
        self.reset();
        let loaded: M = state.read(M::NAME, M::VERSION)?;
        loaded.check().map_err(|what| LoadError::Impossible { model: M::NAME, what })?;
        self.machine.change(|machine| *machine = loaded);
        Ok(())
    }
}

impl<M: StateMachine> Drop for Engine<M> {
    fn drop(&mut self) {
        self.end(Interruption::Stop);
    }
}
