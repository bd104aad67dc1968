//! PCI functions over vfio-user, whose messages [`crate::vfio_user`] knows.
//!
//! A [`Server`] listens on a socket; whoever connects, usually QEMU's `vfio-user-pci`, finds a function in its
//! power-on state in a [`Slot`]. A function is a model that implements [`Function`]; what all functions have in
//! common (configuration space, interrupts, the client's memory) is done here.

mod backend;
mod config;
pub mod function;
mod interrupts;
mod pin;
mod server;

pub use function::{Bar, BarMemory, Capability, CapabilityId, Function, FunctionContext, Identity};
pub use interrupts::Interrupts;
pub use pin::PinSource;
pub use server::{Server, Slot};
