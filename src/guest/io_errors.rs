//! I/O that may fail: what an application gets, how long it waits for it, and what the kernel keeps of it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
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
    /// How many reads, one after the other; their buffer's pages are scattered in physical memory.
    #[arg(long, default_value_t = 100)]
    ios: u64,
    /// Milliseconds between two of them.
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
    let mut buffers = Buffers::new(1, args.bs as usize, true)?;
    let before = Memory::now();
    let mut errors: BTreeMap<String, u64> = BTreeMap::new();
    let mut failed = Vec::new();
    let mut slowest = Duration::ZERO;
    for io in 0..args.ios {
        // SAFETY: this buffer is used by the call below alone, which has ended when it returns.
        let contents = unsafe { buffers.contents(0) };
        let begin = Instant::now();
        let read = device.file.read_exact_at(contents, io % (device.bytes / args.bs) * args.bs);
        slowest = slowest.max(begin.elapsed());
        if let Err(error) = read {
            let name =
                error.raw_os_error().map_or_else(|| error.to_string(), |code| format!("{:?}", Errno::from_raw(code)));
            *errors.entry(name).or_default() += 1;
            failed.push(io);
        }
        std::thread::sleep(Duration::from_millis(args.pause_ms));
    }
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
