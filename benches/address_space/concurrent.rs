//! How much slower a reader is beside a writer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::{LAYOUTS, Radix, Set, Subject, below, mix};

/// Pairs a second that the writer does.
pub const RATE: u64 = 100_000;
const ROUNDS: usize = 11;
const ROUND: Duration = Duration::from_millis(400);
/// Live mappings: the reader's and the writer's alternate, so that they share cache lines.
const COUNT: u64 = 100_000;

/// The medians of the rounds.
pub struct Beside {
    /// Nanoseconds a translation, the reader alone.
    pub alone: f64,
    /// The same while the writer runs.
    pub beside: f64,
    /// The median of the ratios of the two in adjacent rounds.
    pub ratio: f64,
    /// How many pairs a second the writer really did.
    pub pairs: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Translates for a round and returns nanoseconds a translation.
fn read(radix: &Radix, set: Set) -> f64 {
    let mut reader = radix.grace.reader();
    let (mut step, mut last, mut done) = (0u64, 0, 0u32);
    let begin = Instant::now();
    loop {
        for _ in 0..1000 {
            step = step.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let index = below(step.wrapping_add(last << 12), set.count) & !1;
            let guard = reader.enter();
            last = radix.space.lookup(&guard, set.iova(index)).map_or(0, |found| found.phys);
            assert!(last != 0);
        }
        done += 1000;
        if begin.elapsed() >= ROUND {
            return begin.elapsed().as_nanos() as f64 / f64::from(done);
        }
    }
}

/// Removes and makes mappings at the rate until it is stopped; each removal waits for its grace period.
fn write(radix: &Radix, set: Set, stop: &AtomicBool, pairs: &AtomicU64) {
    let begin = Instant::now();
    let mut done = 0;
    while !stop.load(Relaxed) {
        if done >= begin.elapsed().as_nanos() as u64 * RATE / 1_000_000_000 {
            std::hint::spin_loop();
            continue;
        }
        done += 1;
        let index = below(mix(done), set.count) | 1;
        let start = set.iova(index);
        assert!(radix.space.unmap(start, start + 4095).is_ok_and(|removed| removed.mappings == 1));
        radix.grace.synchronize();
        assert!(radix.space.map(start, start + 4095, Set::phys(index), super::RW).is_ok());
    }
    pairs.fetch_add(done, Relaxed);
}

/// Alternates rounds with and without a writer.
pub fn measure() -> Beside {
    let set = Set { layout: LAYOUTS[0], count: COUNT };
    let mut radix = Radix::new();
    for index in 0..COUNT {
        assert!(radix.map(set.iova(index), Set::phys(index)));
    }
    let (mut alone, mut beside, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let pairs = AtomicU64::new(0);
    for _ in 0..ROUNDS {
        let first = read(&radix, set);
        let stop = AtomicBool::new(false);
        let second = std::thread::scope(|scope| {
            scope.spawn(|| write(&radix, set, &stop, &pairs));
            let time = read(&radix, set);
            stop.store(true, Relaxed);
            time
        });
        alone.push(first);
        beside.push(second);
        ratios.push(second / first);
    }
    let seconds = ROUND.as_secs_f64() * ROUNDS as f64;
    Beside {
        alone: median(alone),
        beside: median(beside),
        ratio: median(ratios),
        pairs: pairs.into_inner() as f64 / seconds,
    }
}
