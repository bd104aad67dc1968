//! Rules S1 to S14, but for S12.

use viommu::dma::DmaError;
use viommu::iommu::Limits;
use viommu_testkit::accesses::*;
use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_trace::event::Access;
use viommu_wire::split::*;
use viommu_wire::virtio_iommu::{FaultReason, MapFlags, feature};

pub const KINDS: [u8; 3] = [request_type::RESERVE, request_type::UNLINK, request_type::RELEASE];

/// The reservation that most tests use: 64 granules.
pub const START: u64 = 0x10_0000;
pub const END: u64 = START + 64 * PAGE - 1;

/// A driver with that reservation.
pub fn reserved() -> (Device, Driver) {
    let (device, mut driver) = attached();
    assert_eq!(driver.reserve(START, END), OK);
    (device, driver)
}

/// Marks memory, so that [`read_at`] shows that it was reached.
fn mark(driver: &Driver, phys: u64) -> u64 {
    driver.write(phys, &phys.to_le_bytes());
    phys
}

#[test]
fn rule_s01_the_domain_exists() {
    let (_device, mut driver) = attached();
    for domain in [0, 2, u32::MAX] {
        for kind in KINDS {
            assert_eq!(driver.request(&range(kind, domain, START, END, 0)), NOENT);
        }
        let link = link_bytes(domain, START, &[(0x5000, 1)], READ, 0);
        assert_eq!(driver.transact(&[Part::R(link), Part::W(4)]).status(), NOENT);
    }
    // This is checked before anything else.
    let all_wrong = Range { flags: 7.into(), ..range(request_type::RESERVE, 2, 5, 1, 0) };
    assert_eq!(driver.request(&all_wrong), NOENT);
}

#[test]
fn rule_s01_the_domain_is_in_the_domain_range() {
    let (_device, mut driver) = attached_to(Device::with(|settings| settings.domain_range = (1, 9)));
    assert_eq!(driver.request(&range(request_type::RESERVE, 10, START, END, 0)), RANGE);
    assert_eq!(driver.request(&range(request_type::RESERVE, 9, START, END, 0)), NOENT);
}

#[test]
fn rule_s02_no_bypass_domain_and_no_unknown_flag() {
    let (device, mut driver) = reserved();
    for flags in [1, 1 << 31, u32::MAX] {
        for kind in KINDS {
            let request = Range { flags: flags.into(), ..range(kind, 1, START, END, 0) };
            assert_eq!(driver.request(&request), INVAL);
        }
    }
    for flags in [8, READ | 8, u32::MAX] {
        assert_eq!(driver.link(START, &[(0x5000, 1)], flags), INVAL);
    }
    assert_eq!(driver.link(START, &[(0x5000, 1)], MapFlags::MMIO.bits() | READ), OK);
    assert_eq!(driver.attach_bypass(2, EP2), OK);
    for kind in KINDS {
        assert_eq!(driver.request(&range(kind, 2, START, END, 0)), INVAL);
    }
    let link = link_bytes(2, START, &[(0x5000, 1)], READ, 0);
    assert_eq!(driver.transact(&[Part::R(link), Part::W(4)]).status(), INVAL);
    assert_eq!(device.iommu.stats().reservations_live, 1);
}

#[test]
fn rule_s02_mmio_needs_its_feature() {
    let device = Device::new();
    let mut driver = Driver::accepting(&device, !feature::MMIO);
    driver.attach(1, EP);
    driver.reserve(START, END);
    assert_eq!(driver.link(START, &[(0x5000, 1)], MapFlags::MMIO.bits() | READ), INVAL);
}

#[test]
fn rule_s03_aligned_ranges_inside_the_input_range() {
    let input = (0x1000, 0xffff_ffff);
    let (device, mut driver) = attached_to(Device::with(|settings| settings.input_range = input));
    assert_eq!(driver.reserve(START, END), OK);
    let ranges = [
        (START + 1, END),
        (START + 0x800, END),
        (START, END - 1),
        (START, END + 1),
        (START, START),
        (END + 1, START - 1),
        (END + 1, END),
        (0, 0xfff),
        (0, 0x1fff),
        (0xffff_f000, 0x1_0000_0fff),
        (0x1_0000_0000, 0x1_0000_0fff),
        (0, u64::MAX),
    ];
    for kind in KINDS {
        for (start, end) in ranges {
            let status = driver.request(&range(kind, 1, start, end, 0));
            assert_eq!(status, RANGE, "type {kind:#x}: [{start:#x}, {end:#x}]");
        }
    }
    for start in [START + 1, START + 0x800, 0, 0x1_0000_0000, u64::MAX - 0xfff, u64::MAX] {
        assert_eq!(driver.link(start, &[(0x5000, 1)], READ), RANGE, "{start:#x}");
    }
    // The range ends beyond the last address, and so does an extent.
    assert_eq!(driver.link(u64::MAX - 0xfff, &[(0x5000, 2)], READ), RANGE);
    assert_eq!(driver.link(START, &[(u64::MAX - 0xfff, 2)], READ), RANGE);
    assert_eq!(device.iommu.stats().linked_bytes, 0);
    assert_eq!(driver.link(START, &[(u64::MAX - 0xfff, 1)], READ), OK, "the last granule is one");
}

#[test]
fn rule_s03_the_granule_is_the_lowest_page_size() {
    let (device, mut driver) = attached_to(Device::with(|settings| settings.page_size_mask = 1 << 16));
    assert_eq!(driver.reserve(0x1000, 0xffff), RANGE);
    assert_eq!(driver.reserve(0, 0xf_ffff), OK);
    assert_eq!(driver.link(0x1000, &[(0x1_0000, 1)], READ), RANGE);
    assert_eq!(driver.link(0, &[(0x1000, 1)], READ), RANGE);
    mark(&driver, 0x12_f000);
    assert_eq!(driver.link(0, &[(0x1_0000, 1), (0x12_0000, 1)], READ), OK);
    assert_eq!(read_at(&driver, &device, 0x1_f000), Some(0x12_f000));
    assert_eq!(driver.unlink(0x1_0000, 0x1_0fff), RANGE);
    assert_eq!(driver.unlink(0x1_0000, 0x1_ffff), OK);
    assert_eq!(read_at(&driver, &device, 0x1_f000), None);
    assert_eq!(device.iommu.stats().linked_bytes, 0x1_0000);
}

#[test]
fn rule_s04_a_reservation_overlaps_nothing() {
    let (device, mut driver) = reserved();
    driver.map(1, 0x40_0000, 0x40_1fff, 0x5000, READ);
    driver.map(1, 0x60_0000, 0x7f_ffff, 0, READ);
    let taken = [
        (START, END),
        (START + PAGE, START + 2 * PAGE - 1),
        (START - PAGE, START + PAGE - 1),
        (END + 1 - PAGE, END + PAGE),
        (START - PAGE, END + PAGE),
        (0x40_1000, 0x40_1fff),
        (0x3f_f000, 0x40_0fff),
        (0x40_1000, 0x40_2fff),
        (0x60_1000, 0x60_1fff),
        (0x5f_f000, 0x60_0fff),
        (0, u64::MAX),
        (MSI.start, MSI.end),
        (MSI.start - PAGE, MSI.start + PAGE - 1),
        (MSI.end + 1 - PAGE, MSI.end + PAGE),
    ];
    for (start, end) in taken {
        assert_eq!(driver.reserve(start, end), INVAL, "[{start:#x}, {end:#x}]");
    }
    assert_eq!(device.iommu.stats().reservations_live, 1);
    for (start, end) in [(START - PAGE, START - 1), (END + 1, 0x3f_ffff), (0x40_2000, 0x5f_ffff)] {
        assert_eq!(driver.reserve(start, end), OK, "[{start:#x}, {end:#x}]");
    }
    // Regions of each endpoint in the domain count.
    assert_eq!(driver.reserve(HOLE.start, HOLE.end), OK);
    assert_eq!(driver.release(HOLE.start, HOLE.end), OK);
    assert_eq!(driver.attach(1, HOLED), OK);
    assert_eq!(driver.reserve(HOLE.start, HOLE.end), INVAL);
    // Addresses that were unmapped or released are free.
    assert_eq!(driver.unmap(1, 0x60_0000, 0x7f_ffff), OK);
    assert_eq!(driver.reserve(0x60_0000, 0x7f_ffff), OK);
    assert_eq!(driver.release(START, END), OK);
    assert_eq!(driver.reserve(START + PAGE, END), OK);
}

#[test]
fn rule_s04_is_about_the_endpoints_attached_at_the_time() {
    let (device, mut driver) = attached();
    assert_eq!(driver.reserve(HOLE.start, HOLE.end), OK);
    assert_eq!(driver.link(HOLE.start, &[(mark(&driver, 0x5000), 1)], READ), OK);
    // An endpoint with this region is attached: its own accesses do not reach the memory.
    assert_eq!(driver.attach(1, HOLED), OK);
    assert_eq!(device.iommu.stats().reservations_live, 1);
    assert_eq!(read_at(&driver, &device, HOLE.start), Some(0x5000));
    driver.dma(&device, HOLED).read(HOLE.start, &mut [0]).unwrap_err();
}

#[test]
fn rule_s04_all_addresses_can_be_one_reservation() {
    let (device, mut driver) = attached();
    assert_eq!(driver.attach(1, BARE), OK);
    assert_eq!(driver.detach(1, EP), OK);
    assert_eq!(driver.reserve(0, u64::MAX), OK);
    for page in [0, 1 << 63, u64::MAX - 0xfff] {
        assert_eq!(driver.link(page, &[(0x5000, 1)], READ), OK);
        driver.dma(&device, BARE).read(page, &mut [0]).unwrap();
    }
    assert_eq!(driver.unlink(0, u64::MAX), OK);
    assert_eq!(device.iommu.stats().linked_bytes, 0);
    assert_eq!(driver.release(0, u64::MAX), OK);
}

#[test]
fn rule_s05_link_lies_inside_one_reservation() {
    let (device, mut driver) = reserved();
    assert_eq!(driver.reserve(END + 1, END + 64 * PAGE), OK);
    let outside = [(START - PAGE, 1), (START - PAGE, 2), (END + 1 - PAGE, 2), (END + 64 * PAGE, 2), (0x80_0000, 1)];
    for (start, granules) in outside {
        assert_eq!(driver.link(start, &[(0x10_0000, granules)], READ), RANGE, "{granules} at {start:#x}");
    }
    assert_eq!(driver.link(START, &[(0x10_0000, 65)], READ), RANGE, "both together hold it, neither does");
    assert_eq!(device.iommu.stats().linked_bytes, 0);
    assert_eq!(driver.link(START, &[(0x10_0000, 64)], READ), OK);
    assert_eq!(driver.link(END + 1, &[(0x10_0000, 64)], READ), OK);
}

#[test]
fn rule_s06_count_and_granules_that_are_not_linked_yet() {
    let (device, mut driver) = attached();
    let end = START + 1024 * PAGE - 1;
    assert_eq!(driver.reserve(START, end), OK);
    let many: Vec<(u64, u64)> = (0..513).map(|page| (0x100_0000 + 2 * page * PAGE, 1)).collect();
    for extents in [&many[..0], &many[..513]] {
        assert_eq!(driver.link(START, extents, READ), INVAL, "{} extents", extents.len());
    }
    // More than the descriptors hold, by one extent and by one byte.
    for (count, len) in [(2, 40), (2, 47), (512, 32 + 511 * 8), (1, 32), (u32::MAX, 40)] {
        let mut bytes = link_head(1, START, 0, READ, count).bytes();
        bytes.resize(len, 0);
        assert_eq!(driver.transact(&[Part::R(bytes), Part::W(4)]).status(), INVAL, "{count} in {len}");
    }
    assert_eq!(device.iommu.stats().linked_bytes, 0);
    // Fewer than they hold are allowed.
    let mut bytes = link_bytes(1, START, &many[..2], READ, 0);
    bytes[28..32].copy_from_slice(&1u32.to_le_bytes());
    assert_eq!(driver.transact(&[Part::R(bytes), Part::W(4)]).status(), OK);
    assert_eq!(device.iommu.stats().linked_bytes, PAGE);
    for extents in [&[(0x5000, 1)][..], &[(0x5000, 2)], &[(0x5000, 1), (0x6000, 1)]] {
        assert_eq!(driver.link(START, extents, READ), INVAL, "linked already");
    }
    assert_eq!(driver.link(START + PAGE, &many[..512], READ), OK, "512 are taken");
    assert_eq!(device.iommu.stats().linked_bytes, 513 * PAGE);
    for (page, &(phys, _)) in many[..512].iter().enumerate().step_by(73) {
        mark(&driver, phys);
        assert_eq!(read_at(&driver, &device, START + PAGE + page as u64 * PAGE), Some(phys));
    }
}

#[test]
fn rule_s06_a_link_in_any_descriptors() {
    let (device, mut driver) = reserved();
    let bytes = link_bytes(1, START, &[(0x20_0000, 2), (0x30_0000, 1)], READ, 0);
    let cut: Vec<Part> = bytes.chunks(7).map(|part| Part::R(part.to_vec())).chain([Part::W(1), Part::W(3)]).collect();
    assert_eq!(driver.transact(&cut).status(), OK);
    let (_, writable) = driver
        .add_indirect(REQUESTS, &[Part::R(link_bytes(1, START + 3 * PAGE, &[(0x40_0000, 1)], READ, 0)), Part::W(4)]);
    driver.kick(REQUESTS);
    let (_, len) = driver.wait_used(REQUESTS);
    assert_eq!(driver.collect(len, &writable).status(), OK);
    for (page, phys) in [0x20_0000, 0x20_1000, 0x30_0000, 0x40_0000].into_iter().enumerate() {
        mark(&driver, phys);
        assert_eq!(read_at(&driver, &device, START + page as u64 * PAGE), Some(phys));
    }
}

#[test]
fn rule_s07_link_is_all_or_nothing() {
    let (device, mut driver) = attached();
    // Three tables of pages; the last granule is taken.
    let (start, end) = (0x100_0000, 0x100_0000 + 1536 * PAGE - 1);
    assert_eq!(driver.reserve(start, end), OK);
    assert_eq!(driver.link(end + 1 - PAGE, &[(0x5000, 1)], READ), OK);
    let errors: [(&[(u64, u64)], u8); 3] = [
        (&[(0x100_0000, 1000), (0x10_0000, 536)], INVAL),
        (&[(0x100_0000, 1000), (0x10_0000, 537)], RANGE),
        (&[(0x100_0000, 1000), (u64::MAX - 0xfff, 2)], RANGE),
    ];
    for (extents, status) in errors {
        assert_eq!(driver.link(start, extents, READ), status);
        assert_eq!(device.iommu.stats().linked_bytes, PAGE);
        for page in [0, 511, 512, 1023, 1024, 1534] {
            assert_eq!(read_at(&driver, &device, start + page * PAGE), None);
        }
    }
    assert_eq!(driver.link(start, &[(0x100_0000, 1000), (0x10_0000, 535)], READ), OK);
    for page in [0, 511, 512, 1023, 1024, 1534] {
        assert!(read_at(&driver, &device, start + page * PAGE).is_some());
    }
}

#[test]
fn rule_s08_unlink_splits_and_skips_holes() {
    let (device, mut driver) = reserved();
    for page in 0..64 {
        mark(&driver, 0x20_0000 + page * PAGE);
    }
    let linked = |driver: &Driver| -> Vec<u64> {
        (0..64).filter(|page| read_at(driver, &device, START + page * PAGE).is_some()).collect()
    };
    // One link of 32 granules, and two of one behind holes.
    assert_eq!(driver.link(START, &[(0x20_0000, 32)], READ), OK);
    assert_eq!(driver.link(START + 40 * PAGE, &[(0x22_8000, 1)], READ), OK);
    assert_eq!(driver.link(START + 63 * PAGE, &[(0x23_f000, 1)], READ), OK);
    let page = |page: u64| START + page * PAGE;
    // The middle page alone.
    assert_eq!(driver.unlink(page(16), page(17) - 1), OK);
    let expected: Vec<u64> = (0..16).chain(17..32).chain([40, 63]).collect();
    assert_eq!(linked(&driver), expected);
    assert_eq!(read_at(&driver, &device, page(15)), Some(0x20_f000));
    assert_eq!(read_at(&driver, &device, page(17)), Some(0x21_1000));
    // A range of only holes is allowed.
    assert_eq!(driver.unlink(page(16), page(17) - 1), OK);
    assert_eq!(driver.unlink(page(41), page(63) - 1), OK);
    // The end of a link, a hole, a link.
    assert_eq!(driver.unlink(page(30), page(41) - 1), OK);
    let expected: Vec<u64> = (0..16).chain(17..30).chain([63]).collect();
    assert_eq!(linked(&driver), expected);
    // Unlinked granules can be linked again.
    assert_eq!(driver.link(page(16), &[(0x21_0000, 1)], READ), OK);
    assert_eq!(driver.unlink(START, END), OK);
    assert_eq!(linked(&driver), [0; 0]);
    assert_eq!(device.iommu.stats().linked_bytes, 0);
    assert_eq!(device.iommu.stats().reservations_live, 1, "the reservation stays");
}

#[test]
fn rule_s08_unlink_lies_inside_one_reservation() {
    let (device, mut driver) = reserved();
    assert_eq!(driver.reserve(END + 1, END + PAGE), OK);
    assert_eq!(driver.link(START, &[(0x5000, 1)], READ), OK);
    for (start, end) in [(START - PAGE, END), (START, END + PAGE), (END + PAGE + 1, END + 2 * PAGE), (0, PAGE - 1)] {
        assert_eq!(driver.unlink(start, end), INVAL, "[{start:#x}, {end:#x}]");
    }
    assert_eq!(device.iommu.stats().linked_bytes, PAGE);
}

#[test]
fn rule_s08_unlink_takes_no_memory() {
    // All the memory is used: links over large aligned stretches, until nothing more fits.
    let limits = Limits { table_bytes: 200_000, ..Limits::default() };
    let (device, mut driver) = attached_to(Device::with(|settings| settings.limits = limits));
    let (start, end) = (1 << 30, (2 << 30) - 1);
    assert_eq!(driver.reserve(start, end), OK);
    let fitting =
        (0..64).take_while(|chunk| driver.link(start + (chunk << 24), &[(0, 4096)], READ) == OK).count() as u64;
    assert!((1..64).contains(&fitting), "{fitting}");
    let used = device.iommu.stats().table_bytes;
    for granule in (1..4095).step_by(97) {
        assert_eq!(driver.unlink(start + granule * PAGE, start + (granule + 1) * PAGE - 1), OK);
    }
    assert!(device.iommu.stats().table_bytes <= used);
    assert_eq!(driver.release(start, end), OK);
    assert_eq!(device.iommu.stats().linked_bytes, 0);
}

#[test]
fn rule_s09_release_names_a_reservation_exactly() {
    let (device, mut driver) = reserved();
    assert_eq!(driver.link(START + PAGE, &[(0x5000, 3)], READ), OK);
    for (start, end) in [
        (START, END - PAGE),
        (START + PAGE, END),
        (START - PAGE, END),
        (START, END + PAGE),
        (START + PAGE, START + 4 * PAGE - 1),
        (0x80_0000, 0x80_0fff),
    ] {
        assert_eq!(driver.release(start, end), NOENT, "[{start:#x}, {end:#x}]");
    }
    assert!(read_at(&driver, &device, START + PAGE).is_some(), "nothing has changed");
    assert_eq!(driver.release(START, END), OK);
    let stats = device.iommu.stats();
    assert_eq!((stats.linked_bytes, stats.reservations_live), (0, 0));
    assert_eq!(read_at(&driver, &device, START + PAGE), None, "what was linked has gone with it");
    assert_eq!(driver.release(START, END), NOENT, "once");
    assert_eq!(driver.link(START, &[(0x5000, 1)], READ), RANGE);
    assert_eq!(driver.unlink(START, END), INVAL);
    assert_eq!(driver.map(1, START, END, 0x5000, READ), OK, "the range is free");
}

#[test]
fn rule_s10_map_and_unmap_leave_reservations_alone() {
    let (device, mut driver) = reserved();
    assert_eq!(driver.link(START, &[(0x5000, 1)], READ), OK);
    assert_eq!(driver.map(1, START - PAGE, START - 1, 0x6000, READ), OK);
    assert_eq!(driver.map(1, END + 1, END + PAGE, 0x6000, READ), OK);
    let touching = [
        (START, START + PAGE - 1),
        (START + PAGE, START + 2 * PAGE - 1),
        (START - 2 * PAGE, START + PAGE - 1),
        (END + 1 - PAGE, END + PAGE),
        (0, 0xff_ffff),
    ];
    for (start, end) in touching {
        assert_eq!(driver.map(1, start, end, 0, READ), INVAL, "MAP [{start:#x}, {end:#x}]");
        assert_eq!(driver.unmap(1, start, end), INVAL, "UNMAP [{start:#x}, {end:#x}]");
    }
    assert_eq!(driver.unmap(1, 0, u64::MAX), INVAL);
    assert_eq!(driver.unmap(1, START - PAGE, START), INVAL, "one byte is enough");
    let stats = device.iommu.stats();
    assert_eq!((stats.mappings_live, stats.linked_bytes), (2, PAGE));
    assert!(read_at(&driver, &device, START).is_some());
    assert!(read_at(&driver, &device, START - PAGE).is_some());
    // Beside it everything works as usual.
    assert_eq!(driver.unmap(1, START - PAGE, START - 1), OK);
    assert_eq!(driver.unmap(1, END + 1, u64::MAX), OK);
    assert_eq!(driver.unlink(START, END), OK);
    assert_eq!(driver.map(1, START, START + PAGE - 1, 0, READ), INVAL, "still reserved");
}

#[test]
fn rule_s10_is_checked_before_existing_mappings() {
    let (device, mut driver) = reserved();
    assert_eq!(driver.map(1, END + 1, END + 2 * PAGE, 0x6000, READ), OK);
    assert_eq!(driver.unmap(1, END + 1, END + PAGE), RANGE, "it would split the mapping");
    assert_eq!(driver.unmap(1, START, END + PAGE), INVAL);
    // It comes after errors of the request alone.
    assert_eq!(driver.unmap(1, END, START), RANGE);
    assert_eq!(driver.map(1, START + 1, END, 0, READ), RANGE);
    assert_eq!(device.iommu.stats().mappings_live, 1);
}

#[test]
fn rule_s11_no_resources_nothing_changed() {
    let limits = Limits { table_bytes: 100_000, ..Limits::default() };
    let (device, mut driver) = attached_to(Device::with(|settings| settings.limits = limits));
    let (start, end) = (1 << 30, (2 << 30) - 1);
    assert_eq!(driver.reserve(start, end), OK);
    // Twenty tables of pages do not fit.
    assert_eq!(driver.link(start, &[(0x10_0000, 4096), (0, 4096), (0, 2048)], READ), NOMEM);
    let stats = device.iommu.stats();
    assert_eq!((stats.linked_bytes, stats.reservations_live), (0, 1));
    assert_eq!(read_at(&driver, &device, start), None);
    assert_eq!(read_at(&driver, &device, start + (4096 << 12)), None);
    assert_eq!(driver.link(start, &[(0x10_0000, 512)], READ), OK, "what fits is taken");
    // Reservations use the same budget.
    let page = |count: u64| (8 << 30) + 2 * count * PAGE;
    let fitting = (0..10_000).take_while(|&count| driver.reserve(page(count), page(count) + PAGE - 1) == OK).count();
    assert!((100..10_000).contains(&fitting), "{fitting}");
    assert_eq!(driver.reserve(page(fitting as u64), page(fitting as u64) + PAGE - 1), NOMEM);
    assert!(device.iommu.stats().table_bytes <= 100_000);
    assert_eq!(device.iommu.stats().reservations_live, fitting as u64 + 1);
    assert_eq!(driver.link(start + (1 << 21), &[(0x10_0000, 512)], READ), NOMEM);
    // Freed room can be used again.
    assert_eq!(driver.unlink(start, end), OK);
    for count in 0..fitting as u64 {
        assert_eq!(driver.release(page(count), page(count) + PAGE - 1), OK);
    }
    assert_eq!(driver.link(start + (1 << 21), &[(0x10_0000, 512)], READ), OK);
}

#[test]
fn rule_s13_an_access_to_a_granule_that_is_not_linked_faults() {
    let (device, mut driver) = reserved();
    let buffers = driver.add_event_buffers(3, 24);
    assert_eq!(driver.link(START + PAGE, &[(0x20_0000, 1)], READ), OK);
    assert_eq!(driver.link(START + 3 * PAGE, &[(0x30_0000, 1)], READ | WRITE), OK);
    let mut dma = driver.dma(&device, EP);
    let accesses = [(START, Access::Read), (START + PAGE, Access::Write), (START + 2 * PAGE, Access::Read)];
    for ((address, access), buffer) in accesses.into_iter().zip(buffers) {
        let result = match access {
            // Across the border of the linked pages: up to the border the access is done.
            Access::Read if address > START => dma.read(address - 8, &mut [0; 16]),
            Access::Read => dma.read(address, &mut [0; 16]),
            Access::Write => dma.write(address, &[0]),
        };
        assert_eq!(result, Err(DmaError::Fault { address, access }));
        let record = driver.wait_fault(buffer);
        assert_eq!((record.reason, record.address.get()), (FaultReason::Mapping as u8, address));
    }
    dma.write(START + 3 * PAGE, b"linked").unwrap();
    assert_eq!(driver.read(0x30_0000, 6), b"linked");
}

/// A reader in the middle of an access delays the answer.
#[test]
fn rule_s14_a_removal_waits_for_the_accesses_that_use_it() {
    let (device, mut driver) = reserved();
    let removals = [
        range(request_type::UNLINK, 1, START, START + PAGE - 1, 0).bytes(),
        range(request_type::RELEASE, 1, START, END, 0).bytes(),
        detach(1, EP).bytes(),
    ];
    for removal in removals {
        driver.reserve(START, END);
        assert_eq!(driver.link(START, &[(0x5000, 2)], READ) | driver.unlink(START + PAGE, START + 2 * PAGE - 1), OK);
        waits_for_access(&mut driver, &device, START, removal);
    }
    // The DETACH took the endpoint away from what is linked, which is there when it comes back.
    assert_eq!(driver.attach(1, EP), OK);
    assert!(read_at(&driver, &device, START).is_some());
    assert_eq!(driver.release(START, END), OK);
    // A request that removes nothing does not wait.
    let mut reader = device.iommu.reader();
    let guard = reader.enter();
    assert_eq!(driver.reserve(START, END), OK);
    assert_eq!(driver.link(START, &[(0x5000, 1)], READ), OK);
    assert_eq!(driver.unlink(START + PAGE, END), OK);
    assert_eq!(driver.reserve(END + 1, END + PAGE), OK);
    assert_eq!(driver.release(END + 1, END + PAGE), OK);
    drop(guard);
}

/// A page gets a new user as soon as its UNLINK is answered. The endpoint must never write into it from then on.
#[test]
fn rule_s14_a_page_is_free_when_its_unlink_is_answered() {
    let (device, mut driver) = reserved();
    let writers = Writers::start(&driver, &device, START);
    for round in 0..2000 {
        assert_eq!(driver.link(START, &[(0x5000, 2)], WRITE), OK);
        match round % 3 {
            0 => assert_eq!((driver.unlink(START, START + PAGE - 1), driver.unlink(START, END)), (OK, OK)),
            1 => assert_eq!((driver.release(START, END), driver.reserve(START, END)), (OK, OK)),
            _ => {
                // The page stays linked, but for nobody.
                assert_eq!(driver.detach(1, EP), OK);
                writers.assert_gone(&driver, 0x5000);
                assert_eq!((driver.unlink(START, END), driver.attach(1, EP)), (OK, OK));
            }
        }
        writers.assert_gone(&driver, 0x5000);
    }
    writers.end();
}
