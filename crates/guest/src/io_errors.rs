//! I/O that may fail: which error an application gets, how long it waits for it, and how much memory the kernel keeps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use io_uring::IoUring;
use nix::errno::Errno;
use serde_json::{Value, json};
use viommu_wire::size;

use crate::blockdev::{self, Device};
use crate::buffers::Buffers;
use crate::results::Results;
use crate::workload::Workload;
use crate::{engine, sysfs};

/// The distance between reads, in blocks: the kernel would merge adjacent ones into one request.
const STRIDE: u64 = 3;
/// The pause between a failure and the next attempt, if there is one.
const PAUSE: Duration = Duration::from_millis(20);

/// Reads that may fail: which error comes when, and how much memory is left allocated.
#[derive(clap::Args)]
pub struct Args {
    /// Bytes an I/O: a multiple of 512.
    #[arg(long, default_value = "128k", value_parser = size::parse)]
    bs: u64,
    /// How many reads; their buffers' pages are scattered in physical memory.
    #[arg(long, default_value_t = 100)]
    ios: u64,
    /// How many reads at once; the next ones begin when all of these have ended.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: u16,
    /// If the last reads failed, continue until no read fails any more.
    #[arg(long)]
    recover: bool,
}

impl Workload for Args {
    /// The workload. Emits one `result`, whether reads fail or not: failures are what it looks for.
    ///
    /// # Errors
    /// If there is nothing to read from.
    fn run(&self, results: &mut Results) -> Result<()> {
        let device = Device::open(&blockdev::choose(None)?)?;
        ensure!(self.bs > 0 && self.bs <= device.bytes, "--bs: wanted 1 to {}, found {}", device.bytes, self.bs);
        let mut buffers = Buffers::new(self.depth.into(), self.bs as usize, true)?;
        let mut ring = IoUring::new(u32::from(self.depth).next_power_of_two()).context("The kernel has no io_uring")?;
        let before = Memory::now();
        let mut errors: BTreeMap<String, u64> = BTreeMap::new();
        let mut failed = Vec::new();
        let mut times_failed = Vec::new();
        let (mut ios, mut slowest, mut trouble) = (0, Duration::ZERO, false);
        while ios < self.ios || (self.recover && trouble) {
            if self.recover && trouble {
                std::thread::sleep(PAUSE);
            }
            let count = if ios < self.ios { (self.ios - ios).min(self.depth.into()) } else { self.depth.into() };
            let blocks = (ios..ios + count).map(|io| io * STRIDE % (device.bytes / self.bs));
            let begin = Instant::now();
            let reads = engine::read_at_once(&mut ring, &device, &mut buffers, blocks)?;
            let time = begin.elapsed();
            slowest = slowest.max(time);
            trouble = reads.iter().any(Result::is_err);
            for (io, error) in (ios..).zip(reads).filter_map(|(io, read)| Some((io, read.err()?))) {
                let name = error
                    .raw_os_error()
                    .map_or_else(|| error.to_string(), |code| format!("{:?}", Errno::from_raw(code)));
                *errors.entry(name).or_default() += 1;
                failed.push(io);
                times_failed.push(time.as_millis() as u64);
            }
            ios += count;
        }
        times_failed.sort_unstable();
        results.emit(
            "result",
            json!({
                "workload": "io-errors", "bs": self.bs, "ios": ios, "failed": failed.len(), "errors": errors,
                "first_failed": failed.first(), "last_failed": failed.last(), "slowest_ms": slowest.as_millis() as u64,
                "median_failed_ms": times_failed.get(times_failed.len() / 2),
                "memory_before": before.value(), "memory_after": Memory::now().value(),
            }),
        );
        Ok(())
    }
}

/// How much the kernel has allocated.
struct Memory {
    /// `SUnreclaim` of proc_meminfo(5), in KiB: the kernel's own slabs, which hold mappings and reservations.
    slab_kib: Option<u64>,
    /// Live objects of the cache of allocated IOVA ranges, if slabinfo(5) is there and the cache is not merged.
    iova_ranges: Option<u64>,
}

impl Memory {
    fn now() -> Self {
        let field = |path: &str, name: &str| -> Option<u64> {
            let text = sysfs::text(path)?;
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        Self { slab_kib: field("/proc/meminfo", "SUnreclaim:"), iova_ranges: field("/proc/slabinfo", "iommu_iova ") }
    }

    fn value(&self) -> Value {
        json!({ "slab_kib": self.slab_kib, "iova_ranges": self.iova_ranges })
    }
}
