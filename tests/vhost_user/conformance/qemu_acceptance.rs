//! The requests that QEMU's test of its own device sends, and the statuses that it expects. Where it maps single bytes,
//! each byte of its ranges is a granule here.

use viommu_testkit::frontend::*;
use zerocopy::little_endian::U32;

const PAGE: u64 = 0x1000;

#[test]
fn qemu_acceptance_sequence() {
    let device = Device::new();
    let mut driver = Driver::new(&device);

    let config = driver.config();
    assert_eq!(config.input_range[0].get(), 0);
    assert!(config.input_range[1].get() >= u64::from(u32::MAX));
    assert_eq!(config.domain_range.map(U32::get), [0, u32::MAX]);
    assert_eq!(config.bypass, 1);

    // Attach and detach.
    assert_eq!(driver.attach(0, EP), OK);
    assert_eq!(driver.attach(0, NOBODY), NOENT);
    assert_eq!(driver.detach(0, NOBODY), NOENT);
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.detach(0, EP), INVAL);
    assert_eq!(driver.detach(1, EP), OK);
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.map(1, 0, PAGE - 1, 0xa_1000, READ), OK);
    assert_eq!(driver.map(1, 2 * PAGE, 3 * PAGE - 1, 0xb_1000, READ), OK);
    assert_eq!(driver.detach(1, EP), OK);

    // Map and unmap.
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.map(0, 0, PAGE - 1, 0xa_1000, READ), NOENT);
    assert_eq!(driver.map(1, 0, PAGE - 1, 0xa_1000, READ), OK);
    assert_eq!(driver.map(1, 0, 16 * PAGE - 1, 0xb_1000, READ), INVAL);
    assert_eq!(driver.unmap(4, 0x10, PAGE - 1), NOENT);
    assert_eq!(driver.unmap(1, 0x10, PAGE - 1), RANGE);
    assert_eq!(driver.unmap(1, 0, PAGE), OK);

    // The specification's seven examples. Their ranges, both ends inclusive, are in granules.
    let map = |driver: &mut Driver, start: u64, end: u64, phys: u64| {
        driver.map(1, start * PAGE, (end + 1) * PAGE - 1, phys, READ)
    };
    let unmap = |driver: &mut Driver, start: u64, end: u64| driver.unmap(1, start * PAGE, (end + 1) * PAGE - 1);
    // 1
    assert_eq!(unmap(&mut driver, 0, 4), OK);
    // 2
    assert_eq!(map(&mut driver, 0, 9, 0xa_1000), OK);
    assert_eq!(unmap(&mut driver, 0, 9), OK);
    // 3
    assert_eq!(map(&mut driver, 0, 4, 0xb_1000), OK);
    assert_eq!(map(&mut driver, 5, 9, 0xb_2000), OK);
    assert_eq!(unmap(&mut driver, 0, 9), OK);
    // 4
    assert_eq!(map(&mut driver, 0, 9, 0xc_1000), OK);
    assert_eq!(unmap(&mut driver, 0, 4), RANGE);
    assert_eq!(unmap(&mut driver, 0, 10), OK);
    // 5
    assert_eq!(map(&mut driver, 0, 4, 0xd_1000), OK);
    assert_eq!(map(&mut driver, 5, 9, 0xd_2000), OK);
    assert_eq!(unmap(&mut driver, 0, 4), OK);
    assert_eq!(unmap(&mut driver, 5, 9), OK);
    // 6
    assert_eq!(map(&mut driver, 0, 4, 0xe_2000), OK);
    assert_eq!(unmap(&mut driver, 0, 9), OK);
    // 7
    assert_eq!(map(&mut driver, 0, 4, 0xf_2000), OK);
    assert_eq!(map(&mut driver, 10, 14, 0xf_3000), OK);
    assert_eq!(unmap(&mut driver, 0, 14), OK);

    assert_eq!(map(&mut driver, 10, 14, 0xf_3000), OK);
    assert_eq!(map(&mut driver, 0, 4, 0xf_2000), OK);
    assert_eq!(unmap(&mut driver, 0, 4), OK);
    assert_eq!(map(&mut driver, 10, 14, 0xf_3000), INVAL, "it is still there");
}
