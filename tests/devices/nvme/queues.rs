//! Queues: how they are made, filled and emptied.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::nvme::READ;
use viommu_testkit::nvme::{Driver, RAM, Setup, Sqe, io};

#[test]
fn queues_are_created_and_deleted_in_order() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    driver.enable();
    let (sq, cq) = (driver.pages(16), driver.pages(4));
    const CONTIGUOUS: u32 = 1;
    for (id, size, at, cdw11, status) in [
        (0, 16, cq, CONTIGUOUS, 0x101),
        (17, 16, cq, CONTIGUOUS, 0x101),
        (1, 1, cq, CONTIGUOUS, 0x102),
        (1, 1025, cq, CONTIGUOUS, 0x102),
        (1, 16, cq, 0, 0x02),
        (1, 16, cq + 16, CONTIGUOUS, 0x13),
        (1, 16, cq, CONTIGUOUS | 0b10 | 17 << 16, 0x108),
        (1, 1024, cq, CONTIGUOUS | 0b10 | 16 << 16, 0),
        (1, 16, cq, CONTIGUOUS, 0x101),
    ] {
        assert_eq!(driver.create_cq(id, size, at, cdw11), status, "CQ {id} of {size}, {cdw11:#x}");
    }
    for (id, size, at, cdw11, status) in [
        (1, 16, sq, CONTIGUOUS, 0x101),
        (1, 16, sq, CONTIGUOUS | 2 << 16, 0x100),
        (0, 16, sq, CONTIGUOUS | 1 << 16, 0x101),
        (17, 16, sq, CONTIGUOUS | 1 << 16, 0x101),
        (1, 1, sq, CONTIGUOUS | 1 << 16, 0x102),
        (1, 1025, sq, CONTIGUOUS | 1 << 16, 0x102),
        (1, 16, sq, 1 << 16, 0x02),
        (1, 16, sq + 64, CONTIGUOUS | 1 << 16, 0x13),
        (1, 1024, sq, CONTIGUOUS | 1 << 16, 0),
        (1, 1024, sq, CONTIGUOUS | 1 << 16, 0x101),
    ] {
        assert_eq!(driver.create_sq(id, size, at, cdw11), status, "SQ {id} of {size}, {cdw11:#x}");
    }
    assert_eq!(driver.set_feature(7, 3 << 16 | 3).status, 0x0c, "too late to say how many");
    assert_eq!(driver.delete_cq(1), 0x10c, "its submission queue is there");
    assert_eq!(driver.delete_cq(0), 0x101);
    assert_eq!(driver.delete_sq(2), 0x101);
    assert_eq!(driver.delete_sq(0), 0x101);
    assert_eq!(driver.delete_sq(1), 0);
    assert_eq!(driver.delete_sq(1), 0x101);
    assert_eq!(driver.delete_cq(1), 0);
    assert_eq!(driver.delete_cq(1), 0x101);
}

/// Keeps a queue as full as it can be, and checks that every command completes once.
fn saturate(driver: &mut Driver, queues: &[u16], commands: usize, sqe: Sqe) {
    let mut waiting: Vec<HashSet<u16>> = queues.iter().map(|_| HashSet::new()).collect();
    let mut left: Vec<usize> = queues.iter().map(|_| commands).collect();
    while left.iter().any(|left| *left > 0) || waiting.iter().any(|waiting| !waiting.is_empty()) {
        for (index, queue) in queues.iter().enumerate() {
            let room = driver.queues[queue].sq_size as usize - 1 - waiting[index].len();
            let now = room.min(left[index]);
            for _ in 0..now {
                let cid = driver.put(*queue, sqe);
                assert!(waiting[index].insert(cid));
            }
            if now > 0 {
                left[index] -= now;
                driver.ring(*queue);
            }
            let mut any = false;
            while let Some(done) = driver.reap(*queue) {
                any = true;
                assert_eq!((done.status, done.sq_id), (0, *queue));
                assert!(waiting[index].remove(&done.cid), "{done:?} was not waiting");
            }
            if any {
                driver.ring_head(*queue);
            } else {
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn eight_deep_queue_pairs_work_at_once() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    driver.enable();
    let queues: Vec<u16> = (1..=8).collect();
    for queue in &queues {
        driver.create_pair(*queue, 1024, 1024);
    }
    let page = driver.pages(1);
    saturate(&mut driver, &queues, 2500, io(READ, 0, 8, [page, 0]));
    assert_eq!(setup.disk.counters.io_count.load(Ordering::Relaxed), 8 * 2500);
}

#[test]
fn a_full_completion_queue_loses_nothing() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    driver.enable();
    driver.create_pair(1, 64, 4);
    let page = driver.pages(1);
    saturate(&mut driver, &[1], 500, io(READ, 0, 1, [page, 0]));
    // The queue pair can be deleted even while it is full.
    for _ in 0..20 {
        driver.put(1, io(READ, 0, 1, [page, 0]));
    }
    driver.ring(1);
    let begun = Instant::now();
    let mut posted = 0;
    while posted < 3 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{posted} of the 3 completions that there is room for");
        posted += u32::from(driver.reap(1).is_some());
    }
    assert_eq!(driver.delete_sq(1), 0);
    assert_eq!(driver.delete_cq(1), 0);
}

#[test]
fn shadow_doorbells_replace_registers() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    driver.enable();
    driver.create_pair(1, 32, 32);
    let page = driver.pages(1);
    driver.command(1, io(READ, 0, 1, [page, 0]));
    let shadow = (driver.pages(1), driver.pages(1));
    let config = |doorbells, event_indexes| Sqe { opcode: 0x7c, data: [doorbells, event_indexes], ..Sqe::default() };
    assert_eq!(driver.admin(config(0, 0)).status, 0x02);
    assert_eq!(driver.admin(config(shadow.0 + 8, shadow.1)).status, 0x13);
    assert_eq!(driver.admin(config(RAM, shadow.1)).status, 0x04);
    assert_eq!(driver.admin(config(shadow.0, shadow.1)).status, 0);
    assert_eq!(driver.read_ram(shadow.0 + 8, 8), [1, 0, 0, 0, 1, 0, 0, 0], "what the registers were");
    driver.shadow = Some(shadow);
    for _ in 0..200 {
        assert_eq!(driver.command(1, io(READ, 0, 1, [page, 0])).status, 0);
    }
    // A queue pair that is created later has shadows too.
    driver.create_pair(2, 1024, 16);
    saturate(&mut driver, &[1, 2], 5000, io(READ, 0, 1, [page, 0]));
    // A wrong value is an event, and the queue goes on.
    let request = driver.put(0, Sqe { opcode: 0x0c, ..Sqe::default() });
    driver.ring(0);
    let tail = driver.read_ram(shadow.0 + 8, 4);
    driver.write_ram(shadow.0 + 8, &999u32.to_le_bytes());
    driver.write32(0x1000 + 8, 0);
    assert_eq!(driver.wait(0).cid, request);
    driver.write_ram(shadow.0 + 8, &tail);
    assert_eq!(driver.command(1, io(READ, 0, 1, [page, 0])).status, 0);
    // A reset ends it.
    driver.disable();
    driver.enable();
    driver.create_pair(1, 16, 16);
    driver.write_ram(shadow.0, &[0xff; 64]);
    assert_eq!(driver.command(1, io(READ, 0, 1, [page, 0])).status, 0);
}

#[test]
fn shadow_doorbells_that_move_begin_with_the_old_values() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    driver.enable();
    driver.create_pair(1, 32, 4);
    let page = driver.pages(1);
    let read = io(READ, 0, 1, [page, 0]);
    for round in 1..=3 {
        // The shadows begin with the values of the registers.
        let shadow = (driver.pages(1), driver.pages(1));
        let config = Sqe { opcode: 0x7c, data: [shadow.0, shadow.1], ..Sqe::default() };
        assert_eq!(driver.admin(config).status, 0);
        let pair = &driver.queues[&1];
        let told = [pair.tail, pair.head].map(u32::to_le_bytes).concat();
        assert_eq!(driver.read_ram(shadow.0 + 8, 8), told, "round {round}");
        driver.shadow = Some(shadow);
        for _ in 0..25 {
            assert_eq!(driver.command(1, read).status, 0);
        }
    }
    // They may move while completions wait for room: an acknowledgement is seen in the new place.
    let pair = &driver.queues[&1];
    let last = pair.cq + u64::from((pair.head + 2) % 4) * 16 + 14;
    let phase = |driver: &Driver| driver.read_ram(last, 1)[0] & 1;
    let (begun, before) = (Instant::now(), phase(&driver));
    for _ in 0..12 {
        driver.put(1, read);
    }
    driver.ring(1);
    while phase(&driver) == before {
        assert!(begun.elapsed() < Duration::from_secs(60), "the completion queue does not get full");
    }
    let shadow = (driver.pages(1), driver.pages(1));
    assert_eq!(driver.admin(Sqe { opcode: 0x7c, data: [shadow.0, shadow.1], ..Sqe::default() }).status, 0);
    driver.shadow = Some(shadow);
    for _ in 0..12 {
        assert_eq!(driver.wait(1).status, 0);
    }
}
