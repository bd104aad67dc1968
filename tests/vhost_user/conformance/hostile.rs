//! Hostile guests and frontends: their cost is bounded, and the device goes on.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vhost::{VhostBackend, VringConfigData};
use viommu::iommu::Limits;
use viommu_testkit::frontend::*;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_wire::virtio_iommu::request_type;

/// Makes a chain of the given descriptors, numbered from 0, available, and waits until it is returned with nothing
/// written. Then does a normal request.
fn is_given_back(descriptors: &[Descriptor], prepare: impl FnOnce(&mut Driver)) {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    prepare(&mut driver);
    for (number, &descriptor) in descriptors.iter().enumerate() {
        driver.set_descriptor(REQUESTS, number as u16, descriptor);
    }
    driver.make_available(REQUESTS, 0);
    driver.kick(REQUESTS);
    assert_eq!(driver.wait_used(REQUESTS), (0, 0));
    assert_eq!(device.control.stats().malformed, 1);
    assert_eq!(driver.attach(1, EP), OK);
}

fn readable(address: u64, len: u32, next: u16) -> Descriptor {
    Descriptor { address, len, flags: NEXT, next }
}

fn writable(address: u64, len: u32) -> Descriptor {
    Descriptor { address, len, flags: DEVICE_WRITES, next: 0 }
}

/// The address of an ATTACH request.
const REQUEST: u64 = 0x8_0000;
const ANSWER: u64 = 0x8_1000;

fn with_request(driver: &mut Driver) {
    driver.write(REQUEST, &attach(1, EP, 0).bytes());
}

#[test]
fn descriptors_in_a_loop() {
    is_given_back(&[readable(REQUEST, 20, 0)], with_request);
    is_given_back(&[readable(REQUEST, 10, 1), readable(REQUEST + 10, 10, 0)], with_request);
    let endless = Descriptor { flags: NEXT | DEVICE_WRITES, ..writable(ANSWER, 4) };
    is_given_back(&[readable(REQUEST, 20, 1), Descriptor { next: 1, ..endless }], with_request);
    is_given_back(&[readable(0, 0, 0)], with_request);
}

#[test]
fn a_next_outside_of_the_table() {
    is_given_back(&[readable(REQUEST, 20, SIZE)], with_request);
    is_given_back(&[readable(REQUEST, 20, u16::MAX)], with_request);
}

#[test]
fn an_indirect_chain_longer_than_the_queue() {
    let table: Vec<u8> = (0..1000u16).flat_map(|number| descriptor_bytes(readable(REQUEST, 0, number + 1))).collect();
    let entry = Descriptor { address: 0x9_0000, len: 16_000, flags: INDIRECT_TABLE, next: 0 };
    is_given_back(&[entry], |driver| {
        driver.write(0x9_0000, &table);
        driver.write(0x9_0000 + 999 * 16, &descriptor_bytes(writable(ANSWER, 4)));
    });
}

#[test]
fn indirect_tables_of_impossible_sizes_and_places() {
    for len in [0, 1, 15, 17, 16 * 65536, u32::MAX, u32::MAX - 15] {
        let entry = Descriptor { address: 0x9_0000, len, flags: INDIRECT_TABLE, next: 0 };
        is_given_back(&[entry], |driver| driver.write(0x9_0000, &descriptor_bytes(readable(REQUEST, 20, 1))));
    }
    for address in [RAM, RAM - 8, u64::MAX, u64::MAX - 15, 0xffff_8000_0000_0000] {
        is_given_back(&[Descriptor { address, len: 32, flags: INDIRECT_TABLE, next: 0 }], |_| {});
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table() {
    let entry = Descriptor { address: 0x9_0000, len: 32, flags: INDIRECT_TABLE, next: 0 };
    is_given_back(&[entry], |driver| driver.write(0x9_0000, &descriptor_bytes(entry)));
    is_given_back(&[entry], |driver| {
        with_request(driver);
        driver.write(0x9_0000, &descriptor_bytes(readable(REQUEST, 20, 1)));
        driver.write(0x9_0010, &descriptor_bytes(entry));
    });
}

#[test]
fn addresses_outside_of_memory() {
    for address in [RAM, RAM - 10, u64::MAX, u64::MAX - 3, 1 << 63] {
        is_given_back(&[readable(address, 20, 1), writable(ANSWER, 4)], |_| {});
        is_given_back(
            &[readable(REQUEST, 20, 1), writable(if address == RAM - 10 { RAM - 2 } else { address }, 4)],
            with_request,
        );
    }
}

#[test]
fn a_request_whose_answer_has_no_place_is_not_done() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    with_request(&mut driver);
    driver.set_descriptor(REQUESTS, 0, readable(REQUEST, 20, 1));
    driver.set_descriptor(REQUESTS, 1, writable(RAM, 4));
    driver.make_available(REQUESTS, 0);
    driver.kick(REQUESTS);
    assert_eq!(driver.wait_used(REQUESTS), (0, 0));
    assert_eq!(driver.detach(1, EP), INVAL, "it was not attached");
}

#[test]
fn device_writable_before_device_readable() {
    let first = Descriptor { flags: NEXT | DEVICE_WRITES, next: 1, ..writable(ANSWER, 4) };
    is_given_back(&[first, Descriptor { flags: 0, ..readable(REQUEST, 20, 0) }], with_request);
    let second = Descriptor { flags: NEXT | DEVICE_WRITES, next: 2, ..writable(ANSWER, 4) };
    let third = Descriptor { flags: 0, ..readable(REQUEST, 20, 0) };
    is_given_back(&[readable(REQUEST, 10, 1), second, third], with_request);
}

#[test]
fn chains_of_absurd_lengths() {
    is_given_back(&[readable(REQUEST, 65_600, 1), writable(ANSWER, 4)], with_request);
    is_given_back(&[readable(REQUEST, 20, 1), writable(ANSWER, 65_600)], with_request);
    is_given_back(&[readable(REQUEST, u32::MAX, 1), writable(ANSWER, u32::MAX)], with_request);
}

#[test]
fn empty_descriptors() {
    is_given_back(&[Descriptor { flags: 0, ..readable(0, 0, 0) }], |_| {});
    is_given_back(&[writable(0, 0)], |_| {});
    // Descriptors that add up to a request are a request: see row 8. An empty one may have any address.
    let device = Device::new();
    let mut driver = Driver::new(&device);
    with_request(&mut driver);
    driver.set_descriptor(REQUESTS, 0, readable(u64::MAX, 0, 1));
    driver.set_descriptor(REQUESTS, 1, readable(REQUEST, 20, 2));
    driver.set_descriptor(REQUESTS, 2, writable(ANSWER, 4));
    driver.make_available(REQUESTS, 0);
    driver.kick(REQUESTS);
    assert_eq!(driver.wait_used(REQUESTS), (0, 4));
}

#[test]
fn a_head_outside_of_the_table() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    for head in [SIZE, 0x8000, u16::MAX] {
        driver.make_available(REQUESTS, head);
        driver.kick(REQUESTS);
    }
    driver.wait_until_idle(EVENTS);
    assert!(driver.used_is_empty(REQUESTS), "there is no entry to give back");
    assert_eq!(device.control.stats().malformed, 3);
    assert_eq!(driver.attach(1, EP), OK, "the others are served");
}

#[test]
fn an_available_index_that_jumps() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    let index = driver.queues[REQUESTS].available + 2;
    driver.write_u16(index, driver.queues[REQUESTS].next_available.wrapping_add(SIZE + 1));
    for _ in 0..100 {
        driver.kick(REQUESTS);
    }
    driver.wait_until_idle(EVENTS);
    assert!(driver.used_is_empty(REQUESTS));
    assert_eq!(device.control.stats().malformed, 1, "it is said once");
    // The device still serves its configuration space, and after a reset it serves requests.
    assert_eq!(driver.config().bypass, 1);
    driver.reset();
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.detach(1, EP), OK);
}

#[test]
fn a_broken_event_queue_is_ignored_too() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    driver.set_descriptor(EVENTS, 0, Descriptor { flags: NEXT | DEVICE_WRITES, next: 0, ..writable(ANSWER, 24) });
    driver.set_descriptor(EVENTS, 1, writable(RAM - 4, 24));
    driver.set_descriptor(EVENTS, 2, Descriptor { flags: 0, ..readable(ANSWER, 24, 0) });
    driver.set_descriptor(EVENTS, 3, writable(ANSWER, 24));
    for head in 0..4 {
        driver.make_available(EVENTS, head);
    }
    driver.dma(&device, EP).read(0x66, &mut [0]).unwrap_err();
    for head in 0..3 {
        assert_eq!(driver.wait_used(EVENTS), (head, 0));
    }
    assert_eq!(driver.wait_fault((ANSWER, 24)).address.get(), 0x66);
    let index = driver.queues[EVENTS].available + 2;
    driver.write_u16(index, 0x8000);
    driver.dma(&device, EP).read(0x67, &mut [0]).unwrap_err();
    driver.wait_until_idle(EVENTS);
    assert!(driver.used_is_empty(EVENTS));
    assert_eq!(driver.attach(1, EP), OK);
}

#[test]
fn rings_outside_of_memory() {
    // The start of each lies in memory, which the frontend checks; its end does not.
    for which in 0..3 {
        let device = Device::new();
        let mut driver = Driver::connect(&device.path);
        driver.negotiate(u64::MAX);
        driver.set_memory();
        let queue = &mut driver.queues[REQUESTS];
        let ring = [&mut queue.descriptors, &mut queue.available, &mut queue.used];
        *ring.into_iter().nth(which).unwrap() = RAM - 16;
        driver.start_queue(REQUESTS, 0);
        for _ in 0..10 {
            driver.kick(REQUESTS);
        }
        driver.start_queue(EVENTS, 0);
        wait_until(PATIENCE, "the complaint", || device.control.stats().malformed > 0);
        // The driver does it right after a reset.
        driver.stop_queues();
        assert_eq!(device.control.stats().malformed, 1);
        driver.start_over();
        assert_eq!(driver.attach(1, EP), OK);
    }
}

/// The vhost crate takes these for a broken frontend and ends the connection, which harms only the guest itself.
#[test]
fn rings_that_are_not_aligned() {
    for which in 0..3 {
        let device = Device::new();
        let mut driver = Driver::new(&device);
        let queue = &mut driver.queues[REQUESTS];
        let ring = [&mut queue.descriptors, &mut queue.available, &mut queue.used];
        *ring.into_iter().nth(which).unwrap() += 1;
        driver.set_up_queue(REQUESTS, 0).unwrap_err();
        assert_eq!(Driver::new(&device).attach(1, EP), OK);
    }
}

#[test]
fn a_queue_size_that_is_no_power_of_two() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.stop_queues();
    driver.set_up_queue(REQUESTS, 0).unwrap();
    driver.frontend.set_vring_num(REQUESTS, 200).unwrap();
    driver.frontend.set_vring_kick(REQUESTS, &driver.queues[REQUESTS].kick).unwrap();
    driver.add(REQUESTS, &[Part::R(attach(1, EP, 0).bytes()), Part::W(4)]);
    driver.kick(REQUESTS);
    wait_until(PATIENCE, "the complaint", || device.control.stats().malformed > 0);
    driver.wait_until_idle(REQUESTS);
    assert_eq!(device.control.stats().malformed, 1);
    assert!(driver.used_is_empty(REQUESTS));
    driver.stop_queues();
    driver.start_over();
    assert_eq!(driver.attach(1, EP), OK);
}

#[test]
fn a_frontend_that_breaks_the_protocol_loses_only_its_own_connection() {
    let device = Device::new();
    // Ring addresses where the frontend has no memory.
    let driver = Driver::new(&device);
    let nowhere = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    driver.frontend.set_vring_addr(REQUESTS, &nowhere).unwrap_err();
    drop(driver);
    // Bytes that are no message.
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[]] {
        let mut stream = UnixStream::connect(&device.path).unwrap();
        stream.write_all(garbage).unwrap();
    }
    assert_eq!(Driver::new(&device).attach(1, EP), OK);
}

#[test]
fn a_descriptor_that_is_no_event_does_not_end_the_worker() {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let device = Device::new();
    let mut driver = Driver::new(&device);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    // SAFETY: the descriptor is taken from its owner, and only ever sent to the device.
    let kick = unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(theirs.into_raw_fd()) };
    driver.stop_queues();
    driver.frontend.set_vring_kick(REQUESTS, &kick).unwrap();
    ours.write_all(b"odd").unwrap();
    drop(ours);
    driver.start_over();
    assert_eq!(driver.attach(1, EP), OK);
}

#[test]
fn a_flood_of_mappings_endpoints_and_domains_is_bounded() {
    let limits = Limits { table_bytes: 4 << 20, ..Limits::default() };
    let device = Device::with(|settings| settings.limits = limits);
    let mut driver = Driver::new(&device);
    driver.attach(0, EP);
    let mut flood = |count: u32, request: &dyn Fn(u32) -> Vec<u8>| {
        let mut statuses = [0u32; 16];
        for batch in (0..count).step_by(120) {
            let chains: Vec<_> = (batch..(batch + 120).min(count))
                .map(|number| driver.add_indirect(REQUESTS, &[Part::R(request(number)), Part::W(4)]))
                .collect();
            driver.kick(REQUESTS);
            for (_, writable) in chains {
                let (_, len) = driver.wait_used(REQUESTS);
                statuses[usize::from(driver.collect(len, &writable).status())] += 1;
            }
        }
        statuses
    };
    let begin = Instant::now();
    // Scattered, so that each mapping needs a table of its own.
    let mapped = flood(20_000, &|number| {
        let start = u64::from(number) << 30;
        map(0, start, start + 0xfff, 0, READ).bytes()
    });
    assert_eq!(mapped[usize::from(OK)] + mapped[usize::from(NOMEM)], 20_000);
    assert!(mapped[usize::from(NOMEM)] > 0);
    assert!(device.iommu.stats().table_bytes <= 4 << 20);
    let endpoints = flood(20_000, &|number| attach(number, 0x1000 + number, 0).bytes());
    assert_eq!(endpoints[usize::from(NOENT)], 20_000);
    // Each moves the only endpoint, so each domain ends when the next begins.
    let domains = flood(20_000, &|number| attach(number, EP, 0).bytes());
    assert_eq!(domains[usize::from(OK)], 20_000);
    assert_eq!(device.iommu.stats().mappings_live, 0);
    let unknown = driver.transact(&[Part::R(vec![request_type::PROBE + 1; 20]), Part::W(4)]);
    assert_eq!(unknown.len, 0);
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
}
