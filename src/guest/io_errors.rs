//! I/O that may fail: what an application gets, how long it waits for it, and what the kernel keeps of it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use nix::errno::Errno;
use serde_json::{Value, json};

use crate::blockdev::{self, Device};
use crate::buffers::Buffers;
use crate::results::Results;
use crate::{size, sysfs};

/// What to do.
#[derive(clap::Args)]
pub struct Args {
    /// Bytes an I/O: a multiple of 512.
    #[arg(long, default_value = "128k", value_parser = size::parse)]
    bs: u64,
    /// How many reads; each has a buffer whose pages are scattered in physical memory.
    #[arg(long, default_value_t = 100)]
    ios: u64,
    /// How many of them begin at the same time, and are waited for before the next ones begin.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    jobs: u64,
    /// Milliseconds between those and the next ones.
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
}

/// The workload. Emits one `result`, whether reads fail or not: that they do is what it is for.
///
/// # Errors
/// If there is nothing to read from.
pub fn run(args: &Args, results: &mut Results) -> Result<()> {
    let device = Device::open(&blockdev::choose(None)?)?;
    ensure!(args.bs > 0 && args.bs <= device.bytes, "--bs: wanted 1 to {}, found {}", device.bytes, args.bs);
    let buffers = (0..args.jobs).map(|_| Buffers::new(1, args.bs as usize, true)).collect::<Result<Vec<_>>>()?;
    let before = Memory::now();
    let together = Barrier::new(buffers.len());
    let reads = std::thread::scope(|scope| {
        let (device, together) = (&device, &together);
        let job = |(job, buffer)| scope.spawn(move || read_every(args, job, device, buffer, together));
        let jobs: Vec<_> = (0..).zip(buffers).map(job).collect();
        let ended = jobs.into_iter().map(|job| job.join().map_err(|_| anyhow!("A reading thread panicked")));
        ended.collect::<Result<Vec<_>>>()
    })?;
    let mut reads = reads.concat();
    reads.sort_by_key(|read| read.io);
    let mut errors: BTreeMap<&str, u64> = BTreeMap::new();
    for error in reads.iter().filter_map(|read| read.error.as_deref()) {
        *errors.entry(error).or_default() += 1;
    }
    let failed: Vec<_> = reads.iter().filter(|read| read.error.is_some()).map(|read| read.io).collect();
    let slowest = reads.iter().map(|read| read.took).max().unwrap_or_default();
    results.emit(
        "result",
        json!({
            "workload": "io-errors", "bs": args.bs, "ios": args.ios, "failed": failed.len(), "errors": errors,
            "first_failed": failed.first(), "last_failed": failed.last(), "slowest_ms": slowest.as_millis() as u64,
            "memory_before": before.value(), "memory_after": Memory::now().value(),
        }),
    );
    Ok(())
}

/// What became of a read.
#[derive(Clone)]
struct Read {
    io: u64,
    error: Option<String>,
    took: Duration,
}

/// Does the reads of one job: each `args.jobs`-th from number `job` on.
fn read_every(args: &Args, job: u64, device: &Device, mut buffer: Buffers, together: &Barrier) -> Vec<Read> {
    let mut reads = Vec::new();
    for io in (job..args.ios.next_multiple_of(args.jobs)).step_by(args.jobs as usize) {
        together.wait();
        if io < args.ios {
            // SAFETY: this buffer is used by the call below alone, which has ended when it returns.
            let contents = unsafe { buffer.contents(0) };
            let begin = Instant::now();
            let read = device.file.read_exact_at(contents, io % (device.bytes / args.bs) * args.bs);
            let name = |error: std::io::Error| {
                error.raw_os_error().map_or_else(|| error.to_string(), |code| format!("{:?}", Errno::from_raw(code)))
            };
            reads.push(Read { io, error: read.err().map(name), took: begin.elapsed() });
        }
        std::thread::sleep(Duration::from_millis(args.pause_ms));
    }
    reads
}

/// What the kernel's allocators have given out.
struct Memory {
    /// `SUnreclaim` of proc_meminfo(5), in KiB: slabs of the kernel's own, in which mappings and reservations are.
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
