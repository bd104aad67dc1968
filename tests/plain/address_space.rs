//! The address space against a naive one: both must give the same answers after any sequence of maps and unmaps.

#[path = "../../benches/address_space/btree.rs"]
mod btree;

use btree::BTree;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use viommu::iommu::address_space::{AddressSpace, Budget, MapError, Mapped, Walk};
use viommu::iommu::grace::{Grace, Reader};
use viommu_wire::virtio_iommu::MapFlags;

const PAGE: u64 = 4096;

/// Interesting addresses: the ends of the space, and borders between tables of each level.
const ANCHORS: [u64; 9] =
    [0, 1 << 21, (1 << 30) - (1 << 21), 1 << 30, 1 << 39, 1 << 48, 1 << 57, 1 << 63, 0u64.wrapping_sub(16 * PAGE)];

#[derive(Clone, Debug)]
enum Step {
    Map {
        start: u64,
        end: u64,
        phys: u64,
        flags: MapFlags,
    },
    Unmap {
        start: u64,
        end: u64,
    },
    /// Unmaps the n-th mapping, a byte off by as much at either side.
    UnmapExactly {
        which: usize,
        off: (i64, i64),
    },
    Lookup {
        iova: u64,
    },
    Clear,
}

/// A page number near an anchor. There are few of them, so that ranges meet.
fn page() -> impl Strategy<Value = u64> {
    let near = (0..ANCHORS.len(), -8i64..16)
        .prop_map(|(anchor, pages)| (ANCHORS[anchor] >> 12).wrapping_add_signed(pages) & (u64::MAX >> 12));
    prop_oneof![8 => near, 1 => any::<u64>().prop_map(|number| number >> 12)]
}

/// A range of whole pages, both ends inclusive.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let pages = prop_oneof![
        6 => 1u64..=24,
        1 => 500u64..=1100,
        1 => (0u32..=52).prop_map(|shift| 1 << shift),
        1 => (0u32..=52, -2i64..=2).prop_map(|(shift, off)| (1u64 << shift).wrapping_add_signed(off).max(1)),
    ];
    (page(), pages).prop_map(|(page, pages)| {
        let last = page.saturating_add(pages - 1).min(u64::MAX >> 12);
        (page << 12, (last << 12) | (PAGE - 1))
    })
}

/// A range that mostly is not of whole pages.
fn ragged_range() -> impl Strategy<Value = (u64, u64)> {
    let off = || prop_oneof![Just(0i64), -2i64..=2, -5000i64..=5000];
    (range(), off(), off()).prop_map(|((start, end), a, b)| {
        let (start, end) = (start.saturating_add_signed(a), end.saturating_add_signed(b));
        (start.min(end), start.max(end))
    })
}

fn step() -> impl Strategy<Value = Step> {
    let phys = (any::<u64>(), 0u32..=52).prop_map(|(phys, shift)| phys >> shift);
    let map = (range(), phys, 0u32..8).prop_map(|((start, end), phys, flags)| Step::Map {
        start,
        end,
        phys: phys & !(PAGE - 1),
        flags: MapFlags::from_bits_truncate(flags),
    });
    let off = || prop_oneof![3 => Just(0i64), 1 => -1i64..=1, 1 => -5000i64..=5000];
    prop_oneof![
        12 => map,
        4 => range().prop_map(|(start, end)| Step::Unmap { start, end }),
        4 => ragged_range().prop_map(|(start, end)| Step::Unmap { start, end }),
        8 => (any::<usize>(), off(), off()).prop_map(|(which, a, b)| Step::UnmapExactly { which, off: (a, b) }),
        4 => (page(), 0..PAGE).prop_map(|(page, byte)| Step::Lookup { iova: (page << 12) | byte }),
        1 => Just(Step::Clear),
    ]
}

struct Pair {
    real: AddressSpace,
    naive: BTree,
    reader: Reader,
}

impl Pair {
    /// Does a step on both sides and compares everything that it touched.
    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Map { start, end, phys, flags } => match self.real.map(start, end, phys, flags) {
                // This happens only with a small budget. Nothing has changed, which the later steps check.
                Err(MapError::NoMemory) => {}
                result => prop_assert_eq!(result, self.naive.map(start, end, phys, flags)),
            },
            Step::Unmap { start, end } => self.unmap(start, end)?,
            Step::UnmapExactly { which, off } => {
                let count = self.naive.ranges().count();
                let Some((start, end)) = self.naive.ranges().nth(which % count.max(1)) else { return Ok(()) };
                let (start, end) = (start.saturating_add_signed(off.0), end.saturating_add_signed(off.1));
                self.unmap(start.min(end), start.max(end))?;
            }
            Step::Lookup { iova } => self.compare_at(iova)?,
            Step::Clear => {
                self.real.clear();
                self.naive = BTree::default();
                prop_assert_eq!(self.real.bytes(), 0);
            }
        }
        if let Step::Map { start, end, .. } | Step::Unmap { start, end } = *step {
            for iova in [start, end, start.wrapping_sub(1), end.wrapping_add(1), start + (end - start) / 2] {
                self.compare_at(iova)?;
            }
        }
        prop_assert_eq!(self.real.mappings(), self.naive.ranges().count() as u64);
        Ok(())
    }

    fn unmap(&mut self, start: u64, end: u64) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.real.unmap(start, end), self.naive.unmap(start, end));
        Ok(())
    }

    fn compare_at(&mut self, iova: u64) -> Result<(), TestCaseError> {
        let guard = self.reader.enter();
        match (self.real.lookup(&guard, iova), self.naive.lookup(iova)) {
            (None, None) => {}
            (Some(real), Some(naive)) => {
                prop_assert_eq!((real.phys, real.flags), (naive.phys, naive.flags), "at {:#x}", iova);
                prop_assert!(real.len >= 1 && real.len <= naive.len, "{} of {}", real.len, naive.len);
            }
            (real, naive) => prop_assert!(false, "at {:#x}: {:?} instead of {:?}", iova, real, naive),
        }
        Ok(())
    }

    /// Row 46: compares the first and last byte of every mapping, and the bytes next to them.
    fn compare_all(&mut self) -> Result<(), TestCaseError> {
        let ranges: Vec<_> = self.naive.ranges().collect();
        for (start, end) in ranges {
            for iova in [start, end, start.wrapping_sub(1), end.wrapping_add(1)] {
                self.compare_at(iova)?;
            }
        }
        Ok(())
    }

    /// Checks that a walk finds exactly the mappings, each complete.
    fn compare_walk(&mut self) -> Result<(), TestCaseError> {
        let (mut walk, mut found) = (Walk::default(), Vec::new());
        while walk.step(&self.real, &self.reader.enter(), |mapped| found.push(mapped)) {}
        let naive: Vec<_> = self.naive.ranges().collect();
        let expected = naive.into_iter().filter_map(|(start, end)| {
            let mapping = self.naive.lookup(start)?;
            Some(Mapped { start, end, phys: mapping.phys, flags: mapping.flags, tag: None })
        });
        prop_assert_eq!(found, expected.collect::<Vec<_>>());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 10_000,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn answers_like_a_naive_map(
        steps in prop::collection::vec(step(), 1..60),
        limit in prop_oneof![3 => Just(u64::MAX), 1 => 0u64..200_000],
    ) {
        let grace = Grace::new();
        let budget = Budget::new(limit);
        let real = AddressSpace::new(grace.clone(), budget.clone());
        let mut pair = Pair { real, naive: BTree::default(), reader: grace.reader() };
        for step in &steps {
            pair.run(step)?;
            prop_assert!(budget.used() <= limit);
            prop_assert!(budget.used() >= pair.real.bytes());
        }
        pair.compare_all()?;
        pair.compare_walk()?;
        grace.synchronize();
        prop_assert_eq!(budget.used(), pair.real.bytes());
        prop_assert_eq!(pair.real.clear().mappings, pair.naive.ranges().count() as u64);
        prop_assert_eq!(pair.real.bytes(), 0);
        grace.synchronize();
        prop_assert_eq!(budget.used(), 0);
    }
}
