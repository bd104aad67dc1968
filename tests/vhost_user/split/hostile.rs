//! Hostile drivers, and drivers without the feature.

use vhost::VhostBackend;
use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_wire::split::*;
use viommu_wire::virtio_iommu::{Head, feature};

const TYPES: [u8; 4] = [request_type::RESERVE, request_type::LINK, request_type::UNLINK, request_type::RELEASE];

/// Checks that the requests are unknown: nothing is written.
fn are_unknown(driver: &mut Driver) {
    for kind in TYPES {
        let bytes = Range { head: Head { kind, reserved: [0; 3] }, ..range(kind, 1, 0, 0xfff, 0) }.bytes();
        let used = driver.transact(&[Part::R(bytes), Part::W(4)]);
        assert_eq!(used, Used { len: 0, written: vec![0xa5; 4] }, "type {kind:#x}");
    }
}

#[test]
fn without_the_feature_the_types_are_unknown() {
    let device = Device::new();
    let mut driver = Driver::accepting(&device, !F_SPLIT_MAP);
    assert_ne!(driver.offered & F_SPLIT_MAP, 0);
    driver.attach(1, EP);
    are_unknown(&mut driver);
    assert_eq!(device.control.stats().unknown, 4);
    assert_eq!(driver.map(1, 0, 0xfff, 0, READ), OK);
}

#[test]
fn the_feature_is_not_offered_if_it_is_switched_off() {
    let device = Device::with(|settings| settings.split = false);
    let mut driver = Driver::new(&device);
    assert_eq!(driver.offered & F_SPLIT_MAP, 0);
    driver.attach(1, EP);
    are_unknown(&mut driver);
}

#[test]
fn the_feature_needs_map_unmap() {
    let device = Device::new();
    let mut driver = Driver::accepting(&device, !feature::MAP_UNMAP);
    driver.attach(1, EP);
    are_unknown(&mut driver);
}

#[test]
fn types_beside_the_four_are_unknown() {
    let (device, mut driver) = attached();
    for kind in [0x7f, 0x84, 0xff] {
        let used = driver.transact(&[Part::R(range(kind, 1, 0, 0xfff, 0).bytes()), Part::W(4)]);
        assert_eq!(used.len, 0);
    }
    assert_eq!(device.control.stats().unknown, 3);
}

#[test]
fn requests_that_are_too_short() {
    let (device, mut driver) = attached();
    for kind in TYPES {
        let len = if kind == request_type::LINK { 31 } else { 35 };
        for len in [4, 20, len] {
            let bytes = range(kind, 1, 0, 0xfff, 0).bytes();
            let used = driver.transact(&[Part::R(bytes[..len].to_vec()), Part::W(4)]);
            assert_eq!(used, Used { len: 0, written: vec![0xa5; 4] }, "type {kind:#x}, {len} bytes");
        }
    }
    assert_eq!(device.control.stats().malformed, 12);
    // Without room for the tail the request is not done.
    let reserve = range(request_type::RESERVE, 1, 0, 0xfff, 0).bytes();
    assert_eq!(driver.transact(&[Part::R(reserve), Part::W(3)]).len, 0);
    assert_eq!(device.iommu.stats().reservations_live, 0);
}

#[test]
fn bytes_after_a_request_are_ignored() {
    let (device, mut driver) = attached();
    let mut reserve = range(request_type::RESERVE, 1, 0, 0xff_ffff, 0).bytes();
    reserve.resize(5000, 0xff);
    assert_eq!(driver.transact(&[Part::R(reserve), Part::W(4)]).status(), OK);
    let mut link = link_bytes(1, 0, &[(0x5000, 1)], READ, 0);
    link.resize(20_000, 0xff);
    // A device-writable part that is longer than the tail: the tail comes last, and all of the part is written.
    let used = driver.transact(&[Part::R(link), Part::W(9)]);
    assert_eq!(used, Used { len: 9, written: [[0; 5].as_slice(), &[OK, 0, 0, 0]].concat() });
    assert_eq!(device.iommu.stats().linked_bytes, PAGE);
}

/// The largest possible LINK: 512 extents of 4096 granules, 8 GiB.
#[test]
fn the_largest_link() {
    let (device, mut driver) = attached();
    let (start, end) = (1 << 33, (1 << 34) - 1);
    assert_eq!(driver.reserve(start, end), OK);
    let extents = vec![(0x10_0000, 4096); 512];
    assert_eq!(driver.link(start, &extents, READ), OK);
    assert_eq!(device.iommu.stats().linked_bytes, 1 << 33);
    driver.dma(&device, EP).read(end - 7, &mut [0; 8]).unwrap();
    assert_eq!(driver.link(start, &extents, READ), INVAL);
    assert_eq!(driver.release(start, end), OK);
    assert_eq!(device.iommu.stats().linked_bytes, 0);
}

/// A queue full of the largest LINKs is work for seconds. Everything else waits for only one or two of them.
#[test]
fn large_links_do_not_delay_faults_and_the_end() {
    const COUNT: u16 = 80;
    let (device, mut driver) = attached();
    let (start, end) = (1 << 33, (1 << 34) - 1);
    assert_eq!(driver.reserve(start, end), OK);
    let fault = driver.add_event_buffers(1, 24)[0];
    let link = link_bytes(1, start, &vec![(0x10_0000, 4096); 512], READ, 0);
    let unlink = range(request_type::UNLINK, 1, start, end, 0).bytes();
    for request in [link, unlink].iter().cycle().take(COUNT.into()) {
        driver.add(REQUESTS, &[Part::R(request.clone()), Part::W(4)]);
    }
    let first = driver.queues[REQUESTS].next_used;
    driver.kick(REQUESTS);
    driver.wait_used(REQUESTS);
    driver.dma(&device, EP2).read(0x1234, &mut [0]).unwrap_err();
    assert_eq!(driver.wait_fault(fault).address.get(), 0x1234);
    let answered = driver.read_u16(driver.queues[REQUESTS].used + 2) - first;
    assert!(answered < COUNT, "the fault came after {answered} of {COUNT} requests");
    let stopped = driver.frontend.get_vring_base(REQUESTS).unwrap() as u16 - first;
    assert!(stopped < COUNT, "the queue was stopped after all requests");
    // The remaining requests are done when the queue resumes.
    driver.start_queue(REQUESTS, first + stopped);
    while driver.queues[REQUESTS].next_used != first + COUNT {
        driver.wait_used(REQUESTS);
    }
}

#[test]
fn random_requests_do_no_harm() {
    let (device, mut driver) = attached();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..5000 {
        let mut bytes: Vec<u8> = (0..random() % 80).map(|_| random() as u8).collect();
        if let Some(kind) = bytes.first_mut() {
            *kind = TYPES[round % 4];
        }
        // Half of them name the existing domain.
        if round % 8 < 4 && bytes.len() >= 8 {
            bytes[4..8].copy_from_slice(&[1, 0, 0, 0]);
        }
        driver.transact(&[Part::R(bytes), Part::W(4)]);
    }
    let stats = device.iommu.stats();
    assert_eq!((stats.reservations_live, stats.linked_bytes), (0, 0));
    assert_eq!(driver.reserve(0, 0xfff), OK);
}
