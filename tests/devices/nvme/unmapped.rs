//! Commands of all kinds, while the pages of their data and queues are mapped and unmapped.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use crate::nvme::{COMPARE, DATASET_MANAGEMENT, FLUSH, READ, WRITE, WRITE_ZEROES};
use viommu::iommu::{Iommu, Request};
use viommu_testkit::Numbers;
use viommu_testkit::PATIENCE;
use viommu_testkit::frontend::{IntoBytesRequest, READ as MAP_READ, WRITE as MAP_WRITE, attach, map, unmap};
use viommu_testkit::nvme::{Driver, ENDPOINT, PAGE, Setup, Sqe, io};
use viommu_wire::virtio_iommu::Status;

/// The pages that are always mapped: the admin queue.
const FIXED: u64 = 4;
/// The number of I/O queue pairs. Each submission queue and each completion queue has a page.
const PAIRS: u16 = 2;
const ENTRIES: u32 = 64;
/// The pages that are mapped and unmapped: those of submission queues, of completion queues, and for data.
const SUBMISSION: u64 = FIXED;
const COMPLETION: u64 = SUBMISSION + PAIRS as u64;
const DATA: u64 = COMPLETION + PAIRS as u64;
const END: u64 = DATA + 96;
/// How many of them are unmapped at a time, each for this many requests.
const UNMAPPED: usize = 2;
/// How many pages with data must be unmapped, and how long that may take at most.
const WRITTEN: u64 = 4000;
/// Does a request, and returns when it is answered.
fn answer(iommu: &Iommu, request: &impl IntoBytesRequest) {
    let bytes = request.bytes();
    let request = Request::parse(&bytes, iommu.features()).unwrap();
    assert_eq!(iommu.execute(&request, &mut []).status, Status::Ok, "{bytes:x?}");
    iommu.synchronize();
}

/// Maps pages at their guest-physical addresses, so that there is only one kind of address.
fn map_pages(iommu: &Iommu, first: u64, count: u64) {
    let (start, end) = (first * PAGE, (first + count) * PAGE - 1);
    answer(iommu, &map(1, start, end, start, MAP_READ | MAP_WRITE));
}

/// What was seen while pages were mapped and unmapped.
#[derive(Debug, Default)]
struct Seen {
    unmapped: u64,
    /// Those with data that the controller wrote.
    written: u64,
    /// Those of queues.
    queues: u64,
}

/// Unmaps pages and maps them again until enough was seen and the controller has `lost` a queue by that, or until it
/// takes too long. Nothing may be written to a page while it is unmapped.
fn change_mappings(iommu: &Iommu, ram: &File, mut numbers: Numbers, lost: &AtomicU64) -> Seen {
    const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    let page_is_zeros = |page: u64| {
        let mut found = ZEROS;
        ram.read_exact_at(&mut found, page * PAGE).unwrap();
        found == ZEROS
    };
    let (mut seen, begun) = (Seen::default(), Instant::now());
    let mut away = VecDeque::new();
    let is_enough = |seen: &Seen| seen.written >= WRITTEN && lost.load(Ordering::Relaxed) > 0;
    while !is_enough(&seen) && begun.elapsed() < PATIENCE {
        // A controller without its queues does nothing.
        let (from, to) = if numbers.below(64) == 0 { (SUBMISSION, DATA) } else { (DATA, END) };
        let page = from + numbers.below(to - from);
        if away.contains(&page) {
            continue;
        }
        answer(iommu, &unmap(1, page * PAGE, (page + 1) * PAGE - 1));
        // The driver writes to its submission queues itself.
        if page >= COMPLETION {
            seen.written += u64::from(!page_is_zeros(page));
            ram.write_all_at(&ZEROS, page * PAGE).unwrap();
        }
        seen.unmapped += 1;
        seen.queues += u64::from(page < DATA);
        away.push_back(page);
        if away.len() > UNMAPPED {
            let back = away.pop_front().unwrap();
            assert!(back < COMPLETION || page_is_zeros(back), "page {back} was written to after it was unmapped");
            map_pages(iommu, back, 1);
        }
    }
    away.into_iter().for_each(|page| map_pages(iommu, page, 1));
    seen
}

/// Enables the controller again, with all its queues in the same pages.
fn restart(driver: &mut Driver) {
    driver.disable();
    driver.free = PAGE;
    driver.enable();
    assert!(driver.free <= FIXED * PAGE);
    for id in 1..=PAIRS {
        let (sq, cq) = ((SUBMISSION + u64::from(id) - 1) * PAGE, (COMPLETION + u64::from(id) - 1) * PAGE);
        driver.add_pair(id, sq, ENTRIES, cq, ENTRIES);
        assert_eq!(driver.create_cq(id, ENTRIES, cq, u32::from(id) << 16 | 0b11), 0);
        assert_eq!(driver.create_sq(id, ENTRIES, sq, u32::from(id) << 16 | 1), 0);
    }
}

/// A command whose data is anywhere in the changing pages.
fn any_command(numbers: &mut Numbers) -> Sqe {
    let mut address = || (COMPLETION + numbers.below(END - COMPLETION)) * PAGE;
    let data = [address(), address()];
    let blocks = 1 + numbers.below(16) as u32;
    // Blocks that are read are never written, so that the test knows their contents.
    let (read, written) = (numbers.below(64), 4096 + numbers.below(64));
    match numbers.below(16) {
        0 => io(WRITE, written, blocks, data),
        1 => io(COMPARE, read, blocks, data),
        2 => io(WRITE_ZEROES, written, blocks, data),
        3 => Sqe { cdw10: numbers.below(4) as u32, ..io(DATASET_MANAGEMENT, 0, 0, data) },
        4 => io(FLUSH, 0, 0, data),
        // A data block of an SGL with many pages, or a list of PRPs at any address.
        5..12 => Sqe { flags: 1 << 6, ..io(READ, read, 8 * blocks, [data[0], u64::from(blocks) * PAGE]) },
        12 => io(READ, read, 8 * 3, data),
        _ => io(READ, read, blocks, data),
    }
}

/// Gives the controller commands until `done`, and counts how often it had to be enabled again because it had lost a
/// queue.
fn command_all_the_time(driver: &mut Driver, mut numbers: Numbers, lost: &AtomicU64, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        restart(driver);
        for round in 0..2000 {
            let queue = 1 + numbers.below(PAIRS.into()) as u16;
            for _ in 0..=numbers.below(4) {
                driver.put(queue, any_command(&mut numbers));
            }
            if round < 20 {
                // Identify Controller; nobody waits for its completion.
                let data = [(DATA + numbers.below(END - DATA)) * PAGE, 0];
                driver.put(0, Sqe { opcode: 6, cdw10: 1, data, ..Sqe::default() });
                driver.ring(0);
            }
            driver.ring(queue);
            // As if all completions had been read.
            let tail = driver.queues[&queue].tail;
            driver.ring_doorbell(queue, u64::from(queue) * 2 + 1, tail);
            if driver.csts() & 2 != 0 {
                lost.fetch_add(1, Ordering::Relaxed);
                break;
            }
        }
    }
}

#[test]
fn nothing_is_written_to_a_page_after_its_unmap_is_answered() {
    let setup = Setup::new();
    let mut image = vec![0xff; 256 << 10];
    image.resize(64 << 20, 0);
    std::fs::write(setup.image(), image).unwrap();
    let iommu = setup.iommu();
    iommu.set_features(u64::MAX);
    answer(iommu, &attach(1, ENDPOINT, 0));
    map_pages(iommu, 0, FIXED);
    (FIXED..END).for_each(|page| map_pages(iommu, page, 1));
    let mut driver = setup.driver();
    let ram = driver.ram.try_clone().unwrap();
    let (lost, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let seen = thread::scope(|scope| {
        let commands = scope.spawn(|| command_all_the_time(&mut driver, Numbers(0x2545_f491_4f6c_dd1d), &lost, &done));
        let mappings = scope.spawn(|| change_mappings(iommu, &ram, Numbers(0x9e37_79b9_7f4a_7c15), &lost));
        let seen = mappings.join();
        done.store(true, Ordering::Relaxed);
        commands.join().unwrap();
        seen.unwrap()
    });
    let executed = setup.disk.counters.io_count.load(Ordering::Relaxed);
    let lost = lost.into_inner();
    println!("{seen:?}; {executed} I/O commands, and {lost} times a queue was lost");
    assert!(seen.written >= WRITTEN && lost > 0, "the controller was hardly ever at work");
    // The controller still works.
    restart(&mut driver);
    let target = DATA * PAGE;
    assert_eq!(driver.command(1, io(READ, 0, 8, [target, 0])).status, 0);
    assert_eq!(driver.read_ram(target, PAGE as usize), [0xff; PAGE as usize]);
}
