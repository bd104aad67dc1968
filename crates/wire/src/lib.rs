//! Bytes and types, no I/O.

mod numbers;
pub mod request;
pub mod split;
pub mod trace;
pub mod virtio_iommu;
