//! The device against a naive model, page by page: after any requests, both must give the same statuses and translate
//! the same addresses in the same way.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use viommu::iommu::grace::Reader;
use viommu::iommu::{Endpoint, EndpointSettings, Iommu, Request, Settings};
use viommu_testkit::frontend::split::{PAGE, link_bytes, range};
use viommu_testkit::frontend::{EP, IntoBytesRequest, READ, WRITE, attach, detach, map, unmap};
use viommu_trace::Tracer;
use viommu_trace::event::Access;
use viommu_wire::split::request_type::*;
use viommu_wire::virtio_iommu::Status;

/// The pages that are used. They are around the border of a GiB, so there are several tables.
const PAGES: u64 = 1100;
const BASE: u64 = (1 << 30) - 560 * PAGE;

#[derive(Clone, Debug)]
enum Step {
    /// MAP or UNMAP, to this target.
    Map(u64, u64, u64),
    Unmap(u64, u64),
    Reserve(u64, u64),
    /// Extents of this many granules from this page on.
    Link {
        start: u64,
        extents: Vec<(u64, u64)>,
        flags: u32,
        tag: u64,
    },
    Unlink(u64, u64),
    /// RELEASE of the n-th reservation, with its end off by this many pages.
    Release(usize, i64),
    /// The same for the n-th mapping.
    UnmapExactly(usize),
    /// LINK from the n-th page of the n-th reservation on.
    LinkInside(usize, u64, Vec<(u64, u64)>, u64),
    /// DETACH, or ATTACH if that was done.
    DetachOrAttach,
}

fn pages() -> impl Strategy<Value = (u64, u64)> {
    let len = prop_oneof![6 => 1u64..24, 2 => 1u64..200, 1 => 480u64..700];
    (0..PAGES, len).prop_map(|(first, len)| (first, (first + len).min(PAGES) - 1))
}

fn extents() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0u64..1 << 20, prop_oneof![8 => 1u64..4, 1 => 1u64..600]), 1..6)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (pages(), 0u64..1 << 20).prop_map(|((first, last), target)| Step::Map(first, last, target)),
        2 => pages().prop_map(|(first, last)| Step::Unmap(first, last)),
        4 => pages().prop_map(|(first, last)| Step::Reserve(first, last)),
        2 => (0..PAGES, extents(), 0u32..4, any::<u64>())
            .prop_map(|(start, extents, flags, tag)| Step::Link { start, extents, flags, tag }),
        8 => (any::<usize>(), 0u64..100, extents(), any::<u64>())
            .prop_map(|(which, page, extents, tag)| Step::LinkInside(which, page, extents, tag)),
        6 => pages().prop_map(|(first, last)| Step::Unlink(first, last)),
        3 => (any::<usize>(), prop_oneof![4 => Just(0i64), 1 => -1i64..=1]).prop_map(|(which, off)| Step::Release(which, off)),
        2 => any::<usize>().prop_map(Step::UnmapExactly),
        3 => Just(Step::DetachOrAttach),
    ]
}

/// A page's target, permissions and tag.
type Page = (u64, u32, u64);

/// Ranges of pages, both ends inclusive, and the target of each page.
#[derive(Default)]
struct Model {
    mappings: Vec<(u64, u64)>,
    reservations: Vec<(u64, u64)>,
    pages: BTreeMap<u64, Page>,
    /// The endpoint is not attached to the domain.
    detached: bool,
}

fn meet(ranges: &[(u64, u64)], first: u64, last: u64) -> bool {
    ranges.iter().any(|range| range.0 <= last && first <= range.1)
}

impl Model {
    /// Whether the domain exists.
    fn exists(&self) -> bool {
        !self.detached || !self.reservations.is_empty()
    }

    fn detach(&mut self) {
        self.detached = true;
        for (first, last) in self.mappings.drain(..) {
            self.pages.retain(|page, _| !(first..=last).contains(page));
        }
    }

    fn inside_one(&self, first: u64, last: u64) -> bool {
        self.reservations.iter().any(|range| range.0 <= first && last <= range.1)
    }

    fn map(&mut self, first: u64, last: u64, target: u64) -> Status {
        if self.detached {
            return Status::NoEnt;
        }
        if meet(&self.mappings, first, last) || meet(&self.reservations, first, last) {
            return Status::Inval;
        }
        self.mappings.push((first, last));
        self.pages.extend((first..=last).map(|page| (page, (target + page - first, READ | WRITE, 0))));
        Status::Ok
    }

    fn unmap(&mut self, first: u64, last: u64) -> Status {
        if self.detached {
            return Status::NoEnt;
        }
        if meet(&self.reservations, first, last) {
            return Status::Inval;
        }
        let inside = |range: &(u64, u64)| first <= range.0 && range.1 <= last;
        if self.mappings.iter().any(|range| meet(&[*range], first, last) && !inside(range)) {
            return Status::Range;
        }
        self.mappings.retain(|range| !inside(range));
        self.pages.retain(|page, _| !(first..=last).contains(page));
        Status::Ok
    }

    fn reserve(&mut self, first: u64, last: u64) -> Status {
        if !self.exists() {
            return Status::NoEnt;
        }
        if meet(&self.mappings, first, last) || meet(&self.reservations, first, last) {
            return Status::Inval;
        }
        self.reservations.push((first, last));
        Status::Ok
    }

    fn link(&mut self, start: u64, extents: &[(u64, u64)], flags: u32, tag: u64) -> Status {
        if !self.exists() {
            return Status::NoEnt;
        }
        let targets: Vec<u64> = extents.iter().flat_map(|&(target, count)| target..target + count).collect();
        let last = start + targets.len() as u64 - 1;
        if !self.inside_one(start, last) {
            return Status::Range;
        }
        if self.pages.range(start..=last).next().is_some() {
            return Status::Inval;
        }
        self.pages.extend((start..).zip(targets).map(|(page, target)| (page, (target, flags, tag))));
        Status::Ok
    }

    fn unlink(&mut self, first: u64, last: u64) -> (Status, u64) {
        if !self.exists() {
            return (Status::NoEnt, 0);
        }
        if !self.inside_one(first, last) {
            return (Status::Inval, 0);
        }
        let before = self.pages.len();
        self.pages.retain(|page, _| !(first..=last).contains(page));
        (Status::Ok, (before - self.pages.len()) as u64)
    }

    fn release(&mut self, first: u64, last: u64) -> (Status, u64) {
        if !self.reservations.contains(&(first, last)) {
            return (Status::NoEnt, 0);
        }
        let unlinked = self.unlink(first, last);
        self.reservations.retain(|range| *range != (first, last));
        unlinked
    }
}

struct Pair {
    iommu: Arc<Iommu>,
    endpoint: Arc<Endpoint>,
    reader: Reader,
    model: Model,
}

fn address(page: u64) -> u64 {
    BASE + page * PAGE
}

fn last_byte(page: u64) -> u64 {
    address(page) + PAGE - 1
}

impl Pair {
    fn new() -> Pair {
        let endpoints = vec![EndpointSettings { id: EP, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
        iommu.set_features(u64::MAX);
        let (endpoint, reader) = (iommu.endpoint(EP), iommu.reader());
        let pair = Pair { iommu, endpoint, reader, model: Model::default() };
        assert_eq!(pair.execute(&attach(1, EP, 0).bytes()).0, Status::Ok);
        pair
    }

    fn execute(&self, bytes: &[u8]) -> (Status, u64) {
        let request = Request::parse(bytes, self.iommu.features()).unwrap();
        let outcome = self.iommu.execute(&request, &mut []);
        self.iommu.synchronize();
        (outcome.status, outcome.granules)
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Map(first, last, target) => {
                let request = map(1, address(first), last_byte(last), target * PAGE, READ | WRITE);
                let expected = self.model.map(first, last, target);
                prop_assert_eq!(self.execute(&request.bytes()).0, expected);
            }
            Step::Unmap(first, last) => self.unmap(first, last)?,
            Step::UnmapExactly(which) => {
                if let Some(&(first, last)) = self.model.mappings.get(which % self.model.mappings.len().max(1)) {
                    self.unmap(first, last)?;
                }
            }
            Step::Reserve(first, last) => {
                let request = range(RESERVE, 1, address(first), last_byte(last), 0);
                let expected = self.model.reserve(first, last);
                prop_assert_eq!(self.execute(&request.bytes()).0, expected);
            }
            Step::Link { start, ref extents, flags, tag } => self.link(start, extents, flags, tag)?,
            Step::LinkInside(which, page, ref extents, tag) => {
                let count = self.model.reservations.len().max(1);
                if let Some(&(first, last)) = self.model.reservations.get(which % count) {
                    self.link(first + page % (last - first + 1), extents, READ, tag)?;
                }
            }
            Step::Unlink(first, last) => {
                let request = range(UNLINK, 1, address(first), last_byte(last), 0);
                let expected = self.model.unlink(first, last);
                prop_assert_eq!(self.execute(&request.bytes()), expected);
            }
            Step::Release(which, off) => {
                let count = self.model.reservations.len().max(1);
                if let Some(&(first, last)) = self.model.reservations.get(which % count) {
                    let last = last.saturating_add_signed(off).max(first);
                    let request = range(RELEASE, 1, address(first), last_byte(last), 0);
                    let expected = self.model.release(first, last);
                    prop_assert_eq!(self.execute(&request.bytes()), expected);
                }
            }
            Step::DetachOrAttach if self.model.detached => {
                prop_assert_eq!(self.execute(&attach(1, EP, 0).bytes()).0, Status::Ok);
                self.model.detached = false;
            }
            Step::DetachOrAttach => {
                prop_assert_eq!(self.execute(&detach(1, EP).bytes()).0, Status::Ok);
                self.model.detach();
            }
        }
        let stats = self.iommu.stats();
        prop_assert_eq!(stats.mappings_live, self.model.mappings.len() as u64);
        prop_assert_eq!(stats.reservations_live, self.model.reservations.len() as u64);
        let mapped: u64 = self.model.mappings.iter().map(|(first, last)| last - first + 1).sum();
        prop_assert_eq!(stats.linked_bytes, (self.model.pages.len() as u64 - mapped) * PAGE);
        Ok(())
    }

    fn unmap(&mut self, first: u64, last: u64) -> Result<(), TestCaseError> {
        let expected = self.model.unmap(first, last);
        prop_assert_eq!(self.execute(&unmap(1, address(first), last_byte(last)).bytes()).0, expected);
        Ok(())
    }

    fn link(&mut self, start: u64, extents: &[(u64, u64)], flags: u32, tag: u64) -> Result<(), TestCaseError> {
        let in_bytes: Vec<(u64, u64)> = extents.iter().map(|&(target, count)| (target * PAGE, count)).collect();
        let expected = self.model.link(start, extents, flags, tag);
        prop_assert_eq!(self.execute(&link_bytes(1, address(start), &in_bytes, flags, tag)).0, expected);
        Ok(())
    }

    /// Compares every page that the endpoint reaches through the domain, at its first and its last byte.
    fn compare(&mut self) -> Result<(), TestCaseError> {
        if self.model.detached {
            return Ok(());
        }
        for page in 0..PAGES {
            let expected = self.model.pages.get(&page);
            for (access, flag) in [(Access::Read, READ), (Access::Write, WRITE)] {
                for (iova, offset) in [(address(page), 0), (last_byte(page), PAGE - 1)] {
                    let guard = self.reader.enter();
                    let found = self.endpoint.translate(&guard, iova, access).ok().map(|found| (found.gpa, found.tag));
                    let expected = expected.filter(|page| page.1 & flag != 0);
                    prop_assert_eq!(found, expected.map(|page| (page.0 * PAGE + offset, page.2)), "page {}", page);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2_000,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn answers_like_a_naive_model(steps in prop::collection::vec(step(), 1..60)) {
        let mut pair = Pair::new();
        for (number, step) in steps.iter().enumerate() {
            pair.run(step)?;
            if number % 16 == 0 {
                pair.compare()?;
            }
        }
        pair.compare()?;
        pair.iommu.device_reset();
        let stats = pair.iommu.stats();
        prop_assert_eq!((stats.table_bytes, stats.linked_bytes, stats.reservations_live), (0, 0, 0));
    }
}
