//! How the controller identifies itself, its registers, its features, and how it is enabled.

use std::os::unix::fs::FileExt;

use crate::nvme::{FLUSH, READ};
use viommu_testkit::nvme::{CC_ENABLED, PAGE, Setup, Sqe, io, pattern, register};

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
    // A namespace, structures and a command set that do not exist.
    assert_eq!(driver.identify(0, 2, 0), Err(0x0b));
    assert_eq!(driver.identify(2, u32::MAX, 0), Err(0x0b));
    assert_eq!(driver.identify(0x10, 0, 0), Err(0x02));
    assert_eq!(driver.identify(0xff, 0, 0), Err(0x02));
    assert_eq!(driver.identify(6, 0, 2 << 24), Err(0x02));
}

#[test]
fn a_wrong_configuration_is_fatal_until_a_reset() {
    let setup = Setup::new();
    let mut driver = setup.driver();
    // No admin queue; an unsupported page size, command set and arbitration.
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
    // Two entries for two pages of 4 KiB; with larger pages the second one would not be read.
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
fn registers_take_any_access() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    for len in [1, 2, 3, 4, 8, 16, 64, 0x1000] {
        for offset in [0, 1, 7, 0x13, 0x1000, 0x1ff8, 0x2000, u64::MAX] {
            // An access outside of the BAR is answered without data, for which the crate's client would wait.
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
