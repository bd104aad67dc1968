//! The device's events in the trace.

use viommu::iommu::{Limits, Settings};
use viommu_testkit::frontend::*;
use viommu_testkit::trace::Recorder;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_trace::Event;
use viommu_trace::event::{Channel, ResetKind};
use viommu_wire::request::RequestType;
use viommu_wire::virtio_iommu::{FaultReason, MapFlags, Status, request_type};

/// All events while `act` uses a device, and when the device ends afterwards.
fn record(act: impl FnOnce(&Device)) -> Vec<Event> {
    record_with(|_| {}, act)
}

/// The same for a device whose settings `change` changes.
fn record_with(change: impl FnOnce(&mut Settings), act: impl FnOnce(&Device)) -> Vec<Event> {
    let (recorder, tracer) = Recorder::start(&[]);
    let device = Device::traced(change, tracer);
    act(&device);
    drop(device);
    recorder.end()
}

/// The requests in a trace: type, status, endpoint, domain, flags, first and last address, target.
type Request = (u8, u8, Option<u32>, u32, u32, u64, u64, u64);

fn requests(events: &[Event]) -> Vec<Request> {
    let request = |event: &Event| match *event {
        Event::Request { request, status, endpoint, domain, flags, virt_start, virt_end, phys_start, duration } => {
            assert!((1..10_000_000_000).contains(&duration), "{duration} ns");
            Some((request, status, endpoint, domain, flags, virt_start, virt_end, phys_start))
        }
        _ => None,
    };
    events.iter().filter_map(request).collect()
}

#[test]
fn a_session_from_its_first_step_to_its_last() {
    let events = record(|device| {
        let mut driver = Driver::new(device);
        driver.attach(1, EP);
        let stopped = driver.stop_queues();
        driver.resume_queues(stopped);
        driver.attach(1, EP);
        driver.reset();
        driver.attach(1, EP);
        driver.stop_queues();
        device.control.function_reset();
        // A session that ends in the middle. Its request is still in the queue, and is done again.
        driver.start_queue(REQUESTS, 0);
        wait_until(PATIENCE, "the request", || device.iommu.stats().requests[RequestType::Attach].total == 4);
        device.control.machine_paused();
    });
    let queue = |queue, started, index| Event::Queue { queue, started, index, size: SIZE };
    let reset = |reset| Event::Reset { reset, endpoint: None };
    let session = |connected| Event::Session { channel: Channel::VhostUser, endpoint: None, connected };
    let half = RAM / 2;
    let memory = |added, gpa| Event::Memory {
        channel: Channel::VhostUser,
        endpoint: None,
        added,
        gpa,
        len: half,
        writable: true,
    };
    // The next test checks requests, kicks and interrupts.
    let shown = |event: &&Event| {
        !matches!(event, Event::Request { .. } | Event::Kick { .. } | Event::Interrupt { .. } | Event::Features { .. })
    };
    let found: Vec<Event> = events.iter().filter(shown).copied().collect();
    let expected = [
        session(true),
        memory(true, 0),
        memory(true, half),
        queue(0, true, 0),
        queue(1, true, 0),
        queue(0, false, 1),
        queue(1, false, 0),
        reset(ResetKind::Resume),
        queue(0, true, 1),
        queue(1, true, 0),
        queue(0, false, 2),
        queue(1, false, 0),
        reset(ResetKind::Device),
        queue(0, true, 0),
        queue(1, true, 0),
        queue(0, false, 1),
        queue(1, false, 0),
        reset(ResetKind::System),
        queue(0, true, 0),
        reset(ResetKind::Pause),
        queue(0, false, 1),
        memory(false, 0),
        memory(false, half),
        session(false),
    ];
    assert_eq!(found, expected);
    let features: Vec<&Event> = events.iter().filter(|event| matches!(event, Event::Features { .. })).collect();
    let [Event::Features { offered, accepted }] = features[..] else { panic!("{features:?}") };
    assert_eq!(offered, accepted);
}

#[test]
fn a_kick_and_the_requests_that_it_brings() {
    let events = record(|device| {
        let mut driver = Driver::new(device);
        let chain = |request: Vec<u8>| [Part::R(request), Part::W(4)];
        // Enabling the queue makes the device look into it too, and it might find these requests then.
        driver.wait_until_idle(EVENTS);
        driver.add(REQUESTS, &chain(attach(1, EP, 0).bytes()));
        driver.add(REQUESTS, &chain(map(1, 0x1000, 0x2fff, 0x5000, READ).bytes()));
        driver.add(REQUESTS, &chain(unmap(1, 0x1000, 0x2fff).bytes()));
        driver.kick(REQUESTS);
        for _ in 0..3 {
            driver.wait_used(REQUESTS);
        }
        // Enabling a queue is no kick, and neither is QEMU's own when it hands a queue over.
        let stopped = driver.stop_queues();
        driver.resume_queues(stopped);
        driver.kick(REQUESTS);
        driver.kick(EVENTS);
        driver.wait_until_idle(EVENTS);
        driver.transact(&chain(detach(1, EP).bytes()));
    });
    let kicks: Vec<Event> = events.iter().filter(|event| matches!(event, Event::Kick { .. })).copied().collect();
    assert_eq!(kicks, [Event::Kick { queue: 0, requests: 3 }, Event::Kick { queue: 0, requests: 1 }]);
    let read = MapFlags::READ.bits();
    let expected = [
        (request_type::ATTACH, 0, Some(EP), 1, 0, 0, 0, 0),
        (request_type::MAP, 0, None, 1, read, 0x1000, 0x2fff, 0x5000),
        (request_type::UNMAP, 0, None, 1, 0, 0x1000, 0x2fff, 0),
        (request_type::DETACH, 0, Some(EP), 1, 0, 0, 0, 0),
    ];
    assert_eq!(requests(&events), expected);
    let place = |event: Event| events.iter().position(|found| *found == event).unwrap();
    let interrupt = place(Event::Interrupt { endpoint: None, vector: 0 });
    assert!(place(kicks[0]) < interrupt);
}

#[test]
fn row_50_failures_are_traced() {
    let events = record(|device| {
        let mut driver = Driver::new(device);
        driver.attach(1, EP);
        driver.map(1, 0, 0x1fff, 0x5000, READ);
        driver.map(1, 0x1000, 0x1fff, 0x6000, READ);
        driver.unmap(1, 0, 0xfff);
        driver.unmap(2, 0, 0xfff);
        driver.probe(NOBODY);
    });
    let failed: Vec<_> = requests(&events).into_iter().filter(|request| request.1 != OK).collect();
    let expected = [
        (request_type::MAP, Status::Inval as u8, None, 1, READ, 0x1000, 0x1fff, 0x6000),
        (request_type::UNMAP, Status::Range as u8, None, 1, 0, 0, 0xfff, 0),
        (request_type::UNMAP, Status::NoEnt as u8, None, 2, 0, 0, 0xfff, 0),
        (request_type::PROBE, Status::NoEnt as u8, Some(NOBODY), 0, 0, 0, 0, 0),
    ];
    assert_eq!(failed, expected);
}

#[test]
fn faults_bypass_and_malformed_chains() {
    let events = record(|device| {
        let mut driver = Driver::new(device);
        driver.write_bypass(1);
        driver.write_bypass(0);
        driver.write_bypass(7);
        driver.dma(device, EP).write(0x1234, &[0]).unwrap_err();
        driver.transact(&[Part::R(vec![9; 20]), Part::W(4)]);
        let short = driver.add_event_buffers(1, 8);
        driver.kick(EVENTS);
        assert_eq!(driver.wait_used(EVENTS).1, 0);
        assert_eq!(driver.read(short[0].0, 8), [0xa5; 8]);
    });
    let has = |event: Event| assert!(events.contains(&event), "{event:?} is not in {events:#?}");
    let bypass: Vec<&Event> = events.iter().filter(|event| matches!(event, Event::Bypass { .. })).collect();
    assert_eq!(bypass, [&Event::Bypass { value: 0 }, &Event::Bypass { value: 7 }], "1 was what it was");
    has(Event::Fault {
        endpoint: EP,
        reason: FaultReason::Domain as u8,
        access: viommu_trace::event::Access::Write,
        address: 0x1234,
        domain: None,
        dropped: false,
    });
    has(Event::Malformed { queue: 0, head: 0, readable: 20, writable: 4, used: 0 });
    has(Event::Malformed { queue: 1, head: 0, readable: 0, writable: 8, used: 0 });
}

#[test]
fn row_45_faults_that_wait_at_a_reset_are_counted_and_traced() {
    let events = record(|device| {
        let mut driver = Driver::new(device);
        driver.write_bypass(0);
        let mut dma = driver.dma(device, EP);
        for address in 0..3 {
            dma.read(address, &mut [0]).unwrap_err();
        }
        let buffer = driver.add_event_buffers(1, 24)[0];
        driver.kick(EVENTS);
        driver.wait_fault(buffer);
        driver.reset();
        wait_until(PATIENCE, "the reset", || device.iommu.stats().faults_dropped == 2);
        driver.reset();
        // The device has seen the reset when it answers.
        assert_eq!(driver.attach(1, EP), OK);
        dma.read(3, &mut [0]).unwrap_err();
        drop(driver);
        wait_until(PATIENCE, "the end", || device.iommu.stats().faults_dropped == 3);
    });
    let shown = events.iter().filter_map(|event| match *event {
        Event::Undelivered { count } => Some(format!("{count} undelivered")),
        Event::Reset { reset, .. } => Some(format!("{reset:?}")),
        Event::Session { connected: false, .. } => Some("end".into()),
        Event::Fault { address, .. } => Some(format!("{address}")),
        _ => None,
    });
    let expected = ["0", "1", "2", "2 undelivered", "Device", "Device", "3", "1 undelivered", "end"];
    assert_eq!(shown.collect::<Vec<_>>(), expected);
}

#[test]
fn row_45_a_fault_that_is_dropped_is_traced_as_such() {
    let events = record_with(
        |settings| settings.limits = Limits { pending_faults: 2, ..Limits::default() },
        |device| {
            let mut driver = Driver::new(device);
            driver.write_bypass(0);
            let mut dma = driver.dma(device, EP);
            for address in 0..4 {
                dma.read(address, &mut [0]).unwrap_err();
            }
            let buffers = driver.add_event_buffers(2, 24);
            driver.kick(EVENTS);
            for (address, buffer) in buffers.into_iter().enumerate() {
                assert_eq!(driver.wait_fault(buffer).address.get(), address as u64);
            }
            dma.read(4, &mut [0]).unwrap_err();
        },
    );
    let faults = events.iter().filter_map(|event| match *event {
        Event::Fault { address, dropped, .. } => Some((address, dropped)),
        _ => None,
    });
    assert_eq!(faults.collect::<Vec<_>>(), [(0, false), (1, false), (2, true), (3, true), (4, false)]);
}
