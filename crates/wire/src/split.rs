//! The wire format of the split alloc/map protocol, an extension of virtio-iommu: `docs/split-protocol.md`.
//!
//! Everything is little endian and without implicit padding. Ranges are inclusive. The tail is that of virtio-iommu.

use std::fmt;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::virtio_iommu::Head;

/// `VIRTIO_IOMMU_F_SPLIT_MAP`: RESERVE, LINK, UNLINK and RELEASE are available. Needs `VIRTIO_IOMMU_F_MAP_UNMAP`.
pub const F_SPLIT_MAP: u64 = 1 << 23;

/// The numbers of the split protocol's requests, which add to those of [`super::virtio_iommu::request_type`].
pub mod request_type {
    use crate::request::RequestType;

    /// [`RequestType::Reserve`]
    pub const RESERVE: u8 = RequestType::Reserve as u8;
    /// [`RequestType::Link`]
    pub const LINK: u8 = RequestType::Link as u8;
    /// [`RequestType::Unlink`]
    pub const UNLINK: u8 = RequestType::Unlink as u8;
    /// [`RequestType::Release`]
    pub const RELEASE: u8 = RequestType::Release as u8;
}

/// Bits 63 to 56 of a tag: what the driver works for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow(pub u8);

impl Flow {
    /// The first of the tag's bits that name the flow.
    const SHIFT: u32 = 56;

    /// NVMe, whose tags are made of queue and command.
    pub const NVME: Flow = Flow(1);

    /// That of a tag.
    pub fn of(tag: u64) -> Flow {
        Flow((tag >> Self::SHIFT) as u8)
    }

    /// The tag of one of its operations; `number` has the other bits.
    pub fn tag(self, number: u64) -> u64 {
        u64::from(self.0) << Self::SHIFT | number & ((1 << Self::SHIFT) - 1)
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["unspecified", "nvme", "rdma", "vfio", "gpu", "network"];
        match names.get(usize::from(self.0)) {
            Some(name) => f.write_str(name),
            None => write!(f, "flow-{}", self.0),
        }
    }
}

/// The most extents of a LINK.
pub const EXTENTS_MAX: usize = 512;

/// RESERVE, UNLINK and RELEASE without their tail: 36 bytes.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Range {
    /// Type RESERVE, UNLINK or RELEASE.
    pub head: Head,
    /// The domain.
    pub domain: U32,
    /// First I/O virtual address.
    pub virt_start: U64,
    /// Last I/O virtual address.
    pub virt_end: U64,
    /// The tag that the trace shows for it.
    pub tag: U64,
    /// Zero.
    pub flags: U32,
}

/// LINK without its extents and its tail: 32 bytes. `count` extents follow.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Link {
    /// Type LINK.
    pub head: Head,
    /// The domain.
    pub domain: U32,
    /// The I/O virtual address of the first granule of the first extent.
    pub virt_start: U64,
    /// The tag that the trace shows for accesses to the linked granules.
    pub tag: U64,
    /// [`super::virtio_iommu::MapFlags`].
    pub flags: U32,
    /// The number of extents that follow: 1 to [`EXTENTS_MAX`].
    pub count: U32,
}

/// A run of granules in guest-physical memory. Bits 63 to 12 are the address of the first granule, whose low 12 bits
/// are zeros. Bits 11 to 0 are the number of granules, minus one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(transparent)]
pub struct Extent(U64);

impl Extent {
    /// The most granules of an extent.
    pub const GRANULES_MAX: u64 = 1 << 12;

    /// A run of `granules` granules from `phys` on. `None` if `granules` is not 1 to [`Extent::GRANULES_MAX`], or if
    /// the low 12 bits of `phys` are not zero.
    pub fn new(phys: u64, granules: u64) -> Option<Extent> {
        let fits = phys.is_multiple_of(Self::GRANULES_MAX) && (1..=Self::GRANULES_MAX).contains(&granules);
        fits.then(|| Extent((phys | (granules - 1)).into()))
    }

    /// The guest-physical address of the first granule.
    pub fn phys(self) -> u64 {
        self.0.get() & !(Self::GRANULES_MAX - 1)
    }

    /// The number of granules: 1 to [`Extent::GRANULES_MAX`].
    pub fn granules(self) -> u64 {
        (self.0.get() & (Self::GRANULES_MAX - 1)) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_protocols() {
        assert_eq!((size_of::<Range>(), size_of::<Link>(), size_of::<Extent>()), (36, 32, 8));
    }

    #[test]
    fn an_extent_is_an_address_and_a_length() {
        let extent = Extent::new(0x1234_5000, 0x1000).unwrap();
        assert_eq!((extent.phys(), extent.granules()), (0x1234_5000, 0x1000));
        assert_eq!(extent.as_bytes(), [0xff, 0x5f, 0x34, 0x12, 0, 0, 0, 0]);
        let last = Extent::new(u64::MAX - 0xfff, 1).unwrap();
        assert_eq!((last.phys(), last.granules()), (u64::MAX - 0xfff, 1));
        for (phys, granules) in [(0x1234_5001, 1), (0x1000, 0), (0x1000, 0x1001)] {
            assert_eq!(Extent::new(phys, granules), None);
        }
    }
}
