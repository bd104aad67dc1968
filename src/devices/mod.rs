//! The device models. Each implements [`crate::pci::Function`] and reaches guest memory through [`crate::dma::Dma`].
//!
//! Each is an entry in [`MODELS`]. The code that serves them names none.

pub mod ioat;
pub mod kit;
pub mod model;
pub mod null;
pub mod nvme;

pub use model::{Configuration, Device, Model};

/// All models.
pub const MODELS: [&Model; 3] = [&nvme::MODEL, &ioat::MODEL, &null::MODEL];
