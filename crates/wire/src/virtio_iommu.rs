//! The virtio-iommu device's wire format (virtio specification 1.3, section 5.13).
//!
//! Everything is little endian and without implicit padding. Ranges are inclusive.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::named_numbers;

/// The virtio device type of an IOMMU (section 5).
pub const DEVICE_ID: u32 = 23;

/// Feature bits of the device type (section 5.13.3).
pub mod feature {
    /// `VIRTIO_IOMMU_F_INPUT_RANGE`: `input_range` in the configuration is valid.
    pub const INPUT_RANGE: u64 = 1 << 0;
    /// `VIRTIO_IOMMU_F_DOMAIN_RANGE`: `domain_range` in the configuration is valid.
    pub const DOMAIN_RANGE: u64 = 1 << 1;
    /// `VIRTIO_IOMMU_F_MAP_UNMAP`: MAP and UNMAP requests are available.
    pub const MAP_UNMAP: u64 = 1 << 2;
    /// `VIRTIO_IOMMU_F_BYPASS`: the legacy form of [`BYPASS_CONFIG`]; not offered.
    pub const BYPASS: u64 = 1 << 3;
    /// `VIRTIO_IOMMU_F_PROBE`: the PROBE request is available.
    pub const PROBE: u64 = 1 << 4;
    /// `VIRTIO_IOMMU_F_MMIO`: the MMIO flag of MAP is available.
    pub const MMIO: u64 = 1 << 5;
    /// `VIRTIO_IOMMU_F_BYPASS_CONFIG`: the `bypass` field of the configuration is valid and writable.
    pub const BYPASS_CONFIG: u64 = 1 << 6;
}

/// The numbers of the specification's requests (section 5.13.6), as constants for code that writes and reads bytes.
pub mod request_type {
    use crate::request::RequestType;

    /// [`RequestType::Attach`]
    pub const ATTACH: u8 = RequestType::Attach as u8;
    /// [`RequestType::Detach`]
    pub const DETACH: u8 = RequestType::Detach as u8;
    /// [`RequestType::Map`]
    pub const MAP: u8 = RequestType::Map as u8;
    /// [`RequestType::Unmap`]
    pub const UNMAP: u8 = RequestType::Unmap as u8;
    /// [`RequestType::Probe`]
    pub const PROBE: u8 = RequestType::Probe as u8;
}

/// `VIRTIO_IOMMU_ATTACH_F_BYPASS`: the domain is a bypass domain.
pub const ATTACH_F_BYPASS: u32 = 1 << 0;

bitflags::bitflags! {
    /// The flags of a MAP request, which say what an endpoint may do through the mapping.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct MapFlags: u32 {
        /// `VIRTIO_IOMMU_MAP_F_READ`: the endpoint may read.
        const READ = 1 << 0;
        /// `VIRTIO_IOMMU_MAP_F_WRITE`: the endpoint may write.
        const WRITE = 1 << 1;
        /// `VIRTIO_IOMMU_MAP_F_MMIO`: the target is memory-mapped I/O, not memory.
        const MMIO = 1 << 2;
    }
}

named_numbers! {
    /// `VIRTIO_IOMMU_S_*`: the status in the tail of a request (section 5.13.6).
    pub enum Status {
        /// All good.
        Ok = 0 "OK",
        /// Virtio communication error.
        IoErr = 1 "IOERR",
        /// Unsupported request.
        Unsupp = 2 "UNSUPP",
        /// Internal device error.
        DevErr = 3 "DEVERR",
        /// Invalid parameters.
        Inval = 4 "INVAL",
        /// Out-of-range parameters.
        Range = 5 "RANGE",
        /// Entry not found.
        NoEnt = 6 "NOENT",
        /// Bad address.
        Fault = 7 "FAULT",
        /// Insufficient resources.
        NoMem = 8 "NOMEM",
    }
}

/// `struct virtio_iommu_config` (section 5.13.4): 40 bytes.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Config {
    /// Bitmap of the page sizes that the device supports; the lowest bit is the granule.
    pub page_size_mask: U64,
    /// First and last I/O virtual address that can be mapped.
    pub input_range: [U64; 2],
    /// First and last domain id.
    pub domain_range: [U32; 2],
    /// Bytes of properties in a PROBE request, without the tail.
    pub probe_size: U32,
    /// 1 if endpoints that are attached to no domain access memory untranslated, 0 if they fault.
    pub bypass: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// The offset of [`Config::bypass`], the only byte that a driver may write.
pub const CONFIG_BYPASS_OFFSET: usize = 36;

/// `struct virtio_iommu_req_head`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Head {
    /// One of [`request_type`].
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// `struct virtio_iommu_req_tail`, the last four device-writable bytes of every request.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Tail {
    /// A [`Status`].
    pub status: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// ATTACH without its tail (section 5.13.6.3).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Attach {
    /// Type ATTACH.
    pub head: Head,
    /// The domain to attach to. It is created if it does not exist.
    pub domain: U32,
    /// The endpoint to attach.
    pub endpoint: U32,
    /// [`ATTACH_F_BYPASS`] or 0.
    pub flags: U32,
    /// Zero.
    pub reserved: [u8; 4],
}

/// DETACH without its tail (section 5.13.6.4).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Detach {
    /// Type DETACH.
    pub head: Head,
    /// The domain that the endpoint is attached to.
    pub domain: U32,
    /// The endpoint to detach.
    pub endpoint: U32,
    /// Zero.
    pub reserved: [u8; 8],
}

/// MAP without its tail (section 5.13.6.5).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Map {
    /// Type MAP.
    pub head: Head,
    /// The domain to map in.
    pub domain: U32,
    /// First I/O virtual address.
    pub virt_start: U64,
    /// Last I/O virtual address.
    pub virt_end: U64,
    /// The guest-physical address to which `virt_start` leads.
    pub phys_start: U64,
    /// [`MapFlags`].
    pub flags: U32,
}

/// UNMAP without its tail (section 5.13.6.6).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Unmap {
    /// Type UNMAP.
    pub head: Head,
    /// The domain to unmap in.
    pub domain: U32,
    /// First I/O virtual address.
    pub virt_start: U64,
    /// Last I/O virtual address.
    pub virt_end: U64,
    /// Zero.
    pub reserved: [u8; 4],
}

/// PROBE's device-readable part (section 5.13.6.7).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Probe {
    /// Type PROBE.
    pub head: Head,
    /// The endpoint asked about.
    pub endpoint: U32,
    /// Zero.
    pub reserved: [u8; 64],
}

/// `VIRTIO_IOMMU_PROBE_T_RESV_MEM`, the only property type of the specification.
pub const PROBE_T_RESV_MEM: u16 = 1;

/// The kind of a reserved region (section 5.13.6.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ResvMemKind {
    /// `VIRTIO_IOMMU_RESV_MEM_T_RESERVED`: accesses fault.
    Reserved = 0,
    /// `VIRTIO_IOMMU_RESV_MEM_T_MSI`: writes are interrupts and are not translated.
    Msi = 1,
}

/// The RESV_MEM property with its head (section 5.13.6.8.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ProbeResvMem {
    /// [`PROBE_T_RESV_MEM`], in the low 12 bits.
    pub kind: U16,
    /// Bytes that follow this field.
    pub length: U16,
    /// A [`ResvMemKind`].
    pub subtype: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// First address.
    pub start: U64,
    /// Last address.
    pub end: U64,
}

named_numbers! {
    /// `VIRTIO_IOMMU_FAULT_R_*`: why an access faulted (section 5.13.6.9).
    pub enum FaultReason {
        /// The endpoint is not known.
        Unknown = 0 "UNKNOWN",
        /// The endpoint is attached to no domain, and bypass is off.
        Domain = 1 "DOMAIN",
        /// No mapping, or one that does not allow the access.
        Mapping = 2 "MAPPING",
    }
}

bitflags::bitflags! {
    /// The flags of a fault record (section 5.13.6.9).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct FaultFlags: u32 {
        /// The access was a read.
        const READ = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// `address` is valid.
        const ADDRESS = 1 << 8;
    }
}

/// `struct virtio_iommu_fault`, one per buffer of the event queue (section 5.13.6.9): 24 bytes.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FaultRecord {
    /// A [`FaultReason`].
    pub reason: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// [`FaultFlags`].
    pub flags: U32,
    /// The endpoint whose access faulted.
    pub endpoint: U32,
    /// Zero.
    pub reserved2: U32,
    /// The I/O virtual address.
    pub address: U64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_specifications() {
        assert_eq!(size_of::<Config>(), 40);
        assert_eq!(std::mem::offset_of!(Config, bypass), CONFIG_BYPASS_OFFSET);
        assert_eq!(size_of::<Attach>(), 20);
        assert_eq!(size_of::<Detach>(), 20);
        assert_eq!(size_of::<Map>(), 36);
        assert_eq!(size_of::<Unmap>(), 28);
        assert_eq!(size_of::<Probe>(), 72);
        assert_eq!(size_of::<ProbeResvMem>(), 24);
        assert_eq!(size_of::<FaultRecord>(), 24);
        assert_eq!(size_of::<Tail>(), 4);
    }
}
