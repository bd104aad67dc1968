//! Bytes and types, no I/O.

pub mod split;
pub mod trace;
pub mod virtio_iommu;
