//! PCI functions over vfio-user. [`crate::vfio_user`] knows the messages.
//!
//! A [`FunctionServer`] listens on a socket. Each client, usually QEMU's `vfio-user-pci`, finds a function in its
//! power-on state in a [`Slot`]. A function is a device model that implements [`Function`]. This module does what all
//! functions have in common: configuration space, interrupts, and the client's memory.

mod backend;
mod config;
pub mod function;
mod interrupts;
mod pin;
mod server;

pub use function::{Bar, BarMemory, Capability, CapabilityId, Function, FunctionContext, Identity};
pub use interrupts::Interrupts;
pub use pin::PinSource;
pub use server::{FunctionServer, Slot};
