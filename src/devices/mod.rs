//! The device models. They see a [`crate::pci::Function`] to implement and a [`crate::dma::Dma`] to use.

pub mod ioat;
pub mod nvme;
