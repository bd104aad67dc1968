//! Memory that is allocated and freed, and must not grow.

use super::daemon::*;
use viommu_testkit::frontend;
use viommu_testkit::memfd;
use viommu_testkit::nvme::{self, io};
use viommu_trace::{Reader, Subscription};

/// How much the daemon may grow once everything has happened often enough.
const GROWTH: u64 = 4 << 20;

/// Mappings that are made and removed, by two events each, until the trace holds as many past events as it keeps: the last
/// 131,072, in 9 MiB. In a short run they stay few.
const FILL: u64 = 66_000;

/// Fills what the trace keeps, so that its growth to that size is not taken for a leak.
fn fill_history(daemon: &Daemon) {
    let mut driver = frontend::Driver::started(&daemon.socket("viommu.sock"), u64::MAX);
    assert_eq!(driver.attach(1, IDLE[0]), frontend::OK);
    for _ in 0..amount(0, FILL) {
        assert_eq!(driver.map(1, 0, 0xfff, 0x5000, frontend::READ), frontend::OK);
        assert_eq!(driver.unmap(1, 0, 0xfff), frontend::OK);
    }
}

/// Does something `count` times, and compares the memory after `warm` times and at the end.
fn stays_flat(daemon: &Daemon, warm: u64, count: u64, mut something: impl FnMut()) {
    fill_history(daemon);
    (0..warm).for_each(|_| something());
    let before = daemon.resident();
    (warm..count).for_each(|_| something());
    let after = daemon.resident();
    println!("{before} bytes after {warm}, {after} after {count}");
    assert!(after <= before + GROWTH, "{before} bytes after {warm}, {after} after {count}");
}

#[test]
fn controllers_that_are_enabled_and_disabled() {
    let daemon = Daemon::start();
    let mut driver = nvme::Driver::new(daemon.client("nvme0.sock"), memfd(nvme::RAM), nvme::PAGE);
    stays_flat(&daemon, amount(200, 1000), amount(600, 31_000), || {
        driver.free = nvme::PAGE;
        driver.enable();
        driver.create_pair(1, 64, 64);
        let page = driver.pages(1);
        assert_eq!(driver.command(1, io(2, 0, 8, [page, 0])).status, 0);
        driver.disable();
    });
    drop(driver);
    daemon.end();
}

#[test]
fn clients_of_the_trace() {
    let daemon = Daemon::start();
    let socket = daemon.socket("trace.sock");
    stays_flat(&daemon, amount(500, 1000), amount(2_000, 101_000), || {
        drop(Reader::connect(&socket, &Subscription::default()).unwrap());
    });
    daemon.end();
}

#[test]
fn frontends_that_come_and_go() {
    let daemon = Daemon::start();
    let socket = daemon.socket("viommu.sock");
    stays_flat(&daemon, amount(100, 1000), amount(400, 11_000), || {
        let mut driver = frontend::Driver::started(&socket, u64::MAX);
        assert_eq!(driver.attach(1, NVME[0]), frontend::OK);
        assert_eq!(driver.map(1, 0, 0xfff, 0x5000, frontend::READ), frontend::OK);
    });
    daemon.end();
}
