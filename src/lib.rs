//! A virtual IOMMU that people can see into.
//!
//! The crate is one process that runs beside QEMU. It serves a virtio-iommu device over vhost-user and
//! device models over vfio-user; every DMA access of a model is translated by the virtio-iommu, and every
//! step is on the trace socket.
//!
//! # The house
//!
//! * [`viommu_wire`]: bytes and types, no I/O: the virtio-iommu requests, and what of an event is a model's own. A crate of its own.
//! * [`viommu_trace`]: events, the per-thread rings they go into, the socket that serves them, and what reads them back. A
//!   crate of its own.
//! * [`viommu_report`]: what reads traces and never the live device: one trace of the device's events and the guest's, on one
//!   clock. A crate of its own.
//! * [`viommu_socket`]: how all that listen make their sockets. A crate of its own.
//! * [`iommu`]: the vIOMMU itself: endpoints, domains, address spaces. It knows no socket, no queue and no thread.
//! * [`dma`]: the one way to guest memory: translate, copy, trace, fault.
//! * [`memory`]: the guest's memory: regions, the files behind them, and pages that cannot be had.
//! * [`vhost`]: the only place that knows vhost-user and virtqueues.
//! * [`vfio_user`]: the only place that knows vfio-user: messages and sessions, over any transport.
//! * [`pci`]: what makes a vfio-user device a PCI function: configuration space, BARs, interrupts, memory.
//! * [`devices`]: the device models; they see a [`pci::Function`] to implement and a [`dma::Dma`] to use.
//! * [`daemon`]: the composition root: what a topology describes, put together and served.
//! * [`cli`]: the `viommu` command, one file a subcommand.
//! * [`sandbox`]: what the process gives up once everything is open.
//! * `sync`: locks that a panic does not close.
//! * [`poller`]: a queue that one thread polls for another, which sleeps.
//! * [`topology`]: one TOML file from which endpoints, the VIOT and QEMU's arguments are made.
//!
//! Two journeys, both one way:
//!
//! * a request: virtqueue, `vhost`, `wire`, `iommu`, status, used ring, and one trace event;
//! * a DMA access: device model, `dma`, the endpoint's address space, guest memory, and a trace event for each
//!   contiguous run; or a fault, which is a trace event and an entry in the event queue.

pub mod cli;
pub mod daemon;
pub mod devices;
pub mod dma;
pub mod iommu;
pub mod memory;
pub mod pci;
pub mod poller;
pub mod sandbox;
mod sync;
pub mod topology;
pub mod vfio_user;
pub mod vhost;
