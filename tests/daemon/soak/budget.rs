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

/// The first and the last address of a reservation.
type Reserved = (u64, u64);

/// Ends all reservations, which are those given.
type End = fn(&Device, Driver, Vec<Reserved>) -> Driver;

const ENDS: [End; 3] = [
    |_, mut driver, reserved| {
        // They outlive their last endpoint.
        assert_eq!(driver.detach(1, EP), OK);
        for (start, end) in reserved {
            assert_eq!(driver.request(&range(RELEASE, 1, start, end, 0)), OK);
        }
        driver
    },
    |_, mut driver, _| {
        driver.reset();
        // The device has seen the reset when it answers.
        assert_eq!(driver.detach(1, EP), INVAL);
        driver
    },
    |device, driver, _| {
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
        // Above the addresses that are reserved for interrupts.
        let page = |number| ((1 << 40) + number * 2 * PAGE, (1 << 40) + number * 2 * PAGE + PAGE - 1);
        let reserved = until_full(&mut driver, |number| {
            let (start, end) = page(number);
            range(RESERVE, 1, start, end, 0).bytes()
        });
        driver = end(&device, driver, (0..reserved).map(page).collect());
        assert_eq!(device.iommu.stats().reservations_live, 0);

        assert_eq!(driver.attach(1, EP), OK);
        let base = 1 << 40;
        let whole = (base, base + (1 << 39) - 1);
        assert_eq!(driver.request(&range(RESERVE, 1, whole.0, whole.1, 0)), OK);
        let linked = until_full(&mut driver, |number| link_bytes(1, base + number * STRIDE, &[(0, 1)], READ, 0));
        driver = end(&device, driver, vec![whole]);
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
