//! PCI functions over vfio-user. The only place that knows vfio-user.

pub mod function;

pub use function::{Bar, Bus, Function, Identity, Interrupts};
