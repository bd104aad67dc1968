//! The kit that all models use: declared registers, rings in guest memory, tasks, and a life cycle.
//!
//! A model has two parts. Its state machine takes register accesses and gives work, and does no DMA. Its executor is a
//! [`Task`], with a thread and a [`Dma`](crate::dma::Dma) of its own. A task that is quiesced returns its state, and
//! can be started with it again. So a model whose state is all in its state machine and its tasks can be paused, saved
//! and loaded. [`Engine`] is a complete model, made of a [`StateMachine`] and one thread.

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
