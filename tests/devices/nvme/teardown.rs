//! Resets, deletions and other ends while commands are in flight: nothing is left of them.

use std::sync::atomic::Ordering;

use crate::nvme::{COMPARE, FLUSH, READ, WRITE, WRITE_ZEROES};
use viommu_testkit::nvme::{CC_ENABLED, Done, Driver, PAGE, RAM, Setup, Sqe, io, register};

/// Gives the controller `count` reads of 1 MiB into distinct memory, and a first one that is complete, so that it is
/// in the middle of them.
fn begin_reads(driver: &mut Driver, count: u64) -> (u64, usize) {
    let list = driver.pages(count + 1);
    let base = driver.pages(256 * count);
    for command in 0..count {
        let at = base + command * (1 << 20);
        driver.write_words(list + command * PAGE, &(1..256).map(|i| at + i * PAGE).collect::<Vec<u64>>());
        driver.put(1, io(READ, 0, 2048, [at, list + command * PAGE]));
    }
    driver.ring(1);
    driver.wait(1);
    (base, (count << 20) as usize)
}

/// What the controller must not touch after its reset: this memory, its old completion queue, and its old interrupt.
struct Dead {
    base: u64,
    len: usize,
    cq: u64,
}

impl Dead {
    /// From now on.
    fn new(driver: &Driver, base: u64, len: usize) -> Dead {
        let _ = driver.events[1].read();
        let dead = Dead { base, len, cq: driver.queues[&1].cq };
        driver.write_ram(base, &vec![0x55; len]);
        driver.write_ram(dead.cq, &[0x55; 1024]);
        dead
    }

    /// Makes the controller do as much work with another queue as was left in the old one, and checks that none of the
    /// old work was done meanwhile.
    fn assert(&self, driver: &mut Driver) {
        driver.create_pair(2, 64, 64);
        let (buffer, list) = (driver.pages(256), driver.pages(1));
        driver.write_words(list, &(1..256).map(|i| buffer + i * PAGE).collect::<Vec<u64>>());
        for _ in 0..self.len >> 20 {
            assert_eq!(driver.command(2, io(READ, 0, 2048, [buffer, list])).status, 0);
        }
        assert!(driver.read_ram(self.base, self.len).iter().all(|byte| *byte == 0x55));
        assert_eq!(driver.read_ram(self.cq, 1024), [0x55; 1024]);
        assert!(driver.events[1].read().is_err());
    }
}

#[test]
fn a_reset_with_commands_in_flight_leaves_nothing_behind() {
    let setup = Setup::new();
    for round in 0..6 {
        let mut driver = setup.ready();
        let (base, len) = begin_reads(&mut driver, 40);
        match round % 3 {
            0 => driver.write32(register::CC, 0),
            1 => driver.client.reset().unwrap(),
            // Initiate Function Level Reset.
            _ => driver.client.region_write(7, 0x78, &[0, 0x80]).unwrap(),
        }
        let dead = Dead::new(&driver, base, len);
        assert_eq!(driver.csts(), 0);
        driver.client.region_write(7, 4, &[6, 0]).unwrap();
        driver.enable();
        dead.assert(&mut driver);
        driver.create_pair(1, 16, 16);
        let page = driver.pages(1);
        assert_eq!(driver.command(1, io(READ, 0, 8, [page, 0])).status, 0);
    }
}

#[test]
fn a_queue_is_deleted_with_commands_in_flight() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    let (base, len) = begin_reads(&mut driver, 40);
    assert_eq!(driver.delete_sq(1), 0);
    // Commands that were fetched are complete, with success or as aborted.
    while let Some(done) = driver.reap(1) {
        assert!(matches!(done.status, 0 | 0x08), "{done:?}");
    }
    Dead::new(&driver, base, len).assert(&mut driver);
    assert_eq!(driver.delete_cq(1), 0);
}

/// Deletes a queue in the middle of a command over this many blocks of 4096 bytes. Returns how the command completed,
/// or `None` if it had not begun.
fn end_within(setup: &Setup, opcode: u8, blocks: u32, end: fn(&mut Driver)) -> Option<Done> {
    let executed = || setup.disk.counters.io_count.load(Ordering::Relaxed);
    let before = executed();
    let mut driver = setup.ready();
    let buffer = driver.pages(2048);
    let put = |driver: &mut Driver, opcode, blocks: u32| {
        driver.put(1, Sqe { flags: 1 << 6, ..io(opcode, 0, blocks, [buffer, u64::from(blocks) * PAGE]) })
    };
    // Commands that complete at once come first; then the long one begins.
    put(&mut driver, READ, 16);
    let cid = put(&mut driver, opcode, blocks);
    driver.ring(1);
    driver.wait(1);
    end(&mut driver);
    let done = driver.reap(1).unwrap();
    assert_eq!(done.cid, cid);
    (executed() == before + 2).then_some(done)
}

#[test]
fn a_long_command_is_aborted_in_the_middle() {
    const BYTES: u64 = 256 << 20;
    let setup = Setup::with(BYTES, |config| config.block_size = 4096);
    let ends: [fn(&mut Driver); 2] = [|driver| assert_eq!(driver.delete_sq(1), 0), |driver| driver.disable()];
    let transfer = 2048;
    for (opcode, blocks) in [(READ, transfer), (WRITE, transfer), (COMPARE, transfer), (WRITE_ZEROES, 1 << 16)] {
        for end in ends {
            // It may be complete already, if this thread did not get a processor.
            let aborted = (0..100).filter_map(|_| end_within(&setup, opcode, blocks, end)).any(|done| {
                assert!(matches!(done.status, 0 | 0x08), "{done:?}");
                done.status == 0x08
            });
            assert!(aborted, "command {opcode} is always completed");
        }
    }
}

#[test]
fn a_client_that_vanishes_leaves_a_controller_for_the_next() {
    let setup = Setup::new();
    for _ in 0..5 {
        let mut driver = setup.ready();
        begin_reads(&mut driver, 20);
    }
    let mut driver = setup.driver();
    assert_eq!((driver.csts(), driver.read32(register::CC)), (0, 0));
}

#[test]
fn a_queue_that_cannot_be_accessed_is_fatal() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    let page = driver.pages(1);
    // A submission queue outside of memory.
    assert_eq!(driver.create_cq(2, 16, page, 1), 0);
    assert_eq!(driver.create_sq(2, 16, RAM, 2 << 16 | 1), 0);
    driver.write32(0x1000 + 16, 1);
    driver.wait_csts(2, 2);
    driver.disable();
    driver.enable();
    // A completion queue outside of memory.
    assert_eq!(driver.create_cq(1, 16, RAM, 1), 0);
    let sq = driver.pages(1);
    driver.add_pair(1, sq, 16, page, 16);
    assert_eq!(driver.create_sq(1, 16, sq, 1 << 16 | 1), 0);
    driver.put(1, io(FLUSH, 0, 0, [0, 0]));
    driver.ring(1);
    driver.wait_csts(2, 2);
    // The admin queue outside of memory.
    driver.disable();
    driver.client.region_write(0, register::ASQ, &RAM.to_le_bytes()).unwrap();
    driver.write32(register::CC, CC_ENABLED);
    driver.write32(0x1000, 1);
    driver.wait_csts(2, 2);
    driver.disable();
    driver.enable();
    assert!(driver.identify(1, 0, 0).is_ok());
}

#[test]
fn shutdown_completes_and_a_reset_ends_it() {
    let setup = Setup::new();
    for notification in [1, 2] {
        let mut driver = setup.ready();
        let (base, len) = begin_reads(&mut driver, 20);
        driver.write32(register::CC, CC_ENABLED | notification << 14);
        driver.wait_csts(0xc, 0x8);
        let dead = Dead::new(&driver, base, len);
        assert_eq!(driver.csts(), 0x9, "still ready");
        driver.disable();
        assert_eq!(driver.csts(), 0);
        driver.write32(register::CC, 1 << 14);
        assert_eq!(driver.csts(), 0x8, "a disabled one has nothing to do");
        driver.write32(register::CC, 0);
        driver.enable();
        dead.assert(&mut driver);
    }
    drop(setup.driver());
    let unsafe_shutdowns = setup.disk.counters.unsafe_shutdowns.load(Ordering::Relaxed);
    assert!(unsafe_shutdowns >= 1, "the drivers that were dropped");
}
