//! Very many reservations.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use viommu::iommu::Request;
use viommu_testkit::StopOnDrop;
use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_wire::split::request_type;
use viommu_wire::virtio_iommu::Status;

/// A tenth of the number for which there is room: a debug build needs a second or two for them.
const COUNT: u64 = 400_000;
/// How many are made in one batch.
const BATCH: u64 = 100;
/// Above what is reserved for MSIs.
const START: u64 = 1 << 32;
/// [`EP2`]'s domain.
const OTHER: u32 = 2;

/// Sends a RESERVE for every other page of domain 1 from [`START`] on.
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

/// Does a request, on this thread.
fn execute(device: &Device, request: &[u8]) -> Status {
    let request = Request::parse(request, device.iommu.features()).unwrap();
    device.iommu.execute(&request, &mut []).status
}

/// Whether accesses of another endpoint, and requests for its domain, were done in the first half of the time in which
/// DETACH frees reservations. Everything except the RESERVEs is done here and not by the queue's thread: there is one
/// request queue, and a thread that waits for its answer would take a processor from the threads under test.
fn others_go_on() -> bool {
    let (device, mut driver) = attached();
    assert_eq!(driver.attach(OTHER, EP2), OK);
    assert_eq!(driver.map(OTHER, 0, PAGE - 1, 0x20_0000, READ), OK);
    reserve_all(&mut driver);
    assert_eq!(device.iommu.stats().reservations_live, COUNT);
    let mut dma = driver.dma(&device, EP2);
    let ended = AtomicBool::new(false);
    let (asked, answered, (freeing, steps)) = thread::scope(|scope| {
        let others = scope.spawn(|| {
            let (mut freeing, mut steps) = (None, Vec::new());
            while !ended.load(Ordering::Acquire) {
                if device.iommu.stats().reservations_live == 0 {
                    freeing.get_or_insert_with(Instant::now);
                }
                let begun = Instant::now();
                dma.read(0, &mut [0; 8]).unwrap();
                let start = START + steps.len() as u64 * PAGE;
                let status = execute(&device, &map(OTHER, start, start + PAGE - 1, 0x20_0000, READ).bytes());
                // NOMEM is an answer too.
                assert!(matches!(status, Status::Ok | Status::NoMem), "{status:?}");
                steps.push((begun, Instant::now()));
            }
            (freeing, steps)
        });
        let end = StopOnDrop(&ended);
        let asked = Instant::now();
        let status = execute(&device, &detach(1, EP).bytes());
        let answered = Instant::now();
        drop(end);
        assert_eq!(status, Status::Ok);
        (asked, answered, others.join().unwrap())
    });
    assert_eq!(device.iommu.stats().reservations_live, 0);
    let Some(begun) = freeing.filter(|begun| *begun < answered) else { return false };
    let half = begun + (answered - begun) / 2;
    let done = steps.iter().filter(|step| step.0 >= begun && step.1 <= half).count();
    println!(
        "DETACH of {COUNT} reservations took {:?}; in the first half of the {:?} in which they were freed there were {done} \
         accesses, and as many requests",
        answered - asked,
        answered - begun
    );
    done > 10
}

/// DETACH takes long to free them, and nothing else waits for that: neither accesses nor requests.
#[test]
fn a_detach_that_ends_very_many_reservations_delays_nobody_else() {
    // A thread that shares a busy processor may not run meanwhile, so a round may show nothing. But if the others had
    // to wait, no round would.
    let rounds = (1..=20).scan(0, |shown, _| {
        *shown += u32::from(others_go_on());
        Some(*shown)
    });
    assert!(rounds.into_iter().any(|shown| shown == 3), "others did not go on in 3 of 20 rounds");
}
