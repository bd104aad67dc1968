//! vfio-user, PCI functions and the device models over real vfio-user sockets, with a test in QEMU's and the driver's place.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod bar_memory;
mod battery;
mod ioat;
mod null;
mod nvme;
mod pci;
mod rings;
mod vfio_user;
