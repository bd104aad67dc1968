//! Rows 25 to 40: MAP and UNMAP.

use viommu::iommu::Limits;
use viommu_wire::virtio_iommu::*;

use viommu_testkit::frontend::*;
use zerocopy::little_endian::U64;

/// A device, and a driver with [`EP`] attached to domain 1.
fn attached() -> (Device, Driver) {
    attached_with(Device::new())
}

fn attached_with(device: Device) -> (Device, Driver) {
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    (device, driver)
}

#[test]
fn row_25_map_with_an_unknown_flag() {
    let (device, mut driver) = attached();
    for flags in [8, READ | 8, 1 << 31, u32::MAX] {
        assert_eq!(driver.map(1, 0, 0xfff, 0, flags), INVAL);
    }
    assert_eq!(device.iommu.stats().mappings_live, 0);
}

#[test]
fn row_26_mmio_needs_its_feature() {
    let device = Device::new();
    let mut driver = Driver::accepting(&device, !feature::MMIO);
    driver.attach(1, EP);
    let flags = WRITE | MapFlags::MMIO.bits();
    assert_eq!(driver.map(1, 0, 0xfff, 0xfec0_0000, flags), INVAL);
    driver.negotiate(u64::MAX);
    assert_eq!(driver.map(1, 0, 0xfff, 0xfec0_0000, flags), OK);
}

#[test]
fn row_27_map_in_an_unknown_domain() {
    let (_device, mut driver) = attached();
    for domain in [0, 2, u32::MAX] {
        assert_eq!(driver.map(domain, 0, 0xfff, 0, READ), NOENT);
    }
}

#[test]
fn row_28_map_and_unmap_in_a_bypass_domain() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach_bypass(1, EP);
    assert_eq!(driver.map(1, 0, 0xfff, 0, READ), INVAL);
    assert_eq!(driver.unmap(1, 0, 0xfff), INVAL);
}

#[test]
fn row_29_map_over_a_mapping() {
    let (device, mut driver) = attached();
    driver.write(0x5000, b"old");
    assert_eq!(driver.map(1, 0x2000, 0x3fff, 0x5000, READ), OK);
    // The same range, a part of it, a larger one, and one over each end.
    for (start, end) in [(0x2000, 0x3fff), (0x3000, 0x3fff), (0, 0xffff), (0x1000, 0x2fff), (0x3000, 0x4fff)] {
        assert_eq!(driver.map(1, start, end, 0x10_0000, READ | WRITE), INVAL);
    }
    assert_eq!(device.iommu.stats().mappings_live, 1);
    let mut dma = driver.dma(&device, EP);
    let mut data = [0; 3];
    dma.read(0x2000, &mut data).unwrap();
    assert_eq!(&data, b"old");
    dma.write(0x2000, b"new").unwrap_err();
    for nowhere in [0x1000, 0x4000] {
        dma.read(nowhere, &mut data).unwrap_err();
    }
    assert_eq!(driver.map(1, 0x1000, 0x1fff, 0x5000, READ), OK);
    assert_eq!(driver.map(1, 0x4000, 0x4fff, 0x5000, READ), OK);
}

#[test]
fn row_30_map_that_is_not_aligned() {
    let (device, mut driver) = attached();
    let cases = [
        (0x800, 0xfff, 0),
        (0x1001, 0x1fff, 0x5000),
        (0x1000, 0x1ffe, 0x5000),
        (0x1000, 0x2000, 0x5000),
        (0x1000, 0x1fff, 0x5001),
        (0x1000, 0x1fff, 0x5800),
        (0, u64::MAX - 1, 0),
    ];
    for (start, end, phys) in cases {
        assert_eq!(driver.map(1, start, end, phys, READ), RANGE, "[{start:#x}, {end:#x}] to {phys:#x}");
    }
    assert_eq!(device.iommu.stats().mappings_live, 0);
}

#[test]
fn row_30_the_granule_is_the_lowest_page_size() {
    let (_device, mut driver) = attached_with(Device::with(|settings| settings.page_size_mask = 1 << 16 | 1 << 21));
    assert_eq!(driver.map(1, 0, 0xfff, 0, READ), RANGE);
    assert_eq!(driver.map(1, 0x1000, 0x1_0fff, 0, READ), RANGE);
    assert_eq!(driver.map(1, 0, 0xffff, 0x1000, READ), RANGE);
    assert_eq!(driver.map(1, 0, 0xffff, 0x1_0000, READ), OK);
}

#[test]
fn row_31_map_whose_end_lies_before_its_start() {
    let (device, mut driver) = attached();
    for (start, end) in [(0x2000, 0xfff), (0x2000, 0x1fff), (u64::MAX - 0xfff, 0xfff)] {
        assert_eq!(driver.map(1, start, end, 0, READ), RANGE);
        assert_eq!(driver.unmap(1, start, end), RANGE);
    }
    assert_eq!(device.iommu.stats().mappings_live, 0);
}

#[test]
fn row_32_map_outside_of_the_input_range() {
    let range = (0x10_0000, 0xff_ffff);
    let (_device, mut driver) = attached_with(Device::with(|settings| settings.input_range = range));
    assert_eq!(driver.config().input_range.map(U64::get), [range.0, range.1]);
    assert_eq!(driver.map(1, 0xf_f000, 0xf_ffff, 0, READ), RANGE);
    assert_eq!(driver.map(1, 0xf_f000, 0x10_0fff, 0, READ), RANGE);
    assert_eq!(driver.map(1, 0xff_f000, 0x100_0fff, 0, READ), RANGE);
    assert_eq!(driver.map(1, 0, u64::MAX, 0, READ), RANGE);
    assert_eq!(driver.map(1, range.0, range.1, 0, READ), OK);
    // UNMAP may name more.
    assert_eq!(driver.unmap(1, 0, u64::MAX), OK);
    assert_eq!(driver.map(1, range.0, range.1, 0, READ), OK);
}

#[test]
fn row_33_map_whose_target_does_not_fit() {
    let (_device, mut driver) = attached();
    let top = u64::MAX - 0xfff;
    assert_eq!(driver.map(1, 0, 0x1fff, top, READ), RANGE);
    assert_eq!(driver.map(1, 0x1000, u64::MAX, 0x2000, READ), RANGE);
    assert_eq!(driver.map(1, 0, 0xfff, top, READ), OK, "the last page is one");
}

#[test]
fn row_33_all_addresses_in_one_map() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    driver.attach(1, BARE);
    assert_eq!(driver.map(1, 0, u64::MAX, 0, READ | WRITE), OK);
    assert_eq!(device.iommu.stats().mappings_live, 1);
    let mut dma = driver.dma(&device, BARE);
    for address in [0, 0xfff, 0x1234, RAM / 2 - 2, RAM - 4] {
        dma.write(address, b"data").unwrap();
        assert_eq!(driver.read(address, 4), b"data");
    }
    let mut reader = device.iommu.reader();
    let found = {
        let guard = reader.enter();
        let found = device.iommu.endpoint(BARE).translate(&guard, u64::MAX, viommu_trace::event::Access::Read);
        found.unwrap()
    };
    assert_eq!((found.gpa, found.len), (u64::MAX, 1));
    assert_eq!(driver.map(1, 0x1000, 0x1fff, 0, READ), INVAL);
    assert_eq!(driver.unmap(1, 0, u64::MAX - 1), RANGE);
    assert_eq!(driver.unmap(1, 1, u64::MAX), RANGE);
    dma.read(0, &mut [0]).unwrap();
    assert_eq!(driver.unmap(1, 0, u64::MAX), OK);
    dma.read(0, &mut [0]).unwrap_err();
    assert_eq!(driver.map(1, 0x1000, 0x1fff, 0, READ), OK);
}

#[test]
fn row_34_permissions() {
    let (device, mut driver) = attached();
    let mut dma = driver.dma(&device, EP);
    for flags in 0..4 {
        let page = 0x1000 * u64::from(flags);
        assert_eq!(driver.map(1, page, page + 0xfff, 0x10_0000 + page, flags), OK, "flags {flags}");
        assert_eq!(dma.read(page, &mut [0; 8]).is_ok(), flags & READ != 0, "read, flags {flags}");
        assert_eq!(dma.write(page, &[1; 8]).is_ok(), flags & WRITE != 0, "write, flags {flags}");
        let expected = if flags & WRITE != 0 { 1 } else { 0 };
        assert_eq!(driver.read(0x10_0000 + page, 8), [expected; 8]);
    }
}

#[test]
fn row_35_map_over_a_reserved_region() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, HOLED);
    for region in [MSI, HOLE] {
        let (start, end) = (region.start, region.end);
        let ranges = [
            (start, end),
            (start, start + 0xfff),
            (end - 0xfff, end),
            (start - 0x1000, start + 0xfff),
            (end - 0xfff, end + 0x1000),
            (start - 0x1000, end + 0x1000),
        ];
        for (start, end) in ranges {
            assert_eq!(driver.map(1, start, end, 0, READ), INVAL, "[{start:#x}, {end:#x}]");
        }
        assert_eq!(driver.map(1, start - 0x1000, start - 1, 0, READ), OK);
        assert_eq!(driver.map(1, end + 1, end + 0x1000, 0, READ), OK);
    }
    assert_eq!(driver.map(1, 0, u64::MAX, 0, READ), INVAL);
}

#[test]
fn row_36_unmap_of_nothing() {
    let (_device, mut driver) = attached();
    assert_eq!(driver.unmap(1, 0, 0xfff), OK);
    assert_eq!(driver.unmap(1, 5, 5), OK);
    assert_eq!(driver.unmap(1, 0, u64::MAX), OK);
    driver.map(1, 0x1000, 0x1fff, 0, READ);
    driver.map(1, 0x5000, 0x5fff, 0, READ);
    assert_eq!(driver.unmap(1, 0x2000, 0x4fff), OK, "between two");
}

#[test]
fn row_37_unmap_removes_whatever_is_fully_inside() {
    let (device, mut driver) = attached();
    let mut dma = driver.dma(&device, EP);
    let live = || device.iommu.stats().mappings_live;
    for (start, end) in [(0x1000, 0x5fff), (0x1000, 0x6000), (0xfff, 0x5fff), (0x123, 0x6789), (0, u64::MAX)] {
        driver.map(1, 0x1000, 0x1fff, 0x10_0000, READ);
        driver.map(1, 0x3000, 0x4fff, 0x10_0000, READ);
        driver.map(1, 0x5000, 0x5fff, 0x10_0000, READ);
        assert_eq!(live(), 3);
        assert_eq!(driver.unmap(1, start, end), OK);
        assert_eq!(live(), 0, "[{start:#x}, {end:#x}]");
        dma.read(0x1000, &mut [0]).unwrap_err();
        dma.read(0x4fff, &mut [0]).unwrap_err();
    }
    // Mappings outside stay.
    driver.map(1, 0x1000, 0x1fff, 0x10_0000, READ);
    driver.map(1, 0x2000, 0x2fff, 0x10_0000, READ);
    driver.map(1, 0x3000, 0x3fff, 0x10_0000, READ);
    assert_eq!(driver.unmap(1, 0x2000, 0x2fff), OK);
    dma.read(0x1fff, &mut [0]).unwrap();
    dma.read(0x2000, &mut [0]).unwrap_err();
    dma.read(0x3000, &mut [0]).unwrap();
}

#[test]
fn row_38_unmap_that_splits_removes_nothing() {
    let (device, mut driver) = attached();
    let mut dma = driver.dma(&device, EP);
    // 64 mappings that fit, and one that straddles the end; then one that straddles the start.
    for page in 0..64 {
        driver.map(1, page << 12, (page << 12) + 0xfff, 0x10_0000, READ);
    }
    driver.map(1, 64 << 12, (66 << 12) - 1, 0x10_0000, READ);
    assert_eq!(driver.unmap(1, 0, (65 << 12) - 1), RANGE);
    assert_eq!(driver.unmap(1, 0, 64 << 12), RANGE);
    assert_eq!(driver.unmap(1, 65 << 12, 100 << 12), RANGE);
    assert_eq!(driver.unmap(1, 0x10, 0xfff), RANGE, "inside of one page");
    assert_eq!(driver.unmap(1, 0x10, 0x20), RANGE);
    assert_eq!(device.iommu.stats().mappings_live, 65);
    for page in 0..66 {
        dma.read(page << 12, &mut [0]).unwrap();
    }
    assert_eq!(driver.unmap(1, 0, (66 << 12) - 1), OK);
    assert_eq!(device.iommu.stats().mappings_live, 0);
}

#[test]
fn row_38_large_pages_are_not_split_either() {
    let (device, mut driver) = attached();
    let (two_mib, one_gib) = (2 << 20, 1 << 30);
    driver.map(1, 0, two_mib - 1, 0, READ);
    driver.map(1, one_gib, 2 * one_gib - 1, 0, READ);
    assert_eq!(driver.unmap(1, 0, 0xfff), RANGE);
    assert_eq!(driver.unmap(1, two_mib - 0x1000, two_mib - 1), RANGE);
    assert_eq!(driver.unmap(1, one_gib + two_mib, one_gib + 2 * two_mib - 1), RANGE);
    assert_eq!(driver.unmap(1, 0, one_gib), RANGE);
    assert_eq!(device.iommu.stats().mappings_live, 2);
    assert_eq!(driver.unmap(1, 0, 2 * one_gib - 1), OK);
}

#[test]
fn row_39_unmap_in_an_unknown_domain() {
    let (_device, mut driver) = attached();
    assert_eq!(driver.unmap(2, 0, 0xfff), NOENT);
    driver.detach(1, EP);
    assert_eq!(driver.unmap(1, 0, 0xfff), NOENT);
}

/// UNMAP may refuse reserved bytes that are not zero, and here it does; DETACH and PROBE must ignore them.
#[test]
fn row_40_reserved_bytes() {
    let (device, mut driver) = attached();
    driver.map(1, 0, 0xfff, 0, READ);
    let request = Unmap { reserved: [0, 0, 0, 1], ..unmap(1, 0, 0xfff) };
    assert_eq!(driver.request(&request), INVAL);
    assert_eq!(device.iommu.stats().mappings_live, 1);
    let request = Probe { reserved: [0xff; 64], ..probe(EP) };
    assert_eq!(driver.transact(&[Part::R(request.bytes()), Part::W(516)]).status(), OK);
    let request = Detach { reserved: [0xff; 8], ..detach(1, EP) };
    assert_eq!(driver.request(&request), OK);
}

#[test]
fn tables_are_limited() {
    let limits = Limits { table_bytes: 1 << 20, ..Limits::default() };
    let (device, mut driver) = attached_with(Device::with(|settings| settings.limits = limits));
    // One page in each GiB needs a table of its own.
    let page = |count: u64| (count << 30, (count << 30) + 0xfff);
    let fitting = (0..4096).take_while(|&count| driver.map(1, page(count).0, page(count).1, 0, READ) == OK).count();
    assert!((32..4096).contains(&fitting), "{fitting}");
    let full = device.iommu.stats();
    assert!(full.table_bytes <= 1 << 20, "{full:?}");
    assert_eq!(full.mappings_live, fitting as u64);
    assert_eq!(driver.map(1, page(4095).0, page(4095).1, 0, READ), NOMEM);
    // Existing mappings still work, and freed room can be used again.
    driver.dma(&device, EP).read(0, &mut [0]).unwrap();
    assert_eq!(driver.unmap(1, 0, u64::MAX), OK);
    assert_eq!(driver.map(1, page(4095).0, page(4095).1, 0, READ), OK);
}
