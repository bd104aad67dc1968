//! As many reservations as there is room for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use viommu::iommu::Request;
use viommu::wire::split::request_type;
use viommu::wire::virtio_iommu::Status;

use crate::common::frontend::*;
use crate::requests::*;

/// A tenth of what there is room for: a debug build needs a second or two for them.
const COUNT: u64 = 400_000;
/// How many are made at once.
const BATCH: u64 = 100;
/// Above what is reserved for MSIs.
const START: u64 = 1 << 32;
/// [`EP2`]'s domain.
const OTHER: u32 = 2;

/// RESERVE of a page each, every other page of domain 1 from [`START`] on.
fn reserve_all(driver: &mut Driver) {
    for first in (0..COUNT).step_by(BATCH as usize) {
        let chains: Vec<_> = (first..first + BATCH)
            .map(|number| {
                let start = START + 2 * number * PAGE;
                let request = range(request_type::RESERVE, 1, start, start + PAGE - 1, 0);
                driver.add(REQUESTS, &[Part::R(request.bytes()), Part::W(4)])
            })
            .collect();
        driver.kick(REQUESTS);
        for (_, writable) in chains {
            let (_, len) = driver.wait_used(REQUESTS);
            assert_eq!(driver.collect(len, &writable).status(), OK);
        }
    }
}

/// Does `step` again and again. Returns how often, and the longest that it took; of those alone that began after `begun` was set.
fn repeat(begun: &AtomicBool, ended: &AtomicBool, mut step: impl FnMut(u64)) -> (u64, Duration) {
    let (mut number, mut count, mut longest) = (0, 0, Duration::ZERO);
    while !ended.load(Ordering::Acquire) {
        let counts = begun.load(Ordering::Acquire);
        let now = Instant::now();
        step(number);
        number += 1;
        if counts {
            count += 1;
            longest = longest.max(now.elapsed());
        }
    }
    (count, longest)
}

/// How long DETACH took; what [`repeat`] found of the accesses of another endpoint, and of requests for its domain.
type Found = (Duration, (u64, Duration), (u64, Duration));

fn detach_beside_others() -> Found {
    let (device, mut driver) = attached();
    assert_eq!(driver.attach(OTHER, EP2), OK);
    assert_eq!(driver.map(OTHER, 0, PAGE - 1, 0x20_0000, READ), OK);
    reserve_all(&mut driver);
    assert_eq!(device.iommu.counters().reservations_live, COUNT);
    let mut dma = driver.dma(&device, EP2);
    let (begun, ended, ready) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let (took, accesses, requests) = thread::scope(|scope| {
        let accesses = scope.spawn(|| {
            repeat(&begun, &ended, |_| {
                dma.read(0, &mut [0; 8]).unwrap();
                ready.fetch_or(1, Ordering::Relaxed);
            })
        });
        // There is one request queue, so others can only be given to the device where the queue's thread gives its own.
        let requests = scope.spawn(|| {
            repeat(&begun, &ended, |number| {
                let start = START + number * PAGE;
                let map = map(OTHER, start, start + PAGE - 1, 0x20_0000, READ).bytes();
                let map = Request::parse(&map, device.iommu.features()).unwrap();
                // No room is an answer too.
                let status = device.iommu.execute(&map, &mut []).status;
                assert!(matches!(status, Status::Ok | Status::NoMem), "{status:?}");
                ready.fetch_or(2, Ordering::Relaxed);
            })
        });
        eventually("an access and a request", || ready.load(Ordering::Relaxed) == 3);
        begun.store(true, Ordering::Release);
        let now = Instant::now();
        let status = driver.detach(1, EP);
        let took = now.elapsed();
        ended.store(true, Ordering::Release);
        assert_eq!(status, OK);
        (took, accesses.join().unwrap(), requests.join().unwrap())
    });
    assert_eq!(device.iommu.counters().reservations_live, 0);
    (took, accesses, requests)
}

/// They are freed for as long as DETACH takes, and nobody else waits for that: neither accesses nor requests.
#[test]
fn a_detach_that_ends_very_many_reservations_holds_up_nobody_else() {
    // Who shares a busy processor may not get it meanwhile.
    let alone = (0..8).any(|round| {
        let (took, accesses, requests) = detach_beside_others();
        println!(
            "round {round}: DETACH of {COUNT} reservations took {took:?}; meanwhile {} accesses, {:?} at most, and {} \
             requests, {:?} at most",
            accesses.0, accesses.1, requests.0, requests.1
        );
        [accesses, requests].iter().all(|(count, longest)| *count > 10 && *longest < took / 2)
    });
    assert!(alone, "all of them wait");
}
