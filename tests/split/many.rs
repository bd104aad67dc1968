//! As many reservations as there is room for.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use viommu::iommu::Request;
use viommu_wire::split::request_type;
use viommu_wire::virtio_iommu::Status;

use crate::common::Ends;
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

/// When a step began and when it ended.
type Step = (Instant, Instant);

/// Does `step` again and again until `ended`.
fn repeat(ended: &AtomicBool, mut step: impl FnMut(u64)) -> Vec<Step> {
    let mut steps = Vec::new();
    while !ended.load(Ordering::Acquire) {
        let begun = Instant::now();
        step(steps.len() as u64);
        steps.push((begun, Instant::now()));
    }
    steps
}

/// Whether accesses of another endpoint, and requests for its domain, were done in the first half of the time for which DETACH
/// frees reservations.
fn others_go_on() -> bool {
    let (device, mut driver) = attached();
    assert_eq!(driver.attach(OTHER, EP2), OK);
    assert_eq!(driver.map(OTHER, 0, PAGE - 1, 0x20_0000, READ), OK);
    reserve_all(&mut driver);
    assert_eq!(device.iommu.counters().reservations_live, COUNT);
    let mut dma = driver.dma(&device, EP2);
    let (ended, freeing) = (AtomicBool::new(false), OnceLock::new());
    let (asked, answered, accesses, requests) = thread::scope(|scope| {
        let accesses = scope.spawn(|| {
            repeat(&ended, |_| {
                if device.iommu.counters().reservations_live == 0 {
                    freeing.get_or_init(Instant::now);
                }
                dma.read(0, &mut [0; 8]).unwrap();
            })
        });
        // There is one request queue, so others can only be given to the device where the queue's thread gives its own.
        let requests = scope.spawn(|| {
            repeat(&ended, |number| {
                let start = START + number * PAGE;
                let map = map(OTHER, start, start + PAGE - 1, 0x20_0000, READ).bytes();
                let map = Request::parse(&map, device.iommu.features()).unwrap();
                // No room is an answer too.
                let status = device.iommu.execute(&map, &mut []).status;
                assert!(matches!(status, Status::Ok | Status::NoMem), "{status:?}");
            })
        });
        let end = Ends(&ended);
        let asked = Instant::now();
        let status = driver.detach(1, EP);
        let answered = Instant::now();
        drop(end);
        assert_eq!(status, OK);
        (asked, answered, accesses.join().unwrap(), requests.join().unwrap())
    });
    assert_eq!(device.iommu.counters().reservations_live, 0);
    let Some(&begun) = freeing.get().filter(|begun| **begun < answered) else { return false };
    let half = begun + (answered - begun) / 2;
    let [accesses, requests] =
        [accesses, requests].map(|steps| steps.iter().filter(|step| step.0 >= begun && step.1 <= half).count());
    println!(
        "DETACH of {COUNT} reservations took {:?}; in the first half of the {:?} in which they were freed there were \
         {accesses} accesses and {requests} requests",
        answered - asked,
        answered - begun
    );
    accesses > 10 && requests > 10
}

/// They are freed for as long as DETACH takes, and nobody else waits for that: neither accesses nor requests.
#[test]
fn a_detach_that_ends_very_many_reservations_holds_up_nobody_else() {
    // Who shares a busy processor may not get it meanwhile.
    let rounds = (0..5).filter(|_| others_go_on()).count();
    assert!(rounds >= 3, "others went on in {rounds} of 5 rounds");
}
