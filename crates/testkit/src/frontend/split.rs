//! The split protocol's requests, as drivers make them.

use viommu_wire::split::*;
use viommu_wire::virtio_iommu::Head;
use zerocopy::IntoBytes;

use super::{Device, Driver, EP, IntoBytesRequest, OK, Part};

pub const PAGE: u64 = 0x1000;

/// RESERVE, UNLINK or RELEASE.
pub fn range(kind: u8, domain: u32, start: u64, end: u64, tag: u64) -> Range {
    Range {
        head: Head { kind, reserved: [0; 3] },
        domain: domain.into(),
        virt_start: start.into(),
        virt_end: end.into(),
        tag: tag.into(),
        flags: 0.into(),
    }
}

/// LINK without its extents.
pub fn link_head(domain: u32, start: u64, tag: u64, flags: u32, count: u32) -> Link {
    Link {
        head: Head { kind: request_type::LINK, reserved: [0; 3] },
        domain: domain.into(),
        virt_start: start.into(),
        tag: tag.into(),
        flags: flags.into(),
        count: count.into(),
    }
}

/// All device-readable bytes of a LINK; an extent is a target and a number of granules.
pub fn link_bytes(domain: u32, start: u64, extents: &[(u64, u64)], flags: u32, tag: u64) -> Vec<u8> {
    let mut bytes = link_head(domain, start, tag, flags, extents.len() as u32).bytes();
    for &(phys, granules) in extents {
        bytes.extend(Extent::new(phys, granules).unwrap().as_bytes());
    }
    bytes
}

/// The protocol's requests in domain 1, from chain to status.
pub trait Split {
    fn reserve(&mut self, start: u64, end: u64) -> u8;
    fn link(&mut self, start: u64, extents: &[(u64, u64)], flags: u32) -> u8;
    fn unlink(&mut self, start: u64, end: u64) -> u8;
    fn release(&mut self, start: u64, end: u64) -> u8;
}

impl Split for Driver {
    fn reserve(&mut self, start: u64, end: u64) -> u8 {
        self.request(&range(request_type::RESERVE, 1, start, end, 0))
    }

    fn link(&mut self, start: u64, extents: &[(u64, u64)], flags: u32) -> u8 {
        self.transact(&[Part::R(link_bytes(1, start, extents, flags, 0)), Part::W(4)]).status()
    }

    fn unlink(&mut self, start: u64, end: u64) -> u8 {
        self.request(&range(request_type::UNLINK, 1, start, end, 0))
    }

    fn release(&mut self, start: u64, end: u64) -> u8 {
        self.request(&range(request_type::RELEASE, 1, start, end, 0))
    }
}

/// A device, and a driver with [`EP`] attached to domain 1. Endpoints that are attached to nothing fault.
pub fn attached() -> (Device, Driver) {
    attached_to(Device::new())
}

pub fn attached_to(device: Device) -> (Device, Driver) {
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    assert_eq!(driver.attach(1, EP), OK);
    (device, driver)
}
