//! What can be said in examples; the rest is `tests/plain/address_space.rs`. No system calls, so that Miri can run them.

use std::sync::Arc;

use super::node::node_bytes;
use super::{AddressSpace, Budget, MapError, Mapped, Mapping, Removed, Run, Splits, Walk};
use crate::iommu::grace::Grace;
use viommu_wire::virtio_iommu::MapFlags;

const PAGE: u64 = 4096;
/// The bytes charged for a table without tags.
const NODE: u64 = node_bytes(false);
const RW: MapFlags = MapFlags::READ.union(MapFlags::WRITE);

struct Space {
    grace: Arc<Grace>,
    budget: Arc<Budget>,
    space: AddressSpace,
}

impl Space {
    fn with_tables(tables: u64) -> Self {
        let (grace, budget) = (Grace::new(), Budget::new(tables * NODE));
        Space { space: AddressSpace::new(grace.clone(), budget.clone()), grace, budget }
    }

    fn at(&self, iova: u64) -> Option<Mapping> {
        let mut reader = self.grace.reader();
        let guard = reader.enter();
        self.space.lookup(&guard, iova)
    }

    fn map(&self, start: u64, end: u64, phys: u64) -> Result<(), MapError> {
        self.space.map(start, end, phys, RW)
    }

    /// Two consecutive mappings of a page. They take five tables where there are none.
    fn map_two(&self, start: u64) -> Result<(), MapError> {
        self.map(start, start + PAGE - 1, 0x3000).and_then(|()| self.map(start + PAGE, start + 2 * PAGE - 1, 0))
    }

    fn unmap(&self, start: u64, end: u64) -> Result<u64, Splits> {
        self.space.unmap(start, end).map(|removed| removed.mappings)
    }
}

#[test]
fn all_addresses_in_one_map_need_no_table() {
    let space = Space::with_tables(0);
    assert_eq!(space.map(0, u64::MAX, 0), Ok(()));
    assert_eq!(space.space.bytes(), 0);
    for iova in [0, 1, 0x1234_5678_9abc_def0, u64::MAX] {
        let found = space.at(iova).unwrap();
        assert_eq!((found.phys, found.flags), (iova, RW));
        assert!(found.len >= 1 && found.len - 1 <= u64::MAX - iova);
    }
    assert_eq!(space.map(0x5000, 0x5fff, 0), Err(MapError::Overlap));
    assert_eq!(space.unmap(0, u64::MAX - 1), Err(Splits));
    assert_eq!(space.unmap(1, u64::MAX), Err(Splits));
    assert_eq!(space.unmap(0, u64::MAX), Ok(1));
    assert_eq!(space.at(0), None);
}

#[test]
fn large_maps_are_few_tables() {
    let space = Space::with_tables(u64::MAX / NODE);
    // One page less than all: a table on each level at either end.
    assert_eq!(space.map(PAGE, u64::MAX - PAGE, 0x7000), Ok(()));
    assert_eq!(space.space.bytes(), 10 * NODE);
    assert_eq!(space.at(PAGE - 1), None);
    assert_eq!(space.at(PAGE).unwrap().phys, 0x7000);
    assert_eq!(space.at(1 << 40).unwrap().phys, (1 << 40) + 0x6000);
    assert_eq!(space.at(u64::MAX - PAGE).unwrap().phys, (u64::MAX - PAGE).wrapping_add(0x6000));
    assert_eq!(space.at(u64::MAX - PAGE + 1), None);
    assert_eq!(space.space.mappings(), 1);
}

#[test]
fn a_mapping_without_permissions_exists() {
    let space = Space::with_tables(10);
    space.space.map(0, PAGE - 1, 0, MapFlags::empty()).unwrap();
    assert_eq!(space.at(5), Some(Mapping { phys: 5, len: PAGE - 5, flags: MapFlags::empty(), tag: 0 }));
    assert_eq!(space.map(0, PAGE - 1, 0), Err(MapError::Overlap));
}

#[test]
fn row_36_to_38_unmap_takes_whole_mappings_only() {
    let space = Space::with_tables(100);
    for page in 0..65 {
        space.map(page * 2 * PAGE, page * 2 * PAGE + 2 * PAGE - 1, page << 20).unwrap();
    }
    // 64 of them lie inside and the last sticks out: nothing is removed.
    assert_eq!(space.unmap(0, 129 * PAGE - 1), Err(Splits));
    assert_eq!(space.unmap(1, 130 * PAGE - 1), Err(Splits));
    assert_eq!(space.unmap(PAGE, 2 * PAGE - 1), Err(Splits));
    assert_eq!(space.space.mappings(), 65);
    // Ends that are not aligned, and holes.
    assert_eq!(space.unmap(0, 2 * PAGE - 1), Ok(1));
    assert_eq!(space.unmap(17, 2 * PAGE - 1), Ok(0));
    assert_eq!(space.unmap(55, 4 * PAGE - 1), Ok(1));
    assert_eq!(space.unmap(4 * PAGE - 9, 1 << 50), Ok(63));
    assert_eq!(space.unmap(0, u64::MAX), Ok(0));
}

#[test]
fn row_46_the_last_byte_belongs_to_its_own_mapping() {
    let space = Space::with_tables(10);
    space.map(PAGE, 2 * PAGE - 1, 0xa000).unwrap();
    space.map(2 * PAGE, 3 * PAGE - 1, 0xe000).unwrap();
    assert_eq!(space.at(2 * PAGE - 1), Some(Mapping { phys: 0xafff, len: 1, flags: RW, tag: 0 }));
    assert_eq!(space.at(2 * PAGE), Some(Mapping { phys: 0xe000, len: PAGE, flags: RW, tag: 0 }));
}

#[test]
fn idle_tables_are_kept_and_given_up_for_others() {
    let space = Space::with_tables(5);
    space.map_two(0).unwrap();
    assert_eq!(space.unmap(0, PAGE - 1), Ok(1));
    assert_eq!(space.unmap(PAGE, 2 * PAGE - 1), Ok(1));
    assert_eq!(space.space.bytes(), 5 * NODE, "kept");
    // Five other tables fit only if the idle ones are freed.
    space.map_two(1 << 60).unwrap();
    assert_eq!(space.budget.used(), 5 * NODE);
    // Now nothing can be freed.
    assert_eq!(space.map(0, PAGE - 1, 0), Err(MapError::NoMemory));
    assert_eq!((space.at(0), space.space.mappings()), (None, 2));
    assert!(space.at(1 << 60).is_some());
    // A leaf takes the place of tables without mappings.
    assert_eq!(space.unmap(1 << 60, u64::MAX), Ok(2));
    space.map(1 << 60, (1 << 61) - 1, 0).unwrap();
    assert_eq!(space.space.bytes(), 0);
}

#[test]
fn a_lone_page_needs_no_table_of_its_own() {
    let space = Space::with_tables(5);
    let lone = (7 << 21) + 5 * PAGE;
    space.map(lone, lone + PAGE - 1, 0x9000).unwrap();
    assert_eq!(space.space.bytes(), 4 * NODE);
    assert_eq!(space.at(lone + 1), Some(Mapping { phys: 0x9001, len: PAGE - 1, flags: RW, tag: 0 }));
    assert_eq!((space.at(lone - 1), space.at(lone + PAGE)), (None, None));
    assert_eq!(space.map(lone, lone + PAGE - 1, 0), Err(MapError::Overlap));
    assert_eq!(space.map(7 << 21, (8 << 21) - 1, 0), Err(MapError::Overlap));
    assert_eq!(space.unmap(lone + 1, lone + PAGE - 1), Err(Splits));
    assert_eq!(space.unmap(lone - PAGE, lone + 9), Err(Splits));
    assert_eq!(space.unmap(lone + PAGE, lone + 3 * PAGE), Ok(0));
    // A second page makes it a table.
    space.map(lone + PAGE, lone + 2 * PAGE - 1, 0).unwrap();
    assert_eq!(space.space.bytes(), 5 * NODE);
    assert_eq!(space.at(lone).unwrap().phys, 0x9000);
    assert_eq!(space.unmap(0, lone + PAGE), Err(Splits));
    assert_eq!(space.unmap(0, lone + 2 * PAGE), Ok(2));
}

#[test]
fn a_target_beyond_52_bits_is_kept_exactly() {
    let space = Space::with_tables(5);
    space.map(0, PAGE - 1, u64::MAX - 0xfff).unwrap();
    assert_eq!(space.at(9), Some(Mapping { phys: u64::MAX - 0xfff + 9, len: PAGE - 9, flags: RW, tag: 0 }));
}

#[test]
fn a_guard_keeps_removed_tables_alive() {
    let space = Space::with_tables(100);
    let mut reader = space.grace.reader();
    space.map_two(0).unwrap();
    let guard = reader.enter();
    assert!(space.space.lookup(&guard, 0).is_some());
    assert_eq!(space.space.clear(), Removed { mappings: 2 });
    assert_eq!(space.space.bytes(), 0);
    assert_eq!(space.budget.used(), 5 * NODE, "not freed yet");
    assert_eq!(space.space.lookup(&guard, 0), None);
    drop(guard);
    space.grace.synchronize();
    assert_eq!(space.budget.used(), 0);
}

#[test]
fn an_address_space_gives_back_all_when_it_goes() {
    let Space { grace: _grace, budget, space } = Space::with_tables(100);
    for page in 0..10 {
        space.map(page << 21, (page << 21) + PAGE - 1, 0, RW).unwrap();
    }
    assert!(budget.used() > 0);
    drop(space);
    assert_eq!(budget.used(), 0);
}

#[test]
#[should_panic(expected = "another grace period")]
fn a_guard_of_another_grace_period_is_refused() {
    let space = Space::with_tables(0);
    let mut reader = Grace::new().reader();
    space.space.lookup(&reader.enter(), 0);
}

#[test]
fn linked_pages_are_mappings_of_their_own_with_a_tag() {
    let space = Space::with_tables(100);
    // Over the border of two tables, from two runs.
    let start = (1 << 21) - 2 * PAGE;
    let runs = [Run { phys: 0x7000, pages: 3 }, Run { phys: 0x1_0000, pages: 1 }];
    assert!(space.space.is_empty(0, u64::MAX));
    space.space.link(start, runs.into_iter(), RW, 7).unwrap();
    assert_eq!(space.space.mappings(), 4);
    for (page, phys) in [0x7000, 0x8000, 0x9000, 0x1_0000].into_iter().enumerate() {
        let found = space.at(start + page as u64 * PAGE + 5).unwrap();
        assert_eq!(found, Mapping { phys: phys + 5, len: PAGE - 5, flags: RW, tag: 7 });
    }
    assert!(!space.space.is_empty(start + 3 * PAGE, u64::MAX) && space.space.is_empty(start + 4 * PAGE, u64::MAX));
    // All or nothing.
    let again = std::iter::once(Run { phys: 0, pages: 9 });
    assert_eq!(space.space.link(start - 8 * PAGE, again, RW, 8), Err(MapError::Overlap));
    assert_eq!((space.at(start - PAGE), space.space.mappings()), (None, 4));
    // Each can be removed alone.
    let bytes = space.space.bytes();
    assert_eq!(space.unmap(start + PAGE, start + 2 * PAGE - 1), Ok(1));
    assert_eq!((space.at(start + PAGE), space.space.bytes()), (None, bytes));
    assert_eq!(space.unmap(0, u64::MAX), Ok(3));
}

#[test]
fn a_table_gets_tags_when_a_page_in_it_is_linked() {
    let space = Space::with_tables(100);
    space.map_two(0).unwrap();
    let before = space.space.bytes();
    let run = || std::iter::once(Run { phys: 0xa000, pages: 1 });
    space.space.link(4 * PAGE, run(), RW, 9).unwrap();
    assert_eq!(space.space.bytes(), before - NODE + node_bytes(true));
    assert_eq!(space.at(0).map(|found| (found.phys, found.tag)), Some((0x3000, 0)));
    assert_eq!(space.at(4 * PAGE).map(|found| (found.phys, found.tag)), Some((0xa000, 9)));
    // A MAP in place of linked pages has no tag, and a lone page stays one.
    assert_eq!(space.unmap(4 * PAGE, 5 * PAGE - 1), Ok(1));
    space.map(4 * PAGE, 5 * PAGE - 1, 0xb000).unwrap();
    assert_eq!(space.at(4 * PAGE).map(|found| (found.phys, found.tag)), Some((0xb000, 0)));
    space.map(1 << 30, (1 << 30) + PAGE - 1, 0xc000).unwrap();
    space.space.link((1 << 30) + PAGE, run(), RW, 9).unwrap();
    assert_eq!(space.at(1 << 30).map(|found| (found.phys, found.tag)), Some((0xc000, 0)));
    space.grace.synchronize();
    assert_eq!(space.budget.used(), space.space.bytes());
}

#[test]
fn a_link_without_memory_changes_nothing() {
    let space = Space::with_tables(6);
    // Four tables above, one with tags: two slots' worth. A second with tags does not fit.
    let start = (1 << 21) - PAGE;
    let two = std::iter::once(Run { phys: 0, pages: 2 });
    assert_eq!(space.space.link(start, two, RW, 1), Err(MapError::NoMemory));
    assert_eq!((space.at(start), space.space.mappings(), space.space.bytes()), (None, 0, 0));
    let one = std::iter::once(Run { phys: 0, pages: 1 });
    assert_eq!(space.space.link(start, one, RW, 1), Ok(()));
}

#[test]
fn a_walk_finds_links_as_runs_and_each_map_whole() {
    let space = Space::with_tables(1000);
    let link = |start, phys, pages, tag| {
        space.space.link(start, std::iter::once(Run { phys, pages }), RW, tag).unwrap();
    };
    // Over the border of two tables; then another tag, another target, and a hole.
    let start = (1 << 21) - 2 * PAGE;
    link(start, 0x7000, 4, 7);
    link(start + 4 * PAGE, 0xb000, 1, 7);
    link(start + 5 * PAGE, 0xc000, 1, 8);
    link(start + 6 * PAGE, 0x1_0000, 2, 8);
    link(start + 9 * PAGE, 0x1_3000, 1, 8);
    // Two MAPs that are consecutive in both spaces are two finds.
    space.map(1 << 40, (1 << 40) + 0xfff, 0x5000).unwrap();
    space.map((1 << 40) + 0x1000, (1 << 40) + 0x7f_ffff, 0x6000).unwrap();
    let mapped = |start, pages, phys, tag| Mapped { start, end: start + pages * PAGE - 1, phys, flags: RW, tag };
    let expected = [
        mapped(start, 5, 0x7000, Some(7)),
        mapped(start + 5 * PAGE, 1, 0xc000, Some(8)),
        mapped(start + 6 * PAGE, 2, 0x1_0000, Some(8)),
        mapped(start + 9 * PAGE, 1, 0x1_3000, Some(8)),
        mapped(1 << 40, 1, 0x5000, None),
        mapped((1 << 40) + PAGE, 0x7ff, 0x6000, None),
    ];
    let mut reader = space.grace.reader();
    let (mut walk, mut found, mut steps) = (Walk::default(), Vec::new(), 0);
    while walk.step(&space.space, &reader.enter(), |mapped| found.push(mapped)) {
        steps += 1;
    }
    assert_eq!(found, expected);
    assert!(steps >= 2, "one section must not be long");
}

#[test]
fn all_maps_go_and_all_links_stay() {
    let tables = 200;
    let space = Space::with_tables(tables);
    let link = |start: u64, pages| {
        space.space.link(start, [Run { phys: start ^ (1 << 45), pages }].into_iter(), RW, start | 1).unwrap();
    };
    let table = 512 * PAGE;
    // A lone page, pages in a table of their own, pages beside linked ones, leaves of several levels, and the last page.
    let maps = [
        (10 * table, 1),
        (20 * table, 3),
        (30 * table + 5 * PAGE, 1),
        (40 * table, 512),
        ((1 << 40) - 7 * PAGE, (1 << 28) + 14),
        (u64::MAX - PAGE + 1, 1),
    ];
    for (start, pages) in maps {
        space.map(start, start + (pages * PAGE - 1), 0x7000).unwrap();
    }
    let links = [(30 * table, 5), (30 * table + 6 * PAGE, 700), (50 * table, 1), (1 << 50, 512)];
    for (start, pages) in links {
        link(start, pages);
    }
    // More than a few tables are idle by now.
    for number in 0..40 {
        let start = (1 << 42) + number * table;
        space.map_two(start).unwrap();
        assert_eq!(space.unmap(start, start + 2 * PAGE - 1), Ok(2));
    }
    let linked: u64 = links.iter().map(|(_, pages)| pages).sum();
    assert_eq!(space.space.clear_maps(), Removed { mappings: maps.len() as u64 });
    assert_eq!(space.space.mappings(), linked);
    for (start, pages) in maps {
        for iova in [start, start + (pages / 2) * PAGE, start + (pages * PAGE - 1)] {
            assert_eq!(space.at(iova), None, "{iova:#x}");
        }
    }
    for (start, pages) in links {
        for page in 0..pages {
            let iova = start + page * PAGE;
            let found = space.at(iova).map(|found| (found.phys, found.tag));
            assert_eq!(found, Some(((start ^ (1 << 45)) + page * PAGE, start | 1)), "{iova:#x}");
        }
    }
    // All that is left serves the links: without them there is no table, and everything can be mapped.
    assert_eq!(space.space.clear_maps(), Removed { mappings: 0 });
    assert_eq!(space.unmap(0, u64::MAX), Ok(linked));
    space.grace.synchronize();
    assert_eq!(space.map(0, u64::MAX, 0), Ok(()));
    assert_eq!(space.space.bytes(), 0);
}
