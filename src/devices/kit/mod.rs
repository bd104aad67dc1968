//! What every model uses: declared registers, rings in guest memory, tasks, and a life cycle.
//!
//! A model is a state machine that does no DMA (registers in, work out), and an executor: a [`Task`], which has a thread
//! and its [`Dma`](crate::dma::Dma). A task that is quiesced gives its state back, and is started with it again; so a
//! model that keeps its state in its state machine and its tasks can be paused, saved and loaded. [`Engine`] is a whole
//! model of a [`StateMachine`] and one thread.

mod engine;
mod lifecycle;
mod mmio;
pub mod registers;
pub mod ring;
mod task;

pub use engine::{Engine, Executor, SharedMachine, StateMachine};
pub use lifecycle::{Lifecycle, LoadError, SavedState};
pub use mmio::trace_mmio;
pub use task::{Interruption, Task, ThreadContext, Work};
