//! Data in all places, and commands whose data is nowhere.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::nvme::{COMPARE, READ, WRITE, WRITE_ZEROES};
use viommu_testkit::folders;
use viommu_testkit::nvme::{Driver, PAGE, RAM, Setup, Sqe, io, pattern};

/// Writes a PRP list that begins two entries before the end of its page, so that a long one chains at once.
fn write_list(driver: &Driver, lists: u64, pages: &[u64]) -> u64 {
    let first = lists + PAGE - 16;
    let (mut at, mut next, mut rest) = (first, lists + PAGE, pages);
    loop {
        let fit = ((PAGE - at % PAGE) / 8) as usize;
        if rest.len() <= fit {
            driver.write_words(at, rest);
            return first;
        }
        driver.write_words(at, &rest[..fit - 1]);
        driver.write_words(at + 8 * (fit as u64 - 1), &[next]);
        rest = &rest[fit - 1..];
        at = next;
        next += PAGE;
    }
}

/// Runs a test with an image in each of the [`folders`].
fn wherever_the_image_is(test: impl Fn(&Setup)) {
    for folder in folders() {
        let folder = tempfile::tempdir_in(folder).unwrap();
        test(&Setup::with(64 << 20, |config| config.image = folder.path().join("disk.img")));
    }
}

/// Writes in one way and reads in another; both must match the image.
#[test]
fn data_goes_through_prps_wherever_it_begins() {
    wherever_the_image_is(through_prps);
}

fn through_prps(setup: &Setup) {
    let mut driver = setup.ready();
    let image = File::open(setup.image()).unwrap();
    let lists = driver.pages(8);
    for (seed, (offset, blocks)) in (1..).zip([
        (0, 1),
        (512, 8),
        (4, 8),
        (0, 16),
        (4092, 9),
        (0, 17),
        (2048, 256),
        (0, 1024),
        (100, 8192),
        (0, 16384),
    ]) {
        let len = blocks as usize * 512;
        // Every other page, in descending order, so that no two are adjacent.
        let base = driver.pages(0);
        let count = (offset + len as u64).div_ceil(PAGE);
        let pages: Vec<u64> = (0..count).rev().map(|i| base + 2 * i * PAGE).collect();
        assert!(base + 2 * count * PAGE < RAM);
        let second = match &pages[1..] {
            [] => 0,
            [only] => *only,
            rest => write_list(&driver, lists, rest),
        };
        let data = pattern(len, seed);
        let place = |driver: &Driver, put: Option<&[u8]>| -> Vec<u8> {
            let mut at = 0;
            let mut found = Vec::new();
            for (index, page) in pages.iter().enumerate() {
                let from = if index == 0 { offset } else { 0 };
                let now = (PAGE - from).min((len - at) as u64) as usize;
                match put {
                    Some(data) => driver.write_ram(page + from, &data[at..at + now]),
                    None => found.extend(driver.read_ram(page + from, now)),
                }
                at += now;
            }
            found
        };
        place(&driver, Some(&data));
        let lba = 1000 * seed;
        let pointer = [pages[0] + offset, second];
        assert_eq!(driver.command(1, io(WRITE, lba, blocks, pointer)).status, 0, "offset {offset}, {blocks} blocks");
        let mut stored = vec![0; len];
        image.read_exact_at(&mut stored, lba * 512).unwrap();
        assert_eq!(stored, data, "offset {offset}, {blocks} blocks");
        place(&driver, Some(&vec![0xaa; len]));
        assert_eq!(driver.command(1, io(READ, lba, blocks, pointer)).status, 0);
        assert_eq!(place(&driver, None), data, "offset {offset}, {blocks} blocks");
    }
    let counters = &setup.disk.counters;
    assert_eq!(counters.io_count.load(Ordering::Relaxed), 20);
    assert_eq!(counters.bytes_read.load(Ordering::Relaxed), counters.bytes_written.load(Ordering::Relaxed));
    assert_eq!(counters.errors.load(Ordering::Relaxed), 0);
}

#[test]
fn data_goes_through_sgls() {
    wherever_the_image_is(through_sgls);
}

fn through_sgls(setup: &Setup) {
    let mut driver = setup.ready();
    let (buffer, list) = (driver.pages(16), driver.pages(2));
    let data = pattern(8192, 5);
    driver.write_ram(buffer + 3, &data);
    let sgl = |sqe: Sqe| Sqe { flags: 1 << 6, ..sqe };
    // One descriptor in the command.
    assert_eq!(driver.command(1, sgl(io(WRITE, 0, 16, [buffer + 3, 8192]))).status, 0);
    // A segment and a last segment; a part of the data goes into a bit bucket.
    let target = buffer + 8 * PAGE;
    driver.write_words(list, &[target, 1000, 0, 0x10 << 56 | 500, list + PAGE, 0x30 << 56 | 32]);
    driver.write_words(list + PAGE, &[target + 1500, 5000, target + 6500, 1692]);
    assert_eq!(driver.command(1, sgl(io(READ, 0, 16, [list, 0x20 << 56 | 48]))).status, 0);
    let read = driver.read_ram(target, 8192);
    assert_eq!(read[..1000], data[..1000]);
    assert_eq!(read[1000..1500], [0; 500], "the bucket keeps nothing");
    assert_eq!(read[1500..], data[1500..]);
    // More descriptors, of 4 bytes each, than a system call takes parts.
    let many = driver.pages(8);
    let words: Vec<u64> = (0..2048).flat_map(|at| [target + 8192 - 4 * (at + 1), 4]).collect();
    driver.write_words(many, &words);
    assert_eq!(driver.command(1, sgl(io(READ, 0, 16, [many, 0x30 << 56 | 0x8000]))).status, 0);
    let backwards: Vec<u8> = data.chunks(4).rev().flatten().copied().collect();
    assert_eq!(driver.read_ram(target, 8192), backwards);
    for (first, status) in [
        ([buffer, 8191], 0x0f),
        ([buffer, 0x40 << 56 | 8192], 0x11),
        ([list, 0x30 << 56 | 17], 0x0d),
        ([list, 0x30 << 56 | 48], 0x0d),
        ([RAM - 100, 8192], 0x04),
        ([RAM, 0x30 << 56 | 16], 0x04),
    ] {
        assert_eq!(driver.command(1, sgl(io(READ, 0, 16, first))).status, status, "{first:x?}");
    }
    // Admin commands have PRPs only.
    assert_eq!(
        driver.admin(Sqe { opcode: 6, flags: 1 << 6, cdw10: 1, data: [buffer, 4096], ..Sqe::default() }).status,
        2
    );
}

#[test]
fn a_bad_command_fails_alone() {
    wherever_the_image_is(bad_commands);
}

fn bad_commands(setup: &Setup) {
    let mut driver = setup.ready();
    let page = driver.pages(1);
    let blocks = 64 << 20 >> 9;
    let fine = io(READ, 0, 8, [page, 0]);
    for (sqe, status) in [
        (io(READ, 0, 8, [RAM, 0]), 0x04),
        (io(WRITE, 0, 8, [RAM, 0]), 0x04),
        (io(COMPARE, 0, 8, [RAM, 0]), 0x04),
        (io(READ, 0, 16, [page, RAM]), 0x04),
        (io(READ, 0, 64, [page, RAM]), 0x04),
        (io(READ, 0, 8, [u64::MAX - 3, 0]), 0x04),
        (io(READ, 0, 8, [!4095, 0]), 0x04),
        (io(READ, 0, 8, [page + 1, 0]), 0x13),
        (io(READ, 0, 16, [page, page + 8]), 0x13),
        (io(READ, 0, 64, [page, page + 4]), 0x13),
        (io(READ, blocks, 1, [page, 0]), 0x80),
        (io(READ, blocks - 1, 2, [page, 0]), 0x80),
        (io(WRITE, u64::MAX, 1, [page, 0]), 0x80),
        (io(WRITE_ZEROES, blocks - 1, 2, [0, 0]), 0x80),
        (io(READ, 0, 16385, [page, 0]), 0x02),
        (Sqe { nsid: 0, ..fine }, 0x0b),
        (Sqe { nsid: 2, ..fine }, 0x0b),
        (Sqe { nsid: u32::MAX, ..fine }, 0x0b),
        (Sqe { flags: 1, ..fine }, 0x02),
        (Sqe { flags: 3 << 6, ..fine }, 0x02),
        (Sqe { opcode: 0x04, ..fine }, 0x01),
        (Sqe { opcode: 0xff, ..fine }, 0x01),
    ] {
        assert_eq!(driver.command(1, sqe).status, status, "{sqe:x?}");
        assert_eq!(driver.command(1, fine).status, 0, "after {sqe:x?}");
    }
    for opcode in [0x0d, 0x10, 0x80, 0xc0, 0xff] {
        assert_eq!(driver.admin(Sqe { opcode, ..Sqe::default() }).status, 0x01);
    }
    assert_eq!(driver.admin(Sqe { opcode: 6, cdw10: 1, data: [RAM, 0], ..Sqe::default() }).status, 0x04);
    let errors = driver.log_page(1, 0, 128).unwrap();
    assert_eq!(errors[..8], 28u64.to_le_bytes(), "the newest first, counted from 1");
    assert_eq!(errors[64..72], 27u64.to_le_bytes());
    assert_eq!(u16::from_le_bytes([errors[12], errors[13]]) >> 1 & 0x7ff, 0x04);
    assert_eq!(driver.csts(), 1, "ready, and not fatal");
}
