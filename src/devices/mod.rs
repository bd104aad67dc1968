//! The device models. They see a [`crate::pci::Function`] to implement and a [`crate::dma::Dma`] to use.
//!
//! Each is an entry in [`MODELS`], and what serves them names none.

pub mod ioat;
pub mod kit;
pub mod model;
pub mod null;
pub mod nvme;

pub use model::{Configuration, Device, Model};

/// The models.
pub const MODELS: [&Model; 3] = [&nvme::MODEL, &ioat::MODEL, &null::MODEL];
