//! The requirements for the virtio-iommu device, row by row of `docs/conformance.md`, over a real vhost-user socket.

mod coverage;

mod hostile;
mod qemu_acceptance;
mod reset;
mod rows_access;
mod rows_attach;
mod rows_device;
mod rows_map;
mod starts;
mod traced;
