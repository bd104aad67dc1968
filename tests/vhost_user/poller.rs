//! The request queue when another thread than its worker serves it, over a real vhost-user socket.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use viommu::poller::QueuePoller;
use viommu_testkit::StopOnDrop;
use viommu_testkit::frontend::*;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_wire::request::RequestType;

const PAGE: u64 = 4096;

/// A device that is idle, and a driver that has attached an endpoint. Also returns how many kicks that took.
fn idle() -> (Device, Driver, u64) {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    wait_for_kicks(&device, &driver, 1);
    (device, driver, 1)
}

/// Adds a request, and kicks if the device asks for it. Returns where the answer will be, and whether it kicked.
fn send(driver: &mut Driver, page: u64) -> (Vec<(u64, usize)>, bool) {
    let request = map(1, page * PAGE, page * PAGE + PAGE - 1, 0x20_0000, READ);
    let (_, writable) = driver.add(REQUESTS, &[Part::R(request.bytes()), Part::W(4)]);
    let kicked = driver.is_kick_wanted(REQUESTS);
    if kicked {
        driver.kick(REQUESTS);
    }
    (writable, kicked)
}

fn answer(driver: &mut Driver, writable: &[(u64, usize)]) -> u8 {
    let (_, len) = driver.wait_used(REQUESTS);
    driver.collect(len, writable).status()
}

/// Features with and without avail_event.
const KINDS: [u64; 2] = [u64::MAX, !EVENT_IDX];

#[test]
fn a_poller_serves_the_queue_and_the_driver_need_not_kick() {
    for features in KINDS {
        let device = Device::new();
        let mut driver = Driver::accepting(&device, features);
        assert_eq!(driver.attach(1, EP), OK);
        wait_for_kicks(&device, &driver, 1);
        let served = device.control.count();
        assert!(device.control.acquire());
        assert!(!device.control.poll());
        for page in 0..5 {
            let (writable, kicked) = send(&mut driver, page);
            assert!(!kicked);
            driver.wait_until_idle(EVENTS);
            assert!(driver.used_is_empty(REQUESTS));
            assert!(device.control.poll());
            assert_eq!(answer(&mut driver, &writable), OK);
            assert!(!device.control.poll());
            assert_eq!(device.control.count(), served + page + 1);
        }
        device.control.release();
        let (writable, kicked) = send(&mut driver, 5);
        assert!(kicked);
        assert_eq!(answer(&mut driver, &writable), OK);
        wait_for_kicks(&device, &driver, 2);
    }
}

/// A driver may have decided to kick before the queue was taken, or may ignore the device's wish.
#[test]
fn a_kick_that_nobody_asked_for_is_counted_and_disturbs_nothing() {
    let (device, mut driver, kicks) = idle();
    assert!(device.control.acquire());
    for count in 1..=10 {
        driver.kick(REQUESTS);
        wait_until(PATIENCE, "the kick", || device.control.stats().kicks == kicks + count);
        let (writable, kicked) = send(&mut driver, count);
        assert!(!kicked, "the worker asked for kicks");
        assert!(device.control.poll());
        assert_eq!(answer(&mut driver, &writable), OK);
    }
    device.control.release();
    wait_for_kicks(&device, &driver, kicks + 10);
}

/// After 2^16 requests the index goes past the same avail_event again.
#[test]
fn a_queue_that_is_polled_for_long_is_hardly_ever_kicked() {
    const REQUESTS_SENT: u64 = (1 << 16) + 100;
    let (device, mut driver, _) = idle();
    assert!(device.control.acquire());
    let mut kicks = 0;
    for page in 0..REQUESTS_SENT {
        let (writable, kicked) = send(&mut driver, page);
        kicks += u32::from(kicked);
        while !device.control.poll() && driver.used_is_empty(REQUESTS) {}
        assert_eq!(answer(&mut driver, &writable), OK);
    }
    assert!(kicks <= 1, "{kicks} kicks");
    device.control.release();
    assert_eq!(device.iommu.stats().requests[RequestType::Map].total, REQUESTS_SENT);
}

#[test]
fn unpolled_requests_wake_the_worker_when_the_queue_is_released() {
    for features in KINDS {
        let device = Device::new();
        let mut driver = Driver::accepting(&device, features);
        assert_eq!(driver.attach(1, EP), OK);
        wait_for_kicks(&device, &driver, 1);
        for page in 0..50 {
            assert!(device.control.acquire());
            let (writable, kicked) = send(&mut driver, page);
            assert!(!kicked);
            device.control.release();
            assert_eq!(answer(&mut driver, &writable), OK);
        }
        assert_eq!(device.control.stats().kicks, 1);
    }
}

#[test]
fn no_request_is_lost_and_no_kick_counted_twice_while_the_queue_changes_hands() {
    const HANDOFF: u64 = 40;
    const HANDOFFS: u64 = 100;
    for features in KINDS {
        let device = Device::new();
        let mut driver = Driver::accepting(&device, features);
        assert_eq!(driver.attach(1, EP), OK);
        wait_for_kicks(&device, &driver, 1);
        let (control, done, served) = (device.control.clone(), AtomicBool::new(false), AtomicU64::new(0));
        let (mut kicks, mut sent) = (1, 0);
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // For some time it has the queue, which it releases and acquires again now and then, and for some
                    // time not.
                    let until = control.count() + HANDOFF;
                    while control.count() < until && !done.load(Ordering::Relaxed) {
                        assert!(control.acquire());
                        let found = (0..20).filter(|_| control.poll()).count();
                        served.fetch_add(found as u64, Ordering::Relaxed);
                        control.release();
                    }
                    let until = control.count() + HANDOFF;
                    while control.count() < until && !done.load(Ordering::Relaxed) {
                        thread::yield_now();
                    }
                }
            });
            let end = StopOnDrop(&done);
            let mut send_one = || {
                let (writable, kicked) = send(&mut driver, sent);
                kicks += u64::from(kicked);
                assert_eq!(answer(&mut driver, &writable), OK);
                sent += 1;
            };
            (0..HANDOFFS * HANDOFF).for_each(|_| send_one());
            // The other thread may get no processor for long.
            wait_until(PATIENCE, "a request that the other thread serves", || {
                send_one();
                served.load(Ordering::Relaxed) > 0
            });
            drop(end);
            other.join().unwrap();
        });
        assert_eq!(device.iommu.stats().requests[RequestType::Map].total, sent);
        // Several kicks may have been written before the first was read.
        let seen = device.control.stats().kicks;
        assert!(seen <= kicks, "{seen} of {kicks}");
    }
}

#[test]
fn only_one_poller_at_a_time_acquires_a_running_queue() {
    let device = Device::new();
    assert!(!device.control.acquire(), "there is no driver");
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    assert!(device.control.acquire());
    assert!(!device.control.acquire(), "it is taken");
    device.control.release();
    let bases = driver.stop_queues();
    assert!(!device.control.acquire(), "it does not run");
    driver.resume_queues(bases);
    assert!(device.control.acquire());
    device.control.release();
    device.control.inject(&["map=nomem".parse().unwrap()]);
    assert!(!device.control.acquire(), "its answers may be late");
    assert_eq!(driver.map(1, 0, PAGE - 1, 0x20_0000, READ), NOMEM);
}

#[test]
fn a_queue_that_is_stopped_or_reset_while_taken_is_served_when_it_runs_again() {
    let (device, mut driver, _) = idle();
    assert!(device.control.acquire());
    let bases = driver.stop_queues();
    // As during a pause: requests that are added now wait.
    let (writable, _) = send(&mut driver, 0);
    assert!(!device.control.poll());
    driver.resume_queues(bases);
    device.control.poll();
    assert_eq!(answer(&mut driver, &writable), OK);
    device.control.release();
    assert_eq!(driver.map(1, PAGE, 2 * PAGE - 1, 0x20_0000, READ), OK);

    assert!(device.control.acquire());
    driver.reset();
    assert!(!device.control.poll());
    device.control.release();
    assert_eq!(driver.attach(1, EP), OK);

    // Once the queue is stopped, its ring is ordinary guest memory again.
    assert!(device.control.acquire());
    driver.stop_queues();
    let ring = driver.queues[REQUESTS].used;
    driver.write(ring, &[0xa5; 0x1000]);
    device.control.release();
    assert_eq!(driver.read(ring, 0x1000), [0xa5; 0x1000]);
    driver.start_over();
    assert_eq!(driver.attach(1, EP), OK);
}

#[test]
fn a_frontend_that_leaves_while_its_queue_is_taken_leaves_it_to_the_next() {
    let (device, driver, _) = idle();
    let (control, done) = (device.control.clone(), AtomicBool::new(false));
    assert!(control.acquire());
    thread::scope(|scope| {
        let looking = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                control.poll();
            }
        });
        let end = StopOnDrop(&done);
        drop(driver);
        let mut next = Driver::new(&device);
        for _ in 0..100 {
            assert_eq!(next.attach(1, EP), OK);
        }
        drop(end);
        looking.join().unwrap();
        control.release();
        assert_eq!(next.attach(1, EP), OK);
        assert!(control.acquire());
        drop(next);
        // No frontend is connected any more.
        wait_until(PATIENCE, "the end of the connection", || {
            control.poll();
            control.release();
            !control.acquire()
        });
    });
}

#[test]
fn a_poller_that_serves_an_unmap_may_have_used_the_mapping() {
    let (device, mut driver, _) = idle();
    let mut dma = driver.dma(&device, EP);
    for _ in 0..100 {
        assert_eq!(driver.map(1, 0, PAGE - 1, 0x20_0000, READ), OK);
        dma.read(0, &mut [0; 64]).unwrap();
        assert!(device.control.acquire());
        let (_, writable) = driver.add(REQUESTS, &[Part::R(unmap(1, 0, PAGE - 1).bytes()), Part::W(4)]);
        assert!(device.control.poll());
        assert_eq!(answer(&mut driver, &writable), OK);
        device.control.release();
        dma.read(0, &mut [0; 64]).unwrap_err();
    }
}
