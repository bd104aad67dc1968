//! Which state survives resets, pauses and disconnects: see `src/vhost/reset.rs`.

use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread;

use viommu::dma::{DmaContext, DmaError};
use viommu::iommu::{Iommu, Settings};
use viommu::vhost::{Server, ServerError};
use viommu_socket::SocketError;
use viommu_testkit::frontend::*;
use viommu_testkit::process::{alone, descriptors};
use viommu_testkit::trace::Recorder;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_trace::Kind;
use viommu_trace::Tracer;

/// A driver with [`EP`] attached to domain 1, a mapping there, and `bypass` 0.
fn busy(device: &Device) -> Driver {
    let mut driver = Driver::new(device);
    driver.write_bypass(0);
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.map(1, 0x1000, 0x1fff, 0x5000, READ), OK);
    driver
}

#[test]
fn a_pause_keeps_everything() {
    let device = Device::new();
    let mut driver = busy(&device);
    let mut dma = driver.dma(&device, EP);
    for _ in 0..3 {
        let stopped = driver.stop_queues();
        assert_eq!(stopped[EVENTS], 0, "the event queue has not moved");
        dma.read(0x1000, &mut [0]).unwrap();
        // Requests during the pause wait.
        let (head, writable) = driver.add(REQUESTS, &[Part::R(attach(1, EP2, 0).bytes()), Part::W(4)]);
        driver.kick(REQUESTS);
        // The other queue resumes first. It shows when the device's thread has done everything that it was woken for.
        driver.start_queue(EVENTS, stopped[EVENTS]);
        driver.wait_until_idle(EVENTS);
        assert!(driver.used_is_empty(REQUESTS));
        driver.start_queue(REQUESTS, stopped[REQUESTS]);
        let (used, len) = driver.wait_used(REQUESTS);
        assert_eq!(used, head);
        assert_eq!(driver.collect(len, &writable).status(), OK);
        dma.read(0x1000, &mut [0]).unwrap();
        assert_eq!(driver.config().bypass, 0);
        assert_eq!(driver.map(1, 0x1000, 0x1fff, 0x5000, READ), INVAL, "the mapping is there");
    }
}

#[test]
fn a_fault_in_a_pause_is_delivered_after_it() {
    let device = Device::new();
    let mut driver = busy(&device);
    let buffers = driver.add_event_buffers(2, 24);
    let mut dma = driver.dma(&device, EP);
    dma.read(0x8000, &mut [0]).unwrap_err();
    assert_eq!(driver.wait_fault(buffers[0]).address.get(), 0x8000);
    let stopped = driver.stop_queues();
    assert_eq!(stopped[EVENTS], 1);
    dma.read(0x9000, &mut [0]).unwrap_err();
    // The other queue resumes first; the device's thread learned of the fault before.
    driver.start_queue(REQUESTS, stopped[REQUESTS]);
    driver.wait_until_idle(REQUESTS);
    assert!(driver.used_is_empty(EVENTS));
    driver.start_queue(EVENTS, stopped[EVENTS]);
    assert_eq!(driver.wait_fault(buffers[1]).address.get(), 0x9000);
}

#[test]
fn a_fault_before_a_reset_is_not_delivered_after_it() {
    let device = Device::new();
    let mut driver = busy(&device);
    driver.dma(&device, EP).read(0x8000, &mut [0]).unwrap_err();
    driver.reset();
    driver.add_event_buffers(1, 24);
    driver.kick(EVENTS);
    driver.wait_until_idle(EVENTS);
    assert!(driver.used_is_empty(EVENTS));
}

#[test]
fn qmp_tells_a_pause_from_a_reset_if_the_index_does_not() {
    for paused in [false, true] {
        let device = Device::new();
        let mut driver = Driver::new(&device);
        // 2^16 requests, so that the ring is back at index 0.
        let request = attach(1, EP, 0).bytes();
        for _ in 0..(1 << 16) / 64 {
            for _ in 0..64 {
                driver.add(REQUESTS, &[Part::R(request.clone()), Part::W(4)]);
            }
            driver.kick(REQUESTS);
            for _ in 0..64 {
                driver.wait_used(REQUESTS);
            }
        }
        assert_eq!(driver.stop_queues(), [0, 0]);
        if paused {
            device.control.machine_paused();
            device.control.machine_resumed();
        }
        driver.resume_queues([0, 0]);
        assert_eq!(driver.detach(1, EP), if paused { OK } else { INVAL });
    }
}

#[test]
fn a_reset_of_the_machine_is_seen_before_the_next_driver_comes() {
    let device = Device::new();
    let mut driver = busy(&device);
    let mut dma = driver.dma(&device, EP);
    // The reset of a function alone has no effect, as when a guest resets it.
    device.control.function_reset();
    dma.read(0x1000, &mut [0]).unwrap();
    // A reset of the machine: the functions, the queues, the functions.
    driver.stop_queues();
    device.control.function_reset();
    // Firmware now uses the function with guest-physical addresses.
    driver.write(0x1000, b"boot");
    let mut data = [0; 4];
    driver.dma(&device, EP).read(0x1000, &mut data).unwrap();
    assert_eq!(&data, b"boot");
    assert_eq!(device.iommu.stats().mappings_live, 0);
    driver.start_over();
    assert_eq!(driver.detach(1, EP), INVAL);
}

#[test]
fn qmp_reports_a_reset_of_the_machine() {
    let device = Device::new();
    let mut driver = busy(&device);
    driver.stop_queues();
    assert_eq!(driver.config().bypass, 0);
    device.control.machine_reset();
    assert_eq!(driver.config().bypass, 1);
    driver.start_over();
    driver.write_bypass(0);
    assert_eq!(driver.attach(1, EP), OK);
    // RESET comes once more, and late: the driver that runs by now keeps its state.
    device.control.machine_reset();
    assert_eq!(driver.config().bypass, 0);
    assert_eq!(driver.detach(1, EP), OK);
}

#[test]
fn the_next_frontend_is_served() {
    let device = Device::new();
    for _ in 0..20 {
        let driver = busy(&device);
        drop(driver);
    }
    let mut driver = Driver::new(&device);
    assert_eq!(driver.config().bypass, 1);
    assert_eq!(driver.detach(1, EP), INVAL);
}

#[test]
fn many_sessions_leave_no_descriptor_behind() {
    alone("conformance::reset::many_sessions_leave_no_descriptor_behind", sessions_come_and_go);
}

fn sessions_come_and_go() {
    let device = Device::new();
    drop(busy(&device));
    drop(busy(&device));
    wait_until(PATIENCE, "the end of the session", || device.iommu.stats().mappings_live == 0);
    let before = descriptors();
    for _ in 0..50 {
        drop(busy(&device));
    }
    wait_until(PATIENCE, "the end of the sessions", || device.iommu.stats().mappings_live == 0);
    // The last session may still be closing its descriptors.
    wait_until(PATIENCE, "all descriptors closed", || descriptors() <= before);
}

#[test]
fn a_live_socket_is_an_error_and_a_stale_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("viommu.sock");
    let iommu = || Iommu::new(Settings::default(), Tracer::default());
    let bind = || Server::bind(&path, iommu(), Tracer::default());
    let first = bind().unwrap();
    let error = bind().map(|_| ()).unwrap_err();
    assert!(matches!(error, ServerError::Socket(SocketError::InUse(_))));
    assert!(error.to_string().contains("viommu.sock"), "{error}");
    drop(first);
    assert!(!path.exists(), "a server takes its socket away");
    // The socket of a process that was killed.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(bind().unwrap());
    // A file is never removed.
    std::fs::write(&path, b"precious").unwrap();
    assert!(matches!(bind().map(|_| ()).unwrap_err(), ServerError::Socket(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_server_stops_with_and_without_a_frontend() {
    drop(Device::new());
    let device = Device::new();
    let driver = busy(&device);
    drop(device);
    drop(driver);
}

/// A function that is not reset yet still uses I/O virtual addresses when the IOMMU is in bypass again.
#[test]
fn an_endpoint_attached_at_a_machine_reset_reaches_nothing() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.map(1, 0x1000, 0x1fff, 0x5000, READ), OK);
    assert_eq!(driver.attach_bypass(2, EP2), OK);
    let contexts = [EP, EP2, BARE].map(|id| {
        let dma = DmaContext::new(&device.iommu, id, driver.memory.clone(), Tracer::default());
        dma.set_bus_master(true);
        dma
    });
    let read = |dma: &DmaContext| dma.open().read(0x1000, &mut [0]);
    assert_eq!(contexts.each_ref().map(read), [Ok(()); 3]);
    driver.stop_queues();
    assert_eq!(contexts.each_ref().map(read), [Ok(()); 3], "it may be a pause");
    device.control.function_reset();
    // The other endpoints' accesses work as before.
    assert_eq!(contexts.each_ref().map(read), [Err(DmaError::BusMasterOff), Ok(()), Ok(())]);
    assert_eq!(contexts.each_ref().map(DmaContext::is_bus_master), [false, true, true]);
    // Firmware sets Bus Master Enable again.
    contexts[0].set_bus_master(true);
    assert_eq!(read(&contexts[0]), Ok(()));
}

#[test]
fn an_endpoint_attached_when_the_frontend_leaves_reaches_nothing() {
    let (recorder, tracer) = Recorder::start(&[Kind::Dma, Kind::Fault]);
    let device = Device::traced(|_| {}, tracer.clone());
    // Far above the memory, so that an access in bypass is noticed.
    const IOVA: u64 = 0xffff_f000;
    for _ in 0..100 {
        let mut driver = Driver::new(&device);
        assert_eq!(driver.attach(1, EP), OK);
        assert_eq!(driver.map(1, IOVA, IOVA + 0xfff, 0x5000, READ), OK);
        let dma = DmaContext::new(&device.iommu, EP, driver.memory.clone(), tracer.clone());
        dma.set_bus_master(true);
        let (begun, begins) = mpsc::channel();
        let poller = thread::spawn(move || {
            let mut dma = dma.open();
            let mut polled = Ok(0);
            let _ = begun.send(dma.poll(IOVA, 0));
            while polled.is_ok() {
                polled = dma.poll(IOVA, 0);
            }
            polled
        });
        begins.recv().unwrap().unwrap();
        drop(driver);
        assert_eq!(poller.join().unwrap(), Err(DmaError::BusMasterOff));
    }
    drop(device);
    drop(tracer);
    assert_eq!(recorder.end(), [], "polls that find nothing new are not traced");
}
