//! Rows 41 to 51: PROBE, translation, faults and notifications.

use viommu::dma::DmaError;
use viommu::iommu::Limits;
use viommu_testkit::accesses::*;
use viommu_testkit::frontend::*;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_trace::event::Access;
use viommu_wire::request::RequestType;
use viommu_wire::virtio_iommu::*;
use zerocopy::FromBytes;

/// The properties of an endpoint, as a driver parses them.
fn properties(driver: &mut Driver, endpoint: u32) -> Vec<ProbeResvMem> {
    let (bytes, status) = driver.probe(endpoint);
    assert_eq!(status, OK);
    let mut found = Vec::new();
    let mut rest = &bytes[..];
    while let Ok((property, _)) = ProbeResvMem::read_from_prefix(rest) {
        if property.kind.get() == 0 {
            break;
        }
        found.push(property);
        rest = &rest[4 + usize::from(property.length.get())..];
    }
    assert!(rest.iter().all(|&byte| byte == 0));
    found
}

#[test]
fn row_41_probe() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    for (endpoint, count) in [(EP, 1), (EP2, 1), (BARE, 0), (HOLED, 2)] {
        let found = properties(&mut driver, endpoint);
        assert_eq!(found.len(), count);
        for property in found {
            assert_eq!(property.kind.get(), PROBE_T_RESV_MEM);
            assert_eq!(property.length.get(), 20);
            assert_eq!(property.reserved, [0; 3]);
        }
    }
    assert_eq!(driver.probe(NOBODY), (vec![0; 512], NOENT));
    // Room for fewer than probe_size bytes of properties.
    for len in [4, 28, 515] {
        let used = driver.transact(&[Part::R(probe(EP).bytes()), Part::W(len)]);
        assert_eq!(used.status(), INVAL);
        assert!(used.written[..len - 4].iter().all(|&byte| byte == 0), "no property is written");
    }
}

#[test]
fn row_41_probe_size_grows_with_the_regions() {
    use viommu::iommu::Reserved;
    let many: Vec<Reserved> = (0..100)
        .map(|count| Reserved { kind: ResvMemKind::Reserved, start: count << 20, end: (count << 20) + 0xfff })
        .collect();
    let regions = many.clone();
    let device = Device::with(move |settings| settings.endpoints[0].reserved = many);
    let mut driver = Driver::new(&device);
    assert_eq!(driver.config().probe_size.get(), 2400);
    let found = properties(&mut driver, EP);
    let found: Vec<_> = found.iter().map(|property| (property.start.get(), property.end.get())).collect();
    assert_eq!(found, regions.iter().map(|region| (region.start, region.end)).collect::<Vec<_>>());
}

#[test]
fn row_42_reserved_regions() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    let found = properties(&mut driver, HOLED);
    let found: Vec<_> = found.iter().map(|found| (found.subtype, found.start.get(), found.end.get())).collect();
    assert_eq!(found, [(0, HOLE.start, HOLE.end), (1, 0xfee0_0000, 0xfeef_ffff)]);
}

#[test]
fn row_43_msi_accesses_are_not_translated_and_reserved_ones_fault() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    let mut dma = driver.dma(&device, HOLED);
    // Attached to no domain, to an empty domain, and to a bypass domain.
    for attach in [0, 1, 2] {
        match attach {
            0 => {}
            1 => assert_eq!(driver.attach(1, HOLED), OK),
            _ => assert_eq!(driver.attach_bypass(2, HOLED), OK),
        }
        // It reaches the address itself, where this machine has no memory.
        for address in [MSI.start, 0xfee0_1004, MSI.end - 3] {
            let through = DmaError::NoMemory { iova: address, gpa: address };
            assert_eq!(dma.write(address, &[0; 4]), Err(through));
        }
        for address in [HOLE.start, HOLE.end] {
            let refused = DmaError::Fault { address, access: Access::Write };
            assert_eq!(dma.write(address, &[0]), Err(refused));
        }
    }
    driver.write_bypass(1);
    assert_eq!(driver.detach(2, HOLED), OK);
    dma.read(HOLE.start - 1, &mut [0]).unwrap();
    dma.read(HOLE.start, &mut [0]).unwrap_err();
    dma.read(HOLE.end + 1, &mut [0]).unwrap();
}

#[test]
fn row_44_why_an_access_faults() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    let buffers = driver.add_event_buffers(6, 24);
    let mut buffers = buffers.into_iter();
    let mut expect = |driver: &mut Driver, reason: FaultReason, access, endpoint, address| {
        let record = driver.wait_fault(buffers.next().unwrap());
        assert_eq!(record.reason, reason as u8);
        assert_eq!(record.flags.get(), FaultFlags::ADDRESS.bits() | access);
        assert_eq!((record.endpoint.get(), record.address.get()), (endpoint, address));
    };
    driver.write_bypass(0);
    let mut dma = driver.dma(&device, EP);
    dma.read(0x1234, &mut [0]).unwrap_err();
    expect(&mut driver, FaultReason::Domain, READ, EP, 0x1234);

    driver.attach(1, EP);
    dma.write(0x1234, &[0]).unwrap_err();
    expect(&mut driver, FaultReason::Mapping, WRITE, EP, 0x1234);

    driver.map(1, 0x1000, 0x1fff, 0x5000, READ);
    driver.map(1, 0x2000, 0x2fff, 0x6000, WRITE);
    dma.write(0x1ff0, &[0]).unwrap_err();
    expect(&mut driver, FaultReason::Mapping, WRITE, EP, 0x1ff0);
    dma.read(0x2000, &mut [0]).unwrap_err();
    expect(&mut driver, FaultReason::Mapping, READ, EP, 0x2000);

    driver.dma(&device, NOBODY).read(0x40, &mut [0]).unwrap_err();
    expect(&mut driver, FaultReason::Unknown, READ, NOBODY, 0x40);
    driver.write_bypass(1);
    driver.dma(&device, NOBODY).write(0x40, &[0]).unwrap_err();
    expect(&mut driver, FaultReason::Unknown, WRITE, NOBODY, 0x40);
}

#[test]
fn row_45_the_fault_record() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    // Each buffer gets one record, in order. A longer buffer works too, and the bytes after the record stay as they
    // are.
    let buffers = driver.add_event_buffers(3, 40);
    let mut dma = driver.dma(&device, EP);
    for address in [0x1_0000_0000, 2, 3] {
        dma.write(address, &[0]).unwrap_err();
    }
    for (address, buffer) in [0x1_0000_0000, 2, 3].into_iter().zip(buffers) {
        driver.wait_fault(buffer);
        let mut expected = vec![1, 0, 0, 0, 2, 1, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0];
        expected.extend(u64::to_le_bytes(address));
        expected.extend([0xa5; 16]);
        assert_eq!(driver.read(buffer.0, 40), expected);
    }
}

#[test]
fn row_45_a_buffer_that_is_too_short_is_given_back_empty() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    let short = driver.add_event_buffers(2, 23);
    let good = driver.add_event_buffers(1, 24);
    driver.dma(&device, EP).read(0x77, &mut [0]).unwrap_err();
    for buffer in short {
        assert_eq!(driver.wait_used(EVENTS).1, 0);
        assert_eq!(driver.read(buffer.0, 23), [0xa5; 23]);
    }
    assert_eq!(driver.wait_fault(good[0]).address.get(), 0x77, "the fault is not lost with them");
}

#[test]
fn row_45_faults_wait_for_buffers_and_then_are_dropped_and_counted() {
    let device = Device::with(|settings| settings.limits = Limits { pending_faults: 3, ..Limits::default() });
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    let mut dma = driver.dma(&device, EP);
    for address in 0..5 {
        dma.read(address, &mut [0]).unwrap_err();
    }
    driver.wait_until_idle(EVENTS);
    assert!(driver.used_is_empty(EVENTS));
    let stats = device.iommu.stats();
    assert_eq!((stats.faults, stats.faults_dropped), (5, 2));
    // The oldest three are delivered when there are buffers. The driver need not kick: any activity suffices.
    let buffers = driver.add_event_buffers(4, 24);
    driver.attach(1, EP2);
    for (address, &buffer) in buffers[..3].iter().enumerate() {
        assert_eq!(driver.wait_fault(buffer).address.get(), address as u64);
    }
    dma.read(9, &mut [0]).unwrap_err();
    assert_eq!(driver.wait_fault(buffers[3]).address.get(), 9);
    // With a kick no other activity is needed.
    dma.read(10, &mut [0]).unwrap_err();
    driver.wait_until_idle(EVENTS);
    assert!(driver.used_is_empty(EVENTS));
    let buffers = driver.add_event_buffers(1, 24);
    driver.kick(EVENTS);
    assert_eq!(driver.wait_fault(buffers[0]).address.get(), 10);
}

#[test]
fn row_46_the_last_byte_of_a_mapping() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    driver.map(1, 0x1000, 0x1fff, 0xa000, READ | WRITE);
    driver.map(1, 0x2000, 0x2fff, 0xf000, READ | WRITE);
    driver.write(0xafff, b"a");
    driver.write(0xf000, b"f");
    let mut dma = driver.dma(&device, EP);
    let mut byte = [0];
    for (iova, expected) in [(0x1fff, b"a"), (0x2000, b"f")] {
        dma.read(iova, &mut byte).unwrap();
        assert_eq!(&byte, expected);
    }
    dma.write(0x1fff, b"x").unwrap();
    assert_eq!((driver.read(0xafff, 1), driver.read(0xefff, 1)), (b"x".to_vec(), vec![0]));
    // At the ends of the table's pages, of each size.
    driver.map(1, 0x20_0000, 0x3f_ffff, 0x40_0000, READ);
    driver.map(1, 0x40_0000, 0x40_0fff, 0x1_0000, READ);
    driver.write(0x5f_ffff, b"e");
    dma.read(0x3f_ffff, &mut byte).unwrap();
    assert_eq!(&byte, b"e");
    dma.read(0x2fff, &mut byte).unwrap();
    dma.read(0x3000, &mut byte).unwrap_err();
    dma.read(0xfff, &mut byte).unwrap_err();
}

#[test]
fn row_47_an_access_that_crosses_mappings() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    // Scattered in memory, and one hole.
    let pages = [0x50_0000, 0x30_0000, 0x40_0000];
    for (count, phys) in pages.into_iter().enumerate() {
        let start = 0x1000 * (count as u64 + 1);
        driver.map(1, start, start + 0xfff, phys, READ | WRITE);
    }
    let data: Vec<u8> = (0..0x2000u32).map(|count| (count % 251) as u8).collect();
    let mut dma = driver.dma(&device, EP);
    dma.write(0x1800, &data).unwrap();
    assert_eq!(driver.read(0x50_0800, 0x800), data[..0x800]);
    assert_eq!(driver.read(0x30_0000, 0x1000), data[0x800..0x1800]);
    assert_eq!(driver.read(0x40_0000, 0x800), data[0x1800..]);
    let mut back = vec![0; 0x2000];
    dma.read(0x1800, &mut back).unwrap();
    assert_eq!(back, data);
    // The fault names the first address that is not mapped, and everything before it was accessed.
    let refused = dma.write(0x3800, &[7; 0x1000]).unwrap_err();
    assert_eq!(refused, DmaError::Fault { address: 0x4000, access: Access::Write });
    assert_eq!(driver.read(0x40_0800, 0x800), [7; 0x800]);
}

#[test]
fn row_48_a_request_is_in_effect_before_its_used_entry() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    driver.attach(1, EP);
    let mut dma = driver.dma(&device, EP);
    for _ in 0..500 {
        driver.map(1, 0x1000, 0x1fff, 0x5000, READ);
        dma.read(0x1000, &mut [0]).unwrap();
        driver.unmap(1, 0x1000, 0x1fff);
        dma.read(0x1000, &mut [0]).unwrap_err();
        driver.detach(1, EP);
        dma.read(0x1000, &mut [0]).unwrap_err();
        driver.attach(1, EP);
    }
}

/// A reader in the middle of an access delays the answer; otherwise the used entry would mean nothing.
#[test]
fn row_48_a_removal_waits_for_the_accesses_that_use_it() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    driver.map(1, 0x1000, 0x1fff, 0x5000, READ);
    for removal in [unmap(1, 0x1000, 0x1fff).bytes(), attach(2, EP, 0).bytes(), detach(2, EP).bytes()] {
        waits_for_access(&mut driver, &device, 0x1000, removal);
    }
    // A request that removes nothing does not wait.
    let mut reader = device.iommu.reader();
    let guard = reader.enter();
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.map(1, 0x1000, 0x1fff, 0x5000, READ), OK);
    assert_eq!(driver.unmap(1, 0x8000, 0x8fff), OK);
    drop(guard);
}

/// The page gets a new user as soon as its UNMAP is answered. The endpoint must never write into it from then on.
#[test]
fn row_48_a_page_is_free_when_its_unmap_is_answered() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    driver.attach(1, EP);
    let writers = Writers::start(&driver, &device, 0x1000);
    for round in 0..2000 {
        assert_eq!(driver.map(1, 0x1000, 0x1fff, 0x5000, WRITE), OK);
        match round % 3 {
            0 => assert_eq!(driver.unmap(1, 0, u64::MAX), OK),
            1 => assert_eq!((driver.detach(1, EP), driver.attach(1, EP)), (OK, OK)),
            _ => assert_eq!((driver.attach(2, EP), driver.attach(1, EP)), (OK, OK)),
        }
        writers.assert_gone(&driver, 0x5000);
    }
    writers.end();
}

/// Sets the index up to which the driver wants no notification (2.7.7), or the flag without EVENT_IDX.
fn suppress_notifications(driver: &Driver, event_idx: bool) {
    let queue = &driver.queues[REQUESTS];
    if event_idx {
        driver.write_u16(queue.available + 4 + 2 * u64::from(SIZE), queue.next_used.wrapping_sub(1));
    } else {
        driver.write_u16(queue.available, 1);
    }
}

fn ask_for_notification(driver: &Driver, event_idx: bool, after: u16) {
    let queue = &driver.queues[REQUESTS];
    if event_idx {
        driver.write_u16(queue.available + 4 + 2 * u64::from(SIZE), queue.next_used.wrapping_add(after));
    } else {
        driver.write_u16(queue.available, 0);
    }
}

#[test]
fn row_49_no_notification_that_the_driver_does_not_want() {
    for event_idx in [false, true] {
        let device = Device::new();
        let mut driver = Driver::accepting(&device, if event_idx { u64::MAX } else { !EVENT_IDX });
        suppress_notifications(&driver, event_idx);
        for round in 0..20 {
            driver.map(1, 0x1000 * round, 0x1000 * round + 0xfff, 0, READ);
        }
        driver.wait_until_idle(EVENTS);
        assert!(driver.queues[REQUESTS].call.read().is_err(), "EVENT_IDX {event_idx}");
        assert_eq!(device.control.stats().notifications, 0);
        // The notification that it does want comes.
        ask_for_notification(&driver, event_idx, 0);
        driver.attach(1, EP);
        wait_until(PATIENCE, "the notification", || driver.queues[REQUESTS].call.read().is_ok());
    }
}

#[test]
fn row_49_a_batch_has_one_notification() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    wait_for_kicks(&device, &driver, 1);
    let _ = driver.queues[REQUESTS].call.read();
    ask_for_notification(&driver, true, 30);
    let chains: Vec<_> = (0..60)
        .map(|page| {
            let request = map(1, page << 12, (page << 12) + 0xfff, 0, READ);
            driver.add(REQUESTS, &[Part::R(request.bytes()), Part::W(4)])
        })
        .collect();
    let before = device.control.stats();
    driver.kick(REQUESTS);
    for (head, writable) in chains {
        let (used, len) = driver.wait_used(REQUESTS);
        assert_eq!(used, head, "in order");
        assert_eq!(driver.collect(len, &writable).status(), OK);
    }
    wait_until(PATIENCE, "the notification", || driver.queues[REQUESTS].call.read().is_ok());
    driver.wait_until_idle(EVENTS);
    let after = device.control.stats();
    assert_eq!(after.notifications - before.notifications, 1);
    assert_eq!(after.kicks - before.kicks, 1);
}

/// Linux does not read the status of MAP and UNMAP, so each failure must be visible here.
#[test]
fn row_50_failures_are_counted() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    driver.map(1, 0, 0x1fff, 0, READ);
    driver.map(1, 0, 0x1fff, 0, READ);
    driver.map(2, 0, 0x1fff, 0, READ);
    driver.unmap(1, 0, 0xfff);
    driver.unmap(1, 0, 0x1fff);
    let stats = device.iommu.stats();
    let requests = |request| (stats.requests[request].total, stats.requests[request].failed);
    assert_eq!(requests(RequestType::Map), (3, 2));
    assert_eq!(requests(RequestType::Unmap), (2, 1));
    assert_eq!(requests(RequestType::Attach), (1, 0));
    assert_eq!((stats.mappings_live, stats.mappings_peak), (0, 1));
}

/// Linux gives the identity domain the first id on attach and 0 on detach, so the first id must be 0.
#[test]
fn row_51_domain_0_is_a_domain() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!(driver.config().domain_range[0].get(), 0);
    assert_eq!(driver.attach_bypass(0, EP), OK);
    assert_eq!(driver.detach(0, EP), OK);
    assert_eq!(driver.attach(0, EP), OK);
    assert_eq!(driver.map(0, 0, 0xfff, 0x5000, READ), OK);
    driver.dma(&device, EP).read(0, &mut [0]).unwrap();
}
