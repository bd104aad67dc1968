//! The NVMe controller over a real vfio-user socket, with a test in the driver's place.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/nvme.rs"]
mod driver;

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;
use std::time::Duration;

use driver::{CC_ENABLED, Driver, ENDPOINT, PAGE, RAM, Setup, Sqe, io, pattern, register};
use viommu::devices::nvme::{Disk, NvmeConfig, OpenError};
use viommu::trace::event::{Access, Channel, DataPointer, Model, ResetKind, Route};
use viommu::trace::{self, Choice, Event, Reader};

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const COMPARE: u8 = 5;
const WRITE_ZEROES: u8 = 8;
const DATASET_MANAGEMENT: u8 = 9;

#[test]
fn the_controller_says_what_it_is() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    let cap = driver.read64(register::CAP);
    assert_eq!(cap & 0xffff, 1023, "MQES");
    assert_eq!(cap >> 37 & 1, 1, "the NVM command set");
    assert_eq!(driver.read32(register::VS), 0x0001_0400);
    assert_eq!(driver.csts(), 0);
    driver.enable();
    let controller = driver.identify(1, 0, 0).unwrap();
    assert_eq!(&controller[4..24], b"test 1              ");
    assert_eq!(4096u64 << controller[77], 8 << 20, "MDTS");
    assert_eq!(controller[512..514], [0x66, 0x44]);
    assert_ne!(controller[256 + 1] & 1, 0, "doorbell buffer config");
    assert_eq!(controller[536] & 3, 1, "SGLs");
    assert!(controller[768..].starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));
    let namespace = driver.identify(0, 1, 0).unwrap();
    assert_eq!(namespace[..8], (64u64 << 20 >> 9).to_le_bytes());
    assert_eq!(namespace[130], 9);
    let list = driver.identify(2, 0, 0).unwrap();
    assert_eq!(list[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.identify(2, 1, 0).unwrap()[..4], [0; 4]);
    let descriptors = driver.identify(3, 1, 0).unwrap();
    assert_eq!(descriptors[..2], [2, 16], "an NGUID");
    assert_eq!(descriptors[4..20], namespace[104..120]);
    assert_eq!(driver.identify(6, 0, 0).unwrap(), [0; 4096]);
    assert_eq!(driver.identify(5, 1, 0).unwrap(), [0; 4096]);
    // A namespace that is not there, structures and a command set that are not either.
    assert_eq!(driver.identify(0, 2, 0), Err(0x0b));
    assert_eq!(driver.identify(2, u32::MAX, 0), Err(0x0b));
    assert_eq!(driver.identify(0x10, 0, 0), Err(0x02));
    assert_eq!(driver.identify(0xff, 0, 0), Err(0x02));
    assert_eq!(driver.identify(6, 0, 2 << 24), Err(0x02));
}

#[test]
fn what_cannot_be_enabled_is_fatal_until_it_is_reset() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    // No admin queue; a page size, a command set and an arbitration that are not supported.
    for cc in [CC_ENABLED, CC_ENABLED | 5 << 7, CC_ENABLED | 1 << 4, CC_ENABLED | 1 << 11] {
        driver.write32(register::CC, cc);
        assert_eq!(driver.csts(), 2, "CC {cc:#x}");
        driver.write32(register::CC, 0);
        assert_eq!(driver.csts(), 0);
        driver.write32(register::AQA, 31 << 16 | 31);
    }
    driver.enable();
    driver.create_pair(1, 16, 16);
    assert_eq!(driver.command(1, io(FLUSH, 0, 0, [0, 0])).status, 0);
}

#[test]
fn the_page_size_is_that_of_the_enabling() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    driver.write32(register::CC, CC_ENABLED | 2 << 7 | 1 << 4 | 1 << 11);
    assert_eq!(driver.read32(register::CC), CC_ENABLED);
    assert_eq!(driver.csts(), 1);
    // Two entries for two pages of 4 KiB; with larger pages the second one would not be looked at.
    let (first, second) = (driver.pages(2), driver.pages(2));
    let data = pattern(2 * PAGE as usize, 3);
    std::fs::OpenOptions::new().write(true).open(setup.image()).unwrap().write_all_at(&data, 0).unwrap();
    assert_eq!(driver.command(1, io(READ, 0, 16, [first, second])).status, 0);
    assert_eq!(driver.read_ram(second, PAGE as usize), data[PAGE as usize..]);
    driver.disable();
    driver.write32(register::CC, 2 << 7);
    assert_eq!(driver.read32(register::CC), 2 << 7, "a disabled controller takes it");
}

#[test]
fn features_are_kept_until_a_reset() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    driver.enable();
    assert_eq!(driver.set_feature(7, 7 << 16 | 3).result, 7 << 16 | 3);
    assert_eq!(driver.set_feature(7, 999 << 16 | 999).result, 15 << 16 | 15);
    assert_eq!(driver.set_feature(7, 0xffff).status, 0x02);
    assert_eq!(driver.get_feature(7, 0).result, 15 << 16 | 15);
    assert_eq!(driver.get_feature(6, 0).result, 1, "the write cache is on");
    assert_eq!(driver.set_feature(6, 0).status, 0);
    assert_eq!(driver.get_feature(6, 0).result, 0);
    assert_eq!(driver.get_feature(1 << 8 | 6, 0).result, 1, "the default stays");
    assert_eq!(driver.set_feature(1 << 31 | 6, 0).status, 0x10d, "nothing can be saved");
    assert_eq!(driver.get_feature(3 << 8 | 6, 0).result, 1 << 2);
    assert_eq!(driver.set_feature(9, 3 | 1 << 16).status, 0);
    assert_eq!(driver.get_feature(9, 3).result, 3 | 1 << 16);
    assert_eq!(driver.get_feature(9, 17).status, 0x02, "there are 17 vectors");
    assert_eq!(driver.get_feature(0x77, 0).status, 0x02);
    let page = driver.pages(1);
    driver.write_ram(page, &123_456_789u64.to_le_bytes());
    let timestamp = Sqe { opcode: 9, data: [page, 0], cdw10: 0x0e, ..Sqe::default() };
    assert_eq!(driver.admin(timestamp).status, 0);
    assert_eq!(driver.admin(Sqe { opcode: 10, data: [page + 8, 0], ..timestamp }).status, 0);
    let now = u64::from_le_bytes(driver.read_ram(page + 8, 8).try_into().unwrap());
    assert_eq!(now >> 48, 2, "set by the host");
    assert!((123_456_789..123_456_789 + 60_000).contains(&(now & 0xffff_ffff_ffff)));
    driver.disable();
    driver.enable();
    assert_eq!(driver.get_feature(6, 0).result, 1);
}

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

/// Writes through one way and reads through another; both must be what the image has.
#[test]
fn data_goes_through_prps_wherever_it_begins() {
    let setup = Setup::new();
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
        // Every other page, and backwards, so that no two are neighbours.
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
    let setup = Setup::new();
    let mut driver = setup.ready();
    let (buffer, list) = (driver.pages(16), driver.pages(2));
    let data = pattern(8192, 5);
    driver.write_ram(buffer + 3, &data);
    let sgl = |sqe: Sqe| Sqe { flags: 1 << 6, ..sqe };
    // One descriptor in the command.
    assert_eq!(driver.command(1, sgl(io(WRITE, 0, 16, [buffer + 3, 8192]))).status, 0);
    // A segment and a last segment; part of it goes into a bit bucket.
    let target = buffer + 8 * PAGE;
    driver.write_words(list, &[target, 1000, 0, 0x10 << 56 | 500, list + PAGE, 0x30 << 56 | 32]);
    driver.write_words(list + PAGE, &[target + 1500, 5000, target + 6500, 1692]);
    assert_eq!(driver.command(1, sgl(io(READ, 0, 16, [list, 0x20 << 56 | 48]))).status, 0);
    let read = driver.read_ram(target, 8192);
    assert_eq!(read[..1000], data[..1000]);
    assert_eq!(read[1000..1500], [0; 500], "the bucket keeps nothing");
    assert_eq!(read[1500..], data[1500..]);
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
    let setup = Setup::new();
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

#[test]
fn blocks_can_be_compared_zeroed_and_deallocated() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    let (buffer, ranges) = (driver.pages(256), driver.pages(1));
    let list = driver.pages(1);
    driver.write_words(list, &(1..256).map(|i| buffer + i * PAGE).collect::<Vec<u64>>());
    let data = pattern(1 << 20, 9);
    driver.write_ram(buffer, &data);
    assert_eq!(driver.command(1, io(WRITE, 0, 2048, [buffer, list])).status, 0);
    assert_eq!(driver.command(1, io(COMPARE, 0, 2048, [buffer, list])).status, 0);
    driver.write_ram(buffer + (1 << 20) - 1, &[data[(1 << 20) - 1] ^ 1]);
    assert_eq!(driver.command(1, io(COMPARE, 0, 2048, [buffer, list])).status, 0x285);
    assert_eq!(driver.command(1, io(WRITE_ZEROES, 3, 5, [0, 0])).status, 0);
    let image = File::open(setup.image()).unwrap();
    let mut stored = vec![0; 1 << 20];
    image.read_exact_at(&mut stored, 0).unwrap();
    assert_eq!(stored[..3 * 512], data[..3 * 512]);
    assert_eq!(stored[3 * 512..8 * 512], [0; 5 * 512]);
    assert_eq!(stored[8 * 512..], data[8 * 512..]);
    // Two ranges, of which one is 64 KiB to 512 KiB.
    let punches = driver.identify(0, 1, 0).unwrap()[33] & 7 == 1;
    let before = image.metadata().unwrap().blocks();
    driver.write_words(ranges, &[896 << 32, 128, 1 << 32, 0]);
    let deallocate = Sqe { cdw10: 1, cdw11: 1 << 2, cdw12: 0, ..io(DATASET_MANAGEMENT, 0, 1, [ranges, 0]) };
    assert_eq!(driver.command(1, deallocate).status, 0);
    image.read_exact_at(&mut stored, 0).unwrap();
    assert_eq!(stored[512 * 1024..], data[512 * 1024..]);
    if punches {
        assert_eq!(stored[64 << 10..512 << 10], vec![0; 448 << 10]);
        assert!(image.metadata().unwrap().blocks() < before, "the space is given back");
    }
    // A range past the end, and the same without the attribute, which makes it a hint.
    driver.write_words(ranges, &[8 << 32, 1 << 40]);
    assert_eq!(driver.command(1, Sqe { cdw10: 0, ..deallocate }).status, 0x80);
    assert_eq!(driver.command(1, Sqe { cdw10: 0, cdw11: 0, ..deallocate }).status, 0);
    assert_eq!(driver.command(1, Sqe { nsid: u32::MAX, ..io(FLUSH, 0, 0, [0, 0]) }).status, 0);
    // Forced unit access.
    assert_eq!(driver.command(1, Sqe { cdw12: 7 | 1 << 30, ..io(WRITE, 0, 8, [buffer, 0]) }).status, 0);
}

#[test]
fn blocks_may_be_of_4096_bytes() {
    let setup = Setup::with(1 << 20, |config| config.block_size = 4096);
    let mut driver = setup.ready();
    let namespace = driver.identify(0, 1, 0).unwrap();
    assert_eq!((&namespace[..8], namespace[130]), (&256u64.to_le_bytes()[..], 12));
    let page = driver.pages(1);
    driver.write_ram(page, &pattern(4096, 3));
    assert_eq!(driver.command(1, io(WRITE, 255, 1, [page, 0])).status, 0);
    assert_eq!(driver.command(1, io(WRITE, 256, 1, [page, 0])).status, 0x80);
    assert_eq!(std::fs::read(setup.image()).unwrap()[255 * 4096..], pattern(4096, 3));
}

#[test]
fn a_read_only_namespace_is_write_protected() {
    let setup = Setup::with(1 << 20, |config| config.read_only = true);
    let mut driver = setup.ready();
    assert_eq!(driver.identify(0, 1, 0).unwrap()[99], 1);
    let page = driver.pages(1);
    for opcode in [WRITE, WRITE_ZEROES, DATASET_MANAGEMENT] {
        assert_eq!(driver.command(1, io(opcode, 0, 1, [page, 0])).status, 0x20);
    }
    assert_eq!(driver.command(1, io(READ, 0, 1, [page, 0])).status, 0);
}

#[test]
fn an_image_must_be_there_whole_and_ones_own() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let config = || NvmeConfig::new(&image, "serial");
    let missing = Disk::open(config()).unwrap_err();
    assert!(matches!(missing, OpenError::Missing(_)));
    assert!(missing.to_string().contains("truncate -s"), "{missing}");
    File::create(&image).unwrap().set_len(1000).unwrap();
    assert!(matches!(Disk::open(config()), Err(OpenError::Size { .. })));
    File::create(&image).unwrap().set_len(0).unwrap();
    assert!(matches!(Disk::open(config()), Err(OpenError::Size { .. })));
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let held = Disk::open(config()).unwrap();
    assert!(matches!(Disk::open(config()), Err(OpenError::Locked(_))));
    assert!(matches!(Disk::open(NvmeConfig { read_only: true, ..config() }), Err(OpenError::Locked(_))));
    drop(held);
    let one = Disk::open(NvmeConfig { read_only: true, ..config() }).unwrap();
    let two = Disk::open(NvmeConfig { read_only: true, ..config() }).unwrap();
    drop((one, two));
    assert!(matches!(Disk::open(NvmeConfig { block_size: 1024, ..config() }), Err(OpenError::BlockSize(1024))));
    assert!(matches!(Disk::open(NvmeConfig { serial: "x".repeat(21), ..config() }), Err(OpenError::Serial(_))));
    assert!(matches!(Disk::open(NvmeConfig { queues: 65, ..config() }), Err(OpenError::Queues(65))));
    assert!(matches!(Disk::open(NvmeConfig::new(dir.path(), "x")), Err(OpenError::Open { .. })));
    assert!(matches!(
        Disk::open(NvmeConfig { read_only: true, ..NvmeConfig::new(dir.path(), "x") }),
        Err(OpenError::NotAFile(_))
    ));
}

#[test]
fn events_are_told_once_until_their_log_is_read() {
    const AER: Sqe = Sqe { opcode: 0x0c, flags: 0, nsid: 0, data: [0; 2], cdw10: 0, cdw11: 0, cdw12: 0, cdw13: 0 };
    let setup = Setup::new();
    let mut driver = setup.ready();
    let requests: Vec<u16> = (0..4).map(|_| driver.put(0, AER)).collect();
    assert_eq!(driver.admin(AER).status, 0x105, "no more than four");
    // A doorbell of a queue that is not there, and then a value that is too large: one event.
    driver.write32(0x1000 + 8 * 5, 1);
    let done = driver.wait(0);
    assert_eq!((done.cid, done.status, done.result), (requests[0], 0, 0x01_00_00));
    driver.write32(0x1000 + 8, 64);
    assert_eq!(driver.identify(1, 0, 0).map(drop), Ok(()), "no event before the log was read");
    driver.log_page(1, 0, 64).unwrap();
    let done = driver.wait(0);
    assert_eq!((done.cid, done.status, done.result), (requests[1], 0, 0x01_01_00));
    // A threshold below the temperature, once it is to be an event.
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
    // Left full, the queue pair can still be deleted.
    for _ in 0..20 {
        driver.put(1, io(READ, 0, 1, [page, 0]));
    }
    driver.ring(1);
    std::thread::sleep(Duration::from_millis(20));
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
    // A queue pair that comes later has shadows too.
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

/// Nothing of an old life: no byte of this memory changes, and no interrupt comes.
fn assert_dead(driver: &Driver, base: u64, len: usize) {
    let _ = driver.events[1].read();
    let cq = driver.queues[&1].cq;
    driver.write_ram(base, &vec![0x55; len]);
    driver.write_ram(cq, &[0x55; 1024]);
    std::thread::sleep(Duration::from_millis(20));
    assert!(driver.read_ram(base, len).iter().all(|byte| *byte == 0x55));
    assert_eq!(driver.read_ram(cq, 1024), [0x55; 1024]);
    assert!(driver.events[1].read().is_err());
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
        assert_dead(&driver, base, len);
        assert_eq!(driver.csts(), 0);
        driver.client.region_write(7, 4, &[6, 0]).unwrap();
        driver.enable();
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
    // What was fetched is complete, with success or as aborted.
    while let Some(done) = driver.reap(1) {
        assert!(matches!(done.status, 0 | 0x08), "{done:?}");
    }
    assert_dead(&driver, base, len);
    assert_eq!(driver.delete_cq(1), 0);
}

#[test]
fn shutdown_completes_and_a_reset_ends_it() {
    let setup = Setup::new();
    for notification in [1, 2] {
        let mut driver = setup.ready();
        let (base, len) = begin_reads(&mut driver, 20);
        driver.write32(register::CC, CC_ENABLED | notification << 14);
        driver.wait_csts(0xc, 0x8);
        assert_dead(&driver, base, len);
        assert_eq!(driver.csts(), 0x9, "still ready");
        driver.disable();
        assert_eq!(driver.csts(), 0);
        driver.write32(register::CC, 1 << 14);
        assert_eq!(driver.csts(), 0x8, "a disabled one has nothing to do");
        driver.write32(register::CC, 0);
        driver.enable();
        assert!(driver.identify(1, 0, 0).is_ok());
    }
    drop(setup.driver());
    let unsafe_shutdowns = setup.disk.counters.unsafe_shutdowns.load(Ordering::Relaxed);
    assert!(unsafe_shutdowns >= 1, "the drivers that were dropped");
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
    // A submission queue outside memory.
    assert_eq!(driver.create_cq(2, 16, page, 1), 0);
    assert_eq!(driver.create_sq(2, 16, RAM, 2 << 16 | 1), 0);
    driver.write32(0x1000 + 16, 1);
    driver.wait_csts(2, 2);
    driver.disable();
    driver.enable();
    // A completion queue outside memory.
    assert_eq!(driver.create_cq(1, 16, RAM, 1), 0);
    let sq = driver.pages(1);
    driver.add_pair(1, sq, 16, page, 16);
    assert_eq!(driver.create_sq(1, 16, sq, 1 << 16 | 1), 0);
    driver.put(1, io(FLUSH, 0, 0, [0, 0]));
    driver.ring(1);
    driver.wait_csts(2, 2);
    // The admin queue outside memory.
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
fn registers_take_any_access() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    for len in [1, 2, 3, 4, 8, 16, 64, 0x1000] {
        for offset in [0, 1, 7, 0x13, 0x1000, 0x1ff8, 0x2000, u64::MAX] {
            // What is outside has no data in its answer, which the crate's client would wait for.
            if offset <= 0x2000 - len as u64 {
                let mut data = vec![0; len];
                driver.client.region_read(0, offset, &mut data).unwrap();
            }
        }
    }
    let mut cap = [0; 8];
    driver.client.region_read(0, 0, &mut cap).unwrap();
    assert_eq!(u64::from_le_bytes(cap), driver.read64(register::CAP));
    let mut odd = [0; 3];
    driver.client.region_read(0, 3, &mut odd).unwrap();
    assert_eq!(odd, cap[3..6]);
    // Writes of odd sizes do nothing.
    driver.client.region_write(0, register::CC, &[0]).unwrap();
    driver.client.region_write(0, register::CC + 1, &[0, 0]).unwrap();
    driver.client.region_write(0, 0x1000 + 4 * 700, &[1, 0, 0, 0]).unwrap();
    let page = driver.pages(1);
    assert_eq!(driver.command(1, io(READ, 0, 8, [page, 0])).status, 0);
}

/// Of the events that the trace has of a session, those of a bad read and a good write, and what is around them.
#[test]
fn every_step_is_traced() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("trace.sock");
    let (tracer, handle) = trace::start(trace::Options { socket: Some(socket.clone()), ..Default::default() }).unwrap();
    let mut reader = Reader::connect(&socket, &Choice::default()).unwrap();
    let setup = Setup::traced(1 << 20, tracer, |_| {});
    let mut driver = setup.ready();
    let buffer = driver.pages(2);
    let pair = &driver.queues[&1];
    let (sq, cq) = (pair.sq, pair.cq);
    assert_eq!(driver.command(1, io(WRITE, 5, 16, [buffer, buffer + PAGE])).status, 0);
    assert_eq!(driver.command(1, Sqe { flags: 1 << 6, ..io(READ, 7, 1, [RAM, 512]) }).status, 0x04);
    driver.client.reset().unwrap();
    drop(driver);
    drop(setup);
    handle.stop();
    let mut events = Vec::new();
    while let Some(record) = reader.next_record().unwrap() {
        events.push(Event::decode(&record).unwrap());
    }
    let (channel, endpoint) = (Channel::VfioUser, Some(ENDPOINT));
    assert_eq!(events.first(), Some(&Event::Session { channel, endpoint, connected: true }));
    assert_eq!(events.last(), Some(&Event::Session { channel, endpoint, connected: false }));
    for added in [true, false] {
        let memory = Event::Memory { channel, endpoint, added, gpa: 0, len: RAM, writable: true };
        assert!(events.contains(&memory), "{memory:?}");
    }
    assert!(events.contains(&Event::Reset { reset: ResetKind::Function, endpoint }));
    let states = events.iter().filter_map(|event| match event {
        Event::Device { endpoint: ENDPOINT, model: Model::Nvme, state } => Some(*state),
        _ => None,
    });
    assert_eq!(states.collect::<Vec<u64>>(), [1 << 32 | u64::from(CC_ENABLED), 0]);
    // From the fetch of the write to the interrupt of the read.
    let dma = |access, iova, len| Event::Dma {
        endpoint: ENDPOINT,
        access,
        route: Route::Bypass,
        failed: iova == RAM,
        iova,
        gpa: iova,
        len,
        domain: 0,
        tag: 0,
    };
    let from = events.iter().position(|event| *event == dma(Access::Read, sq, 64)).unwrap();
    let commands = events[from..].iter().map(|event| match *event {
        Event::Command { endpoint, model, opcode, queue, id: _, status, pointer, address, data, len, duration } => {
            assert!(duration > 0);
            Event::Command { endpoint, model, opcode, queue, id: 0, status, pointer, address, data, len, duration: 0 }
        }
        other => other,
    });
    let command = |opcode, status, pointer, address, data, len| Event::Command {
        endpoint: ENDPOINT,
        model: Model::Nvme,
        opcode,
        queue: 1,
        id: 0,
        status,
        pointer,
        address,
        data,
        len,
        duration: 0,
    };
    let expected = [
        dma(Access::Read, sq, 64),
        dma(Access::Read, buffer, 8192),
        command(WRITE, 0, DataPointer::Prp, 5, buffer, 8192),
        dma(Access::Write, cq, 16),
        Event::Interrupt { endpoint, vector: 1 },
        dma(Access::Read, sq + 64, 64),
        dma(Access::Write, RAM, 512),
        command(READ, 0x4004, DataPointer::Sgl, 7, RAM, 512),
        dma(Access::Write, cq + 16, 16),
        Event::Interrupt { endpoint, vector: 1 },
    ];
    assert_eq!(commands.take(expected.len()).collect::<Vec<Event>>(), expected);
}
