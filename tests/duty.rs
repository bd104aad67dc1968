//! The request queue as somebody else than its worker serves it, over a real vhost-user socket.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::frontend::*;
use viommu::duty::Duty;

const PAGE: u64 = 4096;

/// A device and a driver, which has attached an endpoint and was seen to be idle: how many kicks that took.
fn idle() -> (Device, Driver, u64) {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    settle(&device, 1);
    (device, driver, 1)
}

/// Adds a request, and kicks.
fn send(driver: &mut Driver, page: u64) -> Vec<(u64, usize)> {
    let request = map(1, page * PAGE, page * PAGE + PAGE - 1, 0x20_0000, READ);
    let (_, writable) = driver.add(REQUESTS, &[Part::R(request.bytes()), Part::W(4)]);
    driver.kick(REQUESTS);
    writable
}

fn answer(driver: &mut Driver, writable: &[(u64, usize)]) -> u8 {
    let (_, len) = driver.wait_used(REQUESTS);
    driver.collect(len, writable).status()
}

#[test]
fn who_took_the_queue_serves_it_and_its_worker_does_not() {
    let (device, mut driver, kicks) = idle();
    assert!(device.control.take());
    assert!(!device.control.look());
    for page in 0..5 {
        let writable = send(&mut driver, page);
        assert_eq!(driver.try_wait_used(REQUESTS, QUIET), None);
        assert!(device.control.look());
        assert_eq!(answer(&mut driver, &writable), OK);
        assert!(!device.control.look());
        assert_eq!(device.control.count(), kicks + page + 1);
    }
    device.control.give_back();
    assert_eq!(driver.map(1, 5 * PAGE, 6 * PAGE - 1, 0x20_0000, READ), OK);
    settle(&device, kicks + 6);
}

/// Requests may be found with those before, and their kick comes when they are answered.
#[test]
fn a_kick_without_a_request_is_seen_before_long_and_once() {
    let (device, driver, kicks) = idle();
    assert!(device.control.take());
    for count in 1..=10 {
        driver.kick(REQUESTS);
        assert!((0..100).any(|_| device.control.look()));
        assert!(!(0..200).any(|_| device.control.look()));
        assert_eq!(device.control.count(), kicks + count);
    }
    device.control.give_back();
    settle(&device, kicks + 10);
}

#[test]
fn a_kick_that_nobody_looked_for_wakes_the_worker_when_the_queue_is_given_back() {
    let (device, mut driver, kicks) = idle();
    for page in 0..50 {
        assert!(device.control.take());
        let writable = send(&mut driver, page);
        device.control.give_back();
        assert_eq!(answer(&mut driver, &writable), OK);
    }
    settle(&device, kicks + 50);
}

#[test]
fn no_kick_is_lost_or_told_twice_while_the_queue_changes_hands() {
    const TURN: u64 = 40;
    const TURNS: u64 = 50;
    let (device, mut driver, before) = idle();
    let (control, done) = (device.control.clone(), AtomicBool::new(false));
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut served = 0;
            while !done.load(Ordering::Relaxed) {
                // A turn on duty, given back and taken again now and then, and a turn off duty.
                let until = control.count() + TURN;
                while control.count() < until && !done.load(Ordering::Relaxed) {
                    assert!(control.take());
                    served += (0..20).filter(|_| control.look()).count();
                    control.give_back();
                }
                let until = control.count() + TURN;
                while control.count() < until && !done.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
            }
            served
        });
        for count in 1..=TURNS * TURN {
            let writable = send(&mut driver, count);
            assert_eq!(answer(&mut driver, &writable), OK);
            // An answer may come before the kick is seen.
            eventually("the kick", || device.control.counters().kicks >= before + count);
            assert_eq!(device.control.counters().kicks, before + count);
        }
        done.store(true, Ordering::Relaxed);
        assert_ne!(other.join().unwrap(), 0);
    });
    assert_eq!(device.iommu.counters().map.total, TURNS * TURN);
}

#[test]
fn one_at_a_time_takes_a_queue_that_runs() {
    let device = Device::new();
    assert!(!device.control.take(), "there is no driver");
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    assert!(device.control.take());
    assert!(!device.control.take(), "it is taken");
    device.control.give_back();
    let bases = driver.stop_queues();
    assert!(!device.control.take(), "it does not run");
    driver.resume_queues(bases);
    assert!(device.control.take());
    device.control.give_back();
    device.control.inject(&["map=nomem".parse().unwrap()]);
    assert!(!device.control.take(), "its answers may be late");
    assert_eq!(driver.map(1, 0, PAGE - 1, 0x20_0000, READ), NOMEM);
}

#[test]
fn a_queue_that_is_stopped_or_reset_while_taken_is_served_when_it_runs_again() {
    let (device, mut driver, _) = idle();
    assert!(device.control.take());
    let bases = driver.stop_queues();
    // As during a pause: what is kicked now waits.
    let writable = send(&mut driver, 0);
    assert!(!device.control.look());
    driver.resume_queues(bases);
    assert_eq!(answer(&mut driver, &writable), OK);
    device.control.give_back();
    assert_eq!(driver.map(1, PAGE, 2 * PAGE - 1, 0x20_0000, READ), OK);

    assert!(device.control.take());
    driver.reset();
    assert!(!device.control.look());
    device.control.give_back();
    assert_eq!(driver.attach(1, EP), OK);
}

#[test]
fn a_frontend_that_leaves_while_its_queue_is_taken_leaves_it_to_the_next() {
    let (device, driver, _) = idle();
    let (control, done) = (device.control.clone(), AtomicBool::new(false));
    assert!(control.take());
    thread::scope(|scope| {
        let looking = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                control.look();
            }
        });
        drop(driver);
        let mut next = Driver::new(&device);
        for _ in 0..100 {
            assert_eq!(next.attach(1, EP), OK);
        }
        done.store(true, Ordering::Relaxed);
        looking.join().unwrap();
        control.give_back();
        assert_eq!(next.attach(1, EP), OK);
        assert!(control.take());
        drop(next);
        // Nobody is connected any more.
        eventually("the end of the connection", || {
            control.look();
            control.give_back();
            !control.take()
        });
    });
}

#[test]
fn who_serves_an_unmap_may_have_used_the_mapping_itself() {
    let (device, mut driver, _) = idle();
    let mut dma = driver.dma(&device, EP);
    for _ in 0..100 {
        assert_eq!(driver.map(1, 0, PAGE - 1, 0x20_0000, READ), OK);
        dma.read(0, &mut [0; 64]).unwrap();
        assert!(device.control.take());
        let (_, writable) = driver.add(REQUESTS, &[Part::R(unmap(1, 0, PAGE - 1).bytes()), Part::W(4)]);
        driver.kick(REQUESTS);
        assert!(device.control.look());
        assert_eq!(answer(&mut driver, &writable), OK);
        device.control.give_back();
        dma.read(0, &mut [0; 64]).unwrap_err();
    }
}
