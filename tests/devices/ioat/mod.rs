//! The DMA engine over a real vfio-user socket, with the vfio_user crate's client in QEMU's place, and a real IOMMU.

mod setup;

mod copies;
mod errors;
mod hostile;
mod interrupts;
mod teardown;
mod traced;
