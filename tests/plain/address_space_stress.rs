//! Four readers beside a writer that maps and unmaps as fast as it can.
//!
//! Each MAP of a page leads to an address that names the page and a generation. When the removal is acknowledged, that is
//! after `synchronize`, the writer publishes the generation as gone. A reader that, inside its section, holds a translation
//! of a generation that is gone has used a removed translation.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use viommu::iommu::address_space::{AddressSpace, Budget};
use viommu::iommu::grace::Grace;
use viommu_wire::virtio_iommu::MapFlags;

const READERS: u64 = 4;
const PAGES: u64 = 256;
/// Half of the pages share a table. The others are two in each 2 MiB, so that tables are made and removed, and single
/// pages too.
fn iova(page: u64) -> u64 {
    let number = page / 2;
    if page.is_multiple_of(2) { number << 12 } else { ((number / 2 + 1) << 21) | ((number % 2) << 12) }
}

/// Scatters numbers.
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (number ^ (number >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32
}

/// How often each thing happened.
#[derive(Debug, Default)]
struct Counters {
    pairs: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    /// A removed translation was used after the removal had been acknowledged.
    stale: AtomicU64,
    /// A translation that was never made.
    wrong: AtomicU64,
}

/// Runs until the time is over or a reader has seen what it must not.
fn run(time: Duration, acknowledge: impl Fn(&Grace) + Sync) -> Counters {
    let grace = Grace::new();
    let budget = Budget::new(64 << 20);
    let space = AddressSpace::new(grace.clone(), budget.clone());
    let gone: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let counts = Counters::default();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for number in 0..READERS {
            let (grace, space, gone, counts, stop) = (&grace, &space, &gone, &counts, &stop);
            scope.spawn(move || {
                let mut reader = grace.reader();
                let mut random = number + 1;
                while !stop.load(SeqCst) {
                    random += READERS;
                    if random % 2048 < READERS {
                        // Four readers have to share the processors. A reader that is preempted in a section, which
                        // still happens, makes the writer wait for a time slice of the scheduler.
                        thread::yield_now();
                    }
                    let page = mix(random) % PAGES;
                    let guard = reader.enter();
                    let Some(found) = space.lookup(&guard, iova(page) + 5) else {
                        counts.misses.fetch_add(1, SeqCst);
                        continue;
                    };
                    // A device uses the translation for a moment.
                    for step in 0..random % 256 {
                        black_box(step);
                    }
                    let last_gone = gone[page as usize].load(SeqCst);
                    drop(guard);
                    let (of_page, generation) = (found.phys >> 44, (found.phys >> 12) & ((1 << 32) - 1));
                    counts.hits.fetch_add(1, SeqCst);
                    if of_page != page || found.phys & 0xfff != 5 || found.flags != MapFlags::READ {
                        counts.wrong.fetch_add(1, SeqCst);
                    }
                    if generation <= last_gone {
                        counts.stale.fetch_add(1, SeqCst);
                    }
                }
            });
        }
        let end = Instant::now() + time;
        // The generation of each page's mapping, 0 if there is none.
        let mut mapped = [0; PAGES as usize];
        for generation in 1.. {
            let enough = || [&counts.pairs, &counts.hits, &counts.misses].iter().all(|count| count.load(SeqCst) > 100);
            let over = Instant::now() > end && enough();
            if over || counts.stale.load(SeqCst) + counts.wrong.load(SeqCst) > 0 {
                break;
            }
            let page = (mix(generation) % PAGES) as usize;
            let start = iova(page as u64);
            if mapped[page] == 0 {
                mapped[page] = generation;
                space.map(start, start + 0xfff, (page as u64) << 44 | generation << 12, MapFlags::READ).unwrap();
            } else {
                assert_eq!(space.unmap(start, start + 0xfff).unwrap().mappings, 1);
                acknowledge(&grace);
                gone[page].store(std::mem::take(&mut mapped[page]), SeqCst);
                counts.pairs.fetch_add(1, SeqCst);
            }
        }
        stop.store(true, SeqCst);
    });
    drop(space);
    grace.synchronize();
    assert_eq!(budget.used(), 0);
    counts
}

#[test]
fn no_removed_translation_is_used_after_the_acknowledgement() {
    let seconds = std::env::var("VIOMMU_STRESS_SECONDS").map_or(3, |text| text.parse().expect("a number of seconds"));
    let counts = run(Duration::from_secs(seconds), Grace::synchronize);
    println!("{counts:?}");
    assert_eq!((counts.stale.into_inner(), counts.wrong.into_inner()), (0, 0));
    assert!(counts.pairs.into_inner() > 100 && counts.hits.into_inner() > 100 && counts.misses.into_inner() > 100);
}

/// Shows that the test above can fail: without a grace period it does.
#[test]
fn the_stress_finds_a_missing_grace_period() {
    let counts = run(Duration::from_secs(60), |_| ());
    println!("Without a grace period: {counts:?}");
    assert_ne!(counts.stale.into_inner(), 0);
}
