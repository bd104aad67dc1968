//! Asynchronous events, log pages and interrupts.

use crate::nvme::{READ, WRITE};
use viommu_testkit::nvme::{Setup, Sqe, io};

#[test]
fn events_are_reported_once_until_their_log_is_read() {
    const AER: Sqe = Sqe { opcode: 0x0c, flags: 0, nsid: 0, data: [0; 2], cdw10: 0, cdw11: 0, cdw12: 0, cdw13: 0 };
    let setup = Setup::new();
    let mut driver = setup.ready();
    let requests: Vec<u16> = (0..4).map(|_| driver.put(0, AER)).collect();
    assert_eq!(driver.admin(AER).status, 0x105, "no more than four");
    // A doorbell of a queue that does not exist, and then a value that is too large: one event.
    driver.write32(0x1000 + 8 * 5, 1);
    let done = driver.wait(0);
    assert_eq!((done.cid, done.status, done.result), (requests[0], 0, 0x01_00_00));
    driver.write32(0x1000 + 8, 64);
    assert_eq!(driver.identify(1, 0, 0).map(drop), Ok(()), "no event before the log was read");
    driver.log_page(1, 0, 64).unwrap();
    let done = driver.wait(0);
    assert_eq!((done.cid, done.status, done.result), (requests[1], 0, 0x01_01_00));
    // A threshold below the temperature, after that event was enabled.
    driver.set_feature(4, 300);
    driver.set_feature(0x0b, 0b10);
    let done = driver.wait(0);
    assert_eq!((done.cid, done.status, done.result), (requests[2], 0, 0x02_01_01));
    assert_eq!(driver.log_page(2, 0, 512).unwrap()[0], 0b10);
    // The last one is aborted.
    let abort = |cid: u16, queue: u32| Sqe { opcode: 8, cdw10: u32::from(cid) << 16 | queue, ..Sqe::default() };
    driver.set_feature(4, 340);
    let cid = driver.put(0, abort(requests[3], 0));
    driver.ring(0);
    let (first, second) = (driver.wait(0), driver.wait(0));
    assert_eq!((first.cid, first.status), (requests[3], 0x07));
    assert_eq!((second.cid, second.status, second.result), (cid, 0, 0));
    assert_eq!(driver.admin(abort(requests[3], 0)).result, 1, "it is gone");
    assert_eq!(driver.admin(abort(77, 1)).result, 1);
}

#[test]
fn log_pages_count() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    let page = driver.pages(1);
    for lba in 0..3 {
        assert_eq!(driver.command(1, io(READ, lba, 8, [page, 0])).status, 0);
        assert_eq!(driver.command(1, io(WRITE, lba, 8, [page, 0])).status, 0);
    }
    let health = driver.log_page(2, 0, 512).unwrap();
    assert_eq!(health[64..72], 3u64.to_le_bytes());
    assert_eq!(health[80..88], 3u64.to_le_bytes());
    assert_eq!(health[32..40], 1u64.to_le_bytes(), "the first thousand of units");
    assert_eq!(driver.log_page(2, 64, 8).unwrap(), 3u64.to_le_bytes());
    assert_eq!(driver.log_page(3, 0, 512).unwrap()[0], 1);
    let effects = driver.log_page(5, 0, 4096).unwrap();
    assert_eq!(effects[4 * 6..4 * 7], [1, 0, 0, 0], "Identify");
    assert_eq!(effects[1024 + 4..1024 + 8], [3, 0, 0, 0], "Write");
    assert_eq!(effects[1024 + 4 * 0x0d], 0);
    assert_eq!(driver.log_page(0x7f, 0, 512), Err(0x109));
    assert_eq!(driver.log_page(2, 600, 4), Err(0x02));
    assert_eq!(driver.log_page(2, 2, 4), Err(0x02));
}

#[test]
fn interrupts_follow_completions() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    driver.enable();
    driver.create_pair(1, 64, 64);
    let page = driver.pages(1);
    let _ = driver.events[0].read();
    for _ in 0..10 {
        driver.command(1, io(READ, 0, 8, [page, 0]));
        // The interrupt comes after the completion is in memory.
        while driver.events[1].read().is_err() {}
    }
    assert!(driver.events[2].read().is_err());
    // A completion queue without interrupts.
    let (sq, cq) = (driver.pages(1), driver.pages(1));
    driver.add_pair(2, sq, 16, cq, 16);
    assert_eq!(driver.create_cq(2, 16, cq, 2 << 16 | 1), 0);
    assert_eq!(driver.create_sq(2, 16, sq, 2 << 16 | 1), 0);
    driver.command(2, io(READ, 0, 8, [page, 0]));
    assert_eq!(driver.delete_sq(2), 0);
    assert!(driver.events[2].read().is_err());
}
