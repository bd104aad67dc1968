//! Reservations and tables up to the budget, repeatedly: the number is the same each time, and all memory comes back.

use super::daemon::amount;
use viommu::iommu::Limits;
use viommu_testkit::frontend::split::{link_bytes, range};
use viommu_testkit::frontend::*;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_wire::split::request_type::*;

const PAGE: u64 = 4096;
/// Far enough apart that each page needs tables of its own.
const STRIDE: u64 = 1 << 21;
const BATCH: u64 = 100;

/// Sends requests, many at a time, until one is answered NOMEM. Returns how many succeeded.
fn until_full(driver: &mut Driver, request: impl Fn(u64) -> Vec<u8>) -> u64 {
    let mut done = 0;
    loop {
        let chains: Vec<_> = (done..done + BATCH)
            .map(|number| driver.add_indirect(REQUESTS, &[Part::R(request(number)), Part::W(4)]))
            .collect();
        driver.kick(REQUESTS);
        let mut is_full = false;
        for (_, writable) in chains {
            let (_, len) = driver.wait_used(REQUESTS);
            match driver.collect(len, &writable).status() {
                OK => done += 1,
                NOMEM => is_full = true,
                other => panic!("answered {other}"),
            }
        }
        if is_full {
            return done;
        }
    }
}

/// The ways to end everything in a domain.
const ENDS: [fn(&Device, Driver) -> Driver; 3] = [
    |_, mut driver| {
        assert_eq!(driver.detach(1, EP), OK);
        driver
    },
    |_, mut driver| {
        assert_eq!(driver.attach(2, EP), OK);
        driver
    },
    |device, driver| {
        drop(driver);
        Driver::new(device)
    },
];

#[test]
fn the_budget_is_the_same_in_each_lap() {
    let table_bytes = amount(1 << 20, 64 << 20);
    let limits = Limits { table_bytes, ..Limits::default() };
    let device = Device::with(|settings| settings.limits = limits);
    let mut driver = Driver::new(&device);
    let mut laps = Vec::new();
    for end in ENDS.iter().cycle().take(6) {
        assert_eq!(driver.attach(1, EP), OK);
        let reserved = until_full(&mut driver, |number| {
            // Above the addresses that are reserved for interrupts.
            let start = (1 << 40) + number * 2 * PAGE;
            range(RESERVE, 1, start, start + PAGE - 1, 0).bytes()
        });
        driver = end(&device, driver);
        assert_eq!(device.iommu.stats().reservations_live, 0);

        assert_eq!(driver.attach(1, EP), OK);
        let base = 1 << 40;
        let whole = range(RESERVE, 1, base, base + (1 << 39) - 1, 0);
        assert_eq!(driver.request(&whole), OK);
        let linked = until_full(&mut driver, |number| link_bytes(1, base + number * STRIDE, &[(0, 1)], READ, 0));
        driver = end(&device, driver);
        assert_eq!(device.iommu.stats().linked_bytes, 0);
        laps.push((reserved, linked));
    }
    println!("reservations and tables of {table_bytes} bytes: {laps:?}");
    assert!(laps[0].0 > 1000 && laps[0].1 > 10, "{laps:?}");
    assert!(laps.iter().all(|lap| *lap == laps[0]), "{laps:?}");
    wait_until(PATIENCE, "the end of the last tables", || {
        device.iommu.synchronize();
        device.iommu.stats().table_bytes == 0
    });
}
