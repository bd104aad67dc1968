//! The namespace, its blocks and the image behind it.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::nvme::{COMPARE, DATASET_MANAGEMENT, FLUSH, READ, WRITE, WRITE_ZEROES};
use viommu::devices::nvme::{Disk, NvmeConfig, OpenError};
use viommu_testkit::nvme::{PAGE, Setup, Sqe, io, pattern};

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
    // A range past the end, with the attribute and without it; without it the command is a hint.
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
