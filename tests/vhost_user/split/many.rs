//! Very many reservations.

use std::time::Instant;

use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_wire::split::request_type;

/// A tenth of the number for which there is room: a debug build needs a second or two for them.
const COUNT: u64 = 400_000;
/// How many are made in one batch.
const BATCH: u64 = 100;
/// Above what is reserved for MSIs.
const START: u64 = 1 << 32;

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

/// A DETACH from very many reservations leaves them as they are, so it takes no longer than one from few. What MAP
/// mapped is removed, wherever it lies.
#[test]
fn a_detach_from_very_many_reservations_takes_no_time_for_each() {
    let (device, mut driver) = attached();
    let behind = START + 2 * COUNT * PAGE;
    for address in [0, START + PAGE, behind] {
        assert_eq!(driver.map(1, address, address + PAGE - 1, 0x20_0000, READ), OK);
    }
    reserve_all(&mut driver);
    let begun = Instant::now();
    assert_eq!(driver.detach(1, EP), OK);
    let took = begun.elapsed();
    let stats = device.iommu.stats();
    assert_eq!((stats.reservations_live, stats.mappings_live), (COUNT, 0));
    // To free them took a debug build a tenth of a second.
    println!("DETACH from {COUNT} reservations took {took:?}");
    let begun = Instant::now();
    driver.reset();
    // The device has seen the reset when it answers.
    assert_eq!(driver.detach(1, EP), INVAL);
    println!("the reset that ended them took {:?}", begun.elapsed());
    assert_eq!(device.iommu.stats().reservations_live, 0);
}
