//! The features that the device offers, and the limits of its resources.

use viommu_wire::virtio_iommu::{ProbeResvMem, ResvMemKind};

/// Bytes of properties in a PROBE request, unless an endpoint has more regions than fit.
const PROBE_SIZE_MIN: usize = 512;

/// A region of an endpoint's I/O virtual addresses that cannot be mapped; both ends inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// The region's kind.
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

/// Limits of the device's resources.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The most bytes of all page tables and reservations together. A MAP, RESERVE or LINK beyond that gets `NOMEM`.
    pub table_bytes: u64,
    /// The most domains at once. An ATTACH beyond that gets `NOMEM`.
    pub domains: u32,
    /// The most faults that are kept while the driver has no buffer in the event queue. Later ones are dropped and
    /// counted.
    pub pending_faults: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { table_bytes: 256 << 20, domains: 65_536, pending_faults: 1024 }
    }
}

/// The device's settings, fixed for its lifetime.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Supported page sizes; the lowest bit is the granule, at least 4096.
    pub page_size_mask: u64,
    /// First and last address that can be mapped.
    pub input_range: (u64, u64),
    /// First and last domain id.
    pub domain_range: (u32, u32),
    /// Whether the split alloc/map protocol is offered.
    pub split: bool,
    /// The value of `bypass` in the configuration at power-on and after a system reset.
    pub boot_bypass: bool,
    /// The endpoints.
    pub endpoints: Vec<EndpointSettings>,
    /// The limits.
    pub limits: Limits,
}

impl Default for Settings {
    /// Pages of 4 KiB, 2 MiB and 1 GiB; all 2^64 addresses; all domain ids; the split protocol; bypass at boot, since
    /// firmware drives devices before any IOMMU driver runs.
    fn default() -> Self {
        Settings {
            page_size_mask: (1 << 12) | (1 << 21) | (1 << 30),
            input_range: (0, u64::MAX),
            domain_range: (0, u32::MAX),
            split: true,
            boot_bypass: true,
            endpoints: Vec::new(),
            limits: Limits::default(),
        }
    }
}

impl Settings {
    /// The smallest size, and the alignment, of a mapping.
    pub(super) fn granule(&self) -> u64 {
        self.page_size_mask & self.page_size_mask.wrapping_neg()
    }

    /// `probe_size` of the configuration: room for every endpoint's properties.
    pub(super) fn probe_size(&self) -> usize {
        let regions = self.endpoints.iter().map(|endpoint| endpoint.reserved.len()).max().unwrap_or(0);
        PROBE_SIZE_MIN.max(regions * size_of::<ProbeResvMem>())
    }
}
