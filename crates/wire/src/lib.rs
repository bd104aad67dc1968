//! Wire formats: bytes and types, without I/O.

pub mod ioat;
pub mod model;
mod numbers;
pub mod nvme;
pub mod request;
pub mod size;
pub mod split;
pub mod virtio_iommu;

pub use numbers::Named;
