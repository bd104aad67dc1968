//! The address space against a `BTreeMap` that does the same job, side by side.
//!
//! `cargo bench --bench address_space` measures map+unmap pairs and dependent translations (the address of each depends
//! on the result of the one before) at 10^3, 10^5 and 10^6 live mappings of 4 KiB, in random order: *dense*, one after
//! the other; *sparse*, one in every 2 MiB; and two in every 2 MiB. Then it measures a reader beside a writer. It ends
//! with a table, and writes the numbers to `target/bench/address_space.json`; it fails if a goal is missed. A translation
//! includes entering and leaving the read-side section; the `BTreeMap` is used without any lock.

#[path = "btree.rs"]
mod btree;
mod concurrent;
mod report;

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

use btree::BTree;
use criterion::{BenchmarkId, Criterion};
use viommu::iommu::address_space::{AddressSpace, Budget, Mapping};
use viommu::iommu::grace::{Grace, Reader};
use viommu_wire::virtio_iommu::MapFlags;

const RW: MapFlags = MapFlags::READ.union(MapFlags::WRITE);
const PAGE: u64 = 4096;

/// Where the mappings lie: bytes from one to the next.
#[derive(Clone, Copy)]
struct Layout {
    name: &'static str,
    stride: u64,
}

/// The address space stores a single page in 2 MiB in a special way, so there is also a case in which it cannot.
const LAYOUTS: [Layout; 3] = [
    Layout { name: "dense", stride: PAGE },
    Layout { name: "sparse", stride: 2 << 20 },
    Layout { name: "two-in-2M", stride: 1 << 20 },
];
const COUNTS: [u64; 3] = [1_000, 100_000, 1_000_000];

/// Scatters numbers over 64 bits.
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (number ^ (number >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Scales a number of 64 bits to one below `count`.
fn below(number: u64, count: u64) -> u64 {
    ((u128::from(number) * u128::from(count)) >> 64) as u64
}

/// `count` mappings.
#[derive(Clone, Copy)]
struct Set {
    layout: Layout,
    count: u64,
}

impl Set {
    fn iova(self, index: u64) -> u64 {
        0x1_0000_0000 + index * self.layout.stride
    }

    /// The target of mapping `index`. Targets are scattered, so that the next address can be computed from one.
    fn phys(index: u64) -> u64 {
        (mix(index + 1) >> 12) & !(PAGE - 1)
    }

    /// All indexes, in random order.
    fn shuffled(self) -> Vec<u64> {
        let mut order: Vec<u64> = (0..self.count).collect();
        for place in (1..order.len()).rev() {
            order.swap(place, below(mix(place as u64), place as u64 + 1) as usize);
        }
        order
    }
}

/// One of the two that are compared, used by one thread.
trait Subject {
    const NAME: &'static str;
    fn new() -> Self;
    fn map(&mut self, start: u64, phys: u64) -> bool;
    fn unmap(&mut self, start: u64) -> bool;
    fn translate(&mut self, iova: u64) -> Option<Mapping>;
}

impl Subject for BTree {
    const NAME: &'static str = "btree";
    fn new() -> Self {
        BTree::default()
    }
    #[inline]
    fn map(&mut self, start: u64, phys: u64) -> bool {
        BTree::map(self, start, start + PAGE - 1, phys, RW).is_ok()
    }
    #[inline]
    fn unmap(&mut self, start: u64) -> bool {
        BTree::unmap(self, start, start + PAGE - 1).is_ok_and(|removed| removed.mappings == 1)
    }
    #[inline]
    fn translate(&mut self, iova: u64) -> Option<Mapping> {
        self.lookup(iova)
    }
}

struct Radix {
    space: AddressSpace,
    reader: Reader,
    grace: Arc<Grace>,
}

impl Subject for Radix {
    const NAME: &'static str = "viommu";
    fn new() -> Self {
        let grace = Grace::new();
        let space = AddressSpace::new(grace.clone(), Budget::new(u64::MAX));
        Radix { space, reader: grace.reader(), grace }
    }
    #[inline]
    fn map(&mut self, start: u64, phys: u64) -> bool {
        self.space.map(start, start + PAGE - 1, phys, RW).is_ok()
    }
    #[inline]
    fn unmap(&mut self, start: u64) -> bool {
        self.space.unmap(start, start + PAGE - 1).is_ok_and(|removed| removed.mappings == 1)
    }
    #[inline]
    fn translate(&mut self, iova: u64) -> Option<Mapping> {
        let guard = self.reader.enter();
        self.space.lookup(&guard, iova)
    }
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    // SAFETY: Takes no pointer; it only makes the allocator give back what is free.
    unsafe { libc::malloc_trim(0) };
    viommu_testkit::process::resident()
}

/// Measures one subject with one set of mappings.
fn measure<S: Subject>(criterion: &mut Criterion, set: Set, report: &mut report::Report) {
    let order = set.shuffled();
    let before = resident();
    let mut subject = S::new();
    for index in &order {
        assert!(subject.map(set.iova(*index), Set::phys(*index)));
    }
    let bytes = resident().saturating_sub(before);
    drop(order);
    report.memory(set, S::NAME, bytes);

    let mut step = 0u64;
    let id = |what| BenchmarkId::new(format!("{}/{}", S::NAME, what), set.count);
    let mut group = criterion.benchmark_group(set.layout.name);
    group.bench_function(id("pair"), |bencher| {
        bencher.iter(|| {
            step += 1;
            let index = below(mix(step), set.count);
            assert!(subject.unmap(set.iova(index)));
            assert!(subject.map(set.iova(index), Set::phys(index)));
        });
    });
    let mut last = 0;
    group.bench_function(id("translate"), |bencher| {
        bencher.iter(|| {
            step = step.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let index = below(step.wrapping_add(last << 12), set.count);
            let found = subject.translate(set.iova(index));
            last = found.map_or(0, |found| found.phys);
            assert!(last != 0);
        });
    });
    group.finish();
    black_box(last);
}

/// The cost of an UNMAP with its grace period, when no reader is inside a section.
fn measure_grace(criterion: &mut Criterion) {
    let set = Set { layout: LAYOUTS[0], count: 100_000 };
    let mut subject = Radix::new();
    for index in set.shuffled() {
        assert!(subject.map(set.iova(index), Set::phys(index)));
    }
    let mut group = criterion.benchmark_group("grace");
    let mut step = 0u64;
    for readers in [1, 16] {
        let others: Vec<Reader> = (1..readers).map(|_| subject.grace.reader()).collect();
        group.bench_function(BenchmarkId::new("synchronize", readers), |bencher| {
            bencher.iter(|| subject.grace.synchronize());
        });
        group.bench_function(BenchmarkId::new("pair+synchronize", readers), |bencher| {
            bencher.iter(|| {
                step += 1;
                let index = below(mix(step), set.count);
                assert!(subject.unmap(set.iova(index)));
                subject.grace.synchronize();
                assert!(subject.map(set.iova(index), Set::phys(index)));
            });
        });
        drop(others);
    }
    group.finish();
}

fn main() -> ExitCode {
    let target = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap_or(std::path::Path::new("target"));
    let data = target.join("criterion");
    let mut criterion = Criterion::default()
        .output_directory(&data)
        .without_plots()
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(2))
        .sample_size(40)
        .configure_from_args();
    // `cargo test --benches` runs every benchmark once, to check that it runs.
    let test = std::env::args().any(|argument| argument == "--test");
    let mut report = report::Report::new();
    for layout in LAYOUTS {
        for count in if test { &COUNTS[..1] } else { &COUNTS[..] } {
            let set = Set { layout, count: *count };
            measure::<BTree>(&mut criterion, set, &mut report);
            measure::<Radix>(&mut criterion, set, &mut report);
        }
    }
    measure_grace(&mut criterion);
    criterion.final_summary();
    if !test {
        report.beside(concurrent::measure());
        let missed = report.finish(&data, &target.join("bench"));
        if missed > 0 {
            println!("{missed} goals were missed; on a machine that has other work to do that means nothing");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
