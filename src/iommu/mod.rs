//! The vIOMMU itself: endpoints, domains and address spaces. It knows no socket, no queue and no thread.

pub mod address_space;
pub mod endpoint;
pub mod grace;
mod sync;

pub use endpoint::{Endpoint, Translation};
use std::sync::Arc;

use crate::trace::event::Access;
use crate::trace::{Event, Tracer};
use crate::wire::virtio_iommu::{FaultReason, ResvMemKind};

/// A region of an endpoint's I/O virtual addresses that cannot be mapped; both ends inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// What the region is.
    pub kind: ResvMemKind,
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
}

/// An endpoint that the device manages.
#[derive(Clone, Debug)]
pub struct EndpointSettings {
    /// The endpoint id; for a PCI function its bus, device and function number as the VIOT gives it.
    pub id: u32,
    /// Its reserved regions, which PROBE reports; at most one of kind MSI, none overlapping another.
    pub reserved: Vec<Reserved>,
}

/// What the resources of the device are.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes that all page tables together may take; a MAP beyond it gets `NOMEM`.
    pub table_bytes: u64,
    /// Domains that may exist at once; an ATTACH beyond it gets `NOMEM`.
    pub domains: u32,
    /// Faults that are kept while the driver has no buffer in the event queue; later ones are dropped and counted.
    pub pending_faults: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { table_bytes: 256 << 20, domains: 65_536, pending_faults: 1024 }
    }
}

/// What the device offers, fixed for its life.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Supported page sizes; the lowest bit is the granule.
    pub page_size_mask: u64,
    /// First and last address that can be mapped.
    pub input_range: (u64, u64),
    /// First and last domain id.
    pub domain_range: (u32, u32),
    /// What `bypass` in the configuration is at power-on and after a system reset.
    pub boot_bypass: bool,
    /// The endpoints.
    pub endpoints: Vec<EndpointSettings>,
    /// The limits.
    pub limits: Limits,
}

impl Default for Settings {
    /// Pages of 4 KiB, 2 MiB and 1 GiB; all 2^64 addresses; all domain ids; bypass at boot, since firmware
    /// drives devices before any IOMMU driver runs.
    fn default() -> Self {
        Settings {
            page_size_mask: (1 << 12) | (1 << 21) | (1 << 30),
            input_range: (0, u64::MAX),
            domain_range: (0, u32::MAX),
            boot_bypass: true,
            endpoints: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// An access that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The endpoint.
    pub endpoint: u32,
    /// Why.
    pub reason: FaultReason,
    /// Read or write.
    pub access: Access,
    /// The first I/O virtual address that could not be accessed.
    pub address: u64,
    /// The domain that the endpoint was attached to.
    pub domain: Option<u32>,
}

/// The device, without its transport.
pub struct Iommu {
    grace: Arc<grace::Grace>,
    tracer: Tracer,
}

impl Iommu {
    /// A device as it is at power-on.
    pub fn new(settings: Settings, tracer: Tracer) -> Arc<Iommu> {
        let _ = settings;
        Arc::new(Iommu { grace: grace::Grace::new(), tracer })
    }

    /// A translator for the accesses of the endpoint `id`. An id that the device does not manage gets one too: all its
    /// accesses fault with reason UNKNOWN.
    pub fn endpoint(&self, id: u32) -> Arc<Endpoint> {
        Arc::new(Endpoint::new(id))
    }

    /// A new reader: one for each thread that translates.
    pub fn reader(&self) -> grace::Reader {
        self.grace.reader()
    }

    /// Traces a fault and queues it for the driver's event queue.
    pub fn report(&self, fault: Fault) {
        self.tracer.emit(Event::Fault {
            endpoint: fault.endpoint,
            reason: fault.reason as u8,
            access: fault.access,
            address: fault.address,
            domain: fault.domain,
        });
    }
}
