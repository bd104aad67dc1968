//! Bytes and types, no I/O.

pub mod trace;
pub mod virtio_iommu;
