//! Wire formats: bytes and types, without I/O.

mod numbers;
pub mod request;
pub mod split;
pub mod trace;
pub mod virtio_iommu;
