//! An image that is truncated while it is in use.

use std::fs::OpenOptions;

use super::daemon::*;
use viommu_testkit::memfd;
use viommu_testkit::nvme::{self, io};

const READ: u8 = 2;
/// Media and data integrity errors: Unrecovered Read Error.
const UNRECOVERED: u16 = 0x281;
const IMAGE: u64 = 16 << 20;

#[test]
fn an_image_that_gets_shorter_fails_reads_and_nothing_else() {
    let daemon = Daemon::start();
    let mut driver = nvme::Driver::new(daemon.client("nvme0.sock"), memfd(nvme::RAM), nvme::PAGE);
    driver.enable();
    driver.create_pair(1, 64, 64);
    let page = driver.pages(1);
    let image = OpenOptions::new().write(true).open(daemon.socket("nvme0.img")).unwrap();
    let last = IMAGE / 512 - 8;
    for _ in 0..amount(3, 300) {
        image.set_len(IMAGE).unwrap();
        assert_eq!(driver.command(1, io(READ, last, 8, [page, 0])).status, 0);
        // While reads are in flight.
        (0..40).for_each(|at| _ = driver.put(1, io(READ, last - at * 8, 8, [page, 0])));
        driver.ring(1);
        image.set_len(IMAGE / 2).unwrap();
        (0..40).for_each(|_| assert!([0, UNRECOVERED].contains(&driver.wait(1).status)));
        assert_eq!(driver.command(1, io(READ, last, 8, [page, 0])).status, UNRECOVERED);
        assert_eq!(driver.command(1, io(READ, 0, 8, [page, 0])).status, 0);
    }
    drop(driver);
    daemon.end();
}
