//! Rows 13 to 24: ATTACH and DETACH.

use viommu::iommu::Limits;
use viommu_testkit::frontend::split::{PAGE, range};
use viommu_wire::split::request_type;
use viommu_wire::virtio_iommu::*;

use viommu_testkit::frontend::*;
use zerocopy::little_endian::U32;

#[test]
fn row_13_attach_with_an_unknown_flag() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    for flags in [2, 3, 1 << 31, u32::MAX] {
        assert_eq!(driver.request(&attach(1, EP, flags)), INVAL);
    }
    assert_eq!(driver.detach(1, EP), INVAL, "nothing was attached");
}

#[test]
fn row_14_attach_with_reserved_bytes() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    for byte in 0..4 {
        let mut request = attach(1, EP, 0);
        request.reserved[byte] = 1;
        assert_eq!(driver.request(&request), INVAL);
    }
    assert_eq!(driver.detach(1, EP), INVAL, "nothing was attached");
    // The reserved bytes of the head are different: a device ignores them.
    let mut request = attach(1, EP, 0);
    request.head.reserved = [0xff; 3];
    assert_eq!(driver.request(&request), OK);
}

#[test]
fn row_15_attach_of_an_unknown_endpoint() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    for endpoint in [NOBODY, 0, u32::MAX] {
        assert_eq!(driver.attach(1, endpoint), NOENT);
    }
    assert_eq!(driver.map(1, 0, 0xfff, 0, READ), NOENT, "and it made no domain");
    // An unknown id stays unknown: its accesses fault, and a million of them cost nothing.
    driver.dma(&device, NOBODY).read(0, &mut [0]).unwrap_err();
}

#[test]
fn row_16_a_domain_lives_from_its_first_endpoint_to_its_last() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!(driver.map(7, 0, 0xfff, 0x5000, READ), NOENT);
    assert_eq!(driver.attach(7, EP), OK);
    assert_eq!(driver.attach(7, EP2), OK);
    assert_eq!(driver.map(7, 0, 0xfff, 0x5000, READ), OK);
    assert_eq!(driver.detach(7, EP), OK);
    driver.dma(&device, EP2).read(0, &mut [0]).unwrap();
    assert_eq!(driver.map(7, 0x1000, 0x1fff, 0x5000, READ), OK);
    assert_eq!(driver.detach(7, EP2), OK);
    assert_eq!(driver.map(7, 0x2000, 0x2fff, 0x5000, READ), NOENT);
    assert_eq!(device.iommu.stats().mappings_live, 0);
    // The id is free, even for a bypass domain, and the next domain is empty.
    assert_eq!(driver.attach_bypass(7, EP), OK);
    assert_eq!(driver.detach(7, EP), OK);
    assert_eq!(driver.attach(7, EP), OK);
    assert_eq!(driver.map(7, 0, 0xfff, 0x6000, READ), OK);
}

#[test]
fn row_16_domains_are_limited() {
    let device = Device::with(|settings| settings.limits = Limits { domains: 2, ..Limits::default() });
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.attach(2, EP2), OK);
    assert_eq!(driver.attach(3, BARE), NOMEM);
    assert_eq!(driver.attach(2, BARE), OK, "an existing domain costs nothing");
    assert_eq!(driver.attach(3, EP2), NOMEM, "its own domain would live on");
    assert_eq!(driver.attach(3, EP), OK, "its own domain ends");
    assert_eq!(driver.detach(3, EP), OK);
    assert_eq!(driver.attach(1, EP), OK);
    // A domain with a reservation does not end with its last endpoint.
    let range = |kind| range(kind, 1, PAGE, 2 * PAGE - 1, 0);
    assert_eq!(driver.request(&range(request_type::RESERVE)), OK);
    assert_eq!(driver.attach(3, EP), NOMEM);
    assert_eq!(driver.detach(1, EP), OK);
    assert_eq!(driver.attach(3, EP), NOMEM);
    assert_eq!(driver.request(&range(request_type::RELEASE)), OK);
    assert_eq!(driver.attach(3, EP), OK);
}

#[test]
fn row_17_attach_to_another_domain_moves_the_endpoint() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write(0x5000, b"one");
    driver.write(0x6000, b"two");
    driver.attach(1, EP);
    driver.map(1, 0, 0xfff, 0x5000, READ);
    driver.attach(2, EP2);
    driver.map(2, 0, 0xfff, 0x6000, READ);
    let mut data = [0; 3];
    let mut dma = driver.dma(&device, EP);
    dma.read(0, &mut data).unwrap();
    assert_eq!(&data, b"one");
    assert_eq!(driver.attach(2, EP), OK);
    dma.read(0, &mut data).unwrap();
    assert_eq!(&data, b"two");
    assert_eq!(driver.detach(1, EP), INVAL);
    assert_eq!(driver.map(1, 0, 0xfff, 0x5000, READ), NOENT, "its last endpoint left the old domain");
    assert_eq!(driver.detach(2, EP), OK);
}

#[test]
fn row_17_a_move_that_fails_changes_nothing() {
    let device = Device::with(|settings| settings.limits = Limits { domains: 2, ..Limits::default() });
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    driver.map(1, 0, 0xfff, 0x5000, READ);
    driver.attach_bypass(2, EP2);
    driver.attach(1, BARE);
    assert_eq!(driver.attach(2, EP), INVAL, "that is a bypass domain");
    assert_eq!(driver.attach(3, EP), NOMEM, "that would be one too many");
    assert_eq!(driver.request(&attach(2, EP, 2)), INVAL);
    driver.dma(&device, EP).read(0, &mut [0]).unwrap();
    assert_eq!(driver.detach(1, EP), OK);
}

#[test]
fn row_18_attach_to_the_same_domain_again_keeps_its_mappings() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    driver.map(1, 0, 0xfff, 0x5000, READ);
    assert_eq!(driver.attach(1, EP), OK);
    driver.dma(&device, EP).read(0, &mut [0]).unwrap();
    assert_eq!(driver.map(1, 0, 0xfff, 0x5000, READ), INVAL, "the mapping is there");
    assert_eq!(driver.attach_bypass(1, EP), INVAL, "the domain is not a bypass domain");
    // It is attached once, not twice.
    assert_eq!(driver.detach(1, EP), OK);
    assert_eq!(driver.detach(1, EP), INVAL);
}

#[test]
fn row_19_bypass_domains() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    assert_eq!(driver.attach_bypass(1, EP), OK);
    driver.write(0x5000, b"data");
    let mut data = [0; 4];
    driver.dma(&device, EP).read(0x5000, &mut data).unwrap();
    assert_eq!(&data, b"data", "an address leads to itself");
    assert_eq!(driver.attach(1, EP2), INVAL);
    assert_eq!(driver.attach_bypass(1, EP2), OK);
    assert_eq!(driver.attach(2, BARE), OK);
    assert_eq!(driver.attach_bypass(2, EP), INVAL);
    assert_eq!(driver.detach(1, EP), OK, "the failed move left it where it was");
}

#[test]
fn row_19_bypass_domains_need_bypass_config() {
    let device = Device::new();
    let mut driver = Driver::accepting(&device, !feature::BYPASS_CONFIG);
    assert_eq!(driver.attach_bypass(1, EP), INVAL);
    assert_eq!(driver.attach(1, EP), OK);
}

/// Every combination is possible here, so none is answered UNSUPP: endpoints with different reserved regions share a
/// domain, and each keeps its own.
#[test]
fn row_20_endpoints_with_different_properties_share_a_domain() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, BARE), OK);
    assert_eq!(driver.map(1, HOLE.start, HOLE.end, 0x10_0000, READ), OK);
    assert_eq!(driver.attach(1, HOLED), OK);
    driver.dma(&device, BARE).read(HOLE.start, &mut [0]).unwrap();
    driver.dma(&device, HOLED).read(HOLE.start, &mut [0]).unwrap_err();
    // From now on, an address that any of them cannot use cannot be mapped.
    assert_eq!(driver.unmap(1, HOLE.start, HOLE.end), OK);
    assert_eq!(driver.map(1, HOLE.start, HOLE.end, 0x10_0000, READ), INVAL);
}

#[test]
fn row_21_a_domain_outside_of_the_range() {
    let device = Device::with(|settings| settings.domain_range = (0, 9));
    let mut driver = Driver::new(&device);
    assert_eq!(driver.config().domain_range.map(U32::get), [0, 9]);
    assert_eq!(driver.attach(10, EP), RANGE);
    assert_eq!(driver.attach(u32::MAX, EP), RANGE);
    assert_eq!(driver.attach(9, EP), OK);
    assert_eq!(driver.attach(0, EP), OK);
    assert_eq!(driver.map(10, 0, 0xfff, 0, READ), RANGE);
    assert_eq!(driver.unmap(10, 0, 0xfff), RANGE);
}

#[test]
fn row_22_detach_of_an_unknown_endpoint() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    assert_eq!(driver.detach(1, NOBODY), NOENT);
    assert_eq!(driver.detach(9, NOBODY), NOENT);
}

#[test]
fn row_23_detach_from_a_domain_that_it_is_not_in() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    driver.attach(2, EP2);
    driver.map(1, 0, 0xfff, 0x5000, READ);
    assert_eq!(driver.detach(2, EP), INVAL, "another one's domain");
    assert_eq!(driver.detach(3, EP), INVAL, "no domain at all");
    assert_eq!(driver.detach(1, BARE), INVAL, "attached to nothing");
    driver.dma(&device, EP).read(0, &mut [0]).unwrap();
}

#[test]
fn row_24_no_access_to_old_mappings_after_detach() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    driver.attach(1, EP);
    driver.attach(1, EP2);
    driver.map(1, 0x1000, 0x1fff, 0x5000, READ | WRITE);
    let (mut dma, mut other) = (driver.dma(&device, EP), driver.dma(&device, EP2));
    dma.write(0x1000, b"data").unwrap();
    assert_eq!(driver.detach(1, EP), OK);
    dma.write(0x1000, b"late").unwrap_err();
    dma.read(0x1000, &mut [0; 4]).unwrap_err();
    assert_eq!(driver.read(0x5000, 4), b"data");
    other.read(0x1000, &mut [0; 4]).unwrap();
    // With bypass it may access memory again, but not through the mapping.
    driver.write_bypass(1);
    driver.write(0x1000, b"self");
    let mut data = [0; 4];
    dma.read(0x1000, &mut data).unwrap();
    assert_eq!(&data, b"self");
}
