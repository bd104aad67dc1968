//! Raw I/O on an NVMe namespace: measured, or written, read back and compared.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};
use viommu_wire::size;

use crate::blockdev::{self, Device};
use crate::buffers::{Buffers, PAGE};
use crate::engine::{self, Direction, Outcome, Stream};
use crate::pattern::{self, Random};
use crate::results::Results;
use crate::sysfs;
use crate::workload::Workload;

/// How many bytes are moved by default.
const DEFAULT_TOTAL: u64 = 64 << 20;

/// Raw I/O on an NVMe namespace, past the page cache, with io_uring.
#[derive(clap::Args)]
pub struct Args {
    /// The namespace: its block device, or its controller's function; the first function's if not given.
    #[arg(long)]
    dev: Option<PathBuf>,
    /// What to do; verify writes the range, reads it back and compares.
    #[arg(long, value_enum, default_value_t = Op::Verify)]
    op: Op,
    /// Bytes an I/O: a multiple of 512.
    #[arg(long, default_value = "4k", value_parser = size::parse)]
    bs: u64,
    /// I/Os in flight.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: u16,
    /// Bytes to move (verify: the range); 64M if --seconds is not given.
    #[arg(long, value_parser = size::parse, conflicts_with = "seconds")]
    total: Option<u64>,
    /// Seconds to go on; not for verify.
    #[arg(long)]
    seconds: Option<f64>,
    /// Go on until the host has written into the last page of the disk; not for verify.
    #[arg(long, conflicts_with_all = ["total", "seconds"])]
    until_marked: bool,
    /// Use buffers whose pages are scattered in physical memory.
    #[arg(long)]
    scatter: bool,
    /// The processor to submit from, and so the queue that is used; any if not given.
    #[arg(long)]
    cpu: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Op {
    Read,
    Write,
    Randread,
    Randwrite,
    Verify,
}

impl Workload for Args {
    /// The workload. Emits a `begin`, and one `result`.
    ///
    /// # Errors
    /// An I/O that failed, or data that is wrong; a result says `"verified":false` then.
    fn run(&self, results: &mut Results) -> Result<()> {
        if let Some(cpu) = self.cpu {
            let mut set = CpuSet::new();
            set.set(cpu)
                .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
                .with_context(|| format!("--cpu {cpu}"))?;
        }
        let path = blockdev::choose(self.dev.as_deref())?;
        let device = Device::open(&path)?;
        ensure!(self.bs > 0 && self.bs.is_multiple_of(512), "--bs: wanted a multiple of 512, found {}", self.bs);
        ensure!(self.bs <= device.bytes, "--bs: {} bytes, but {} has {}", self.bs, path.display(), device.bytes);
        ensure!(
            (self.seconds.is_none() && !self.until_marked) || self.op != Op::Verify,
            "verify takes --total alone, as it has to read back what it wrote"
        );
        let mut buffers = Buffers::new(self.depth.into(), self.bs as usize, self.scatter)?;
        let mut result = json!({
            "workload": "nvme-io", "op": self.op.to_possible_value().map(|value| value.get_name().to_owned()),
            "dev": path, "bs": self.bs, "depth": self.depth, "scatter": self.scatter,
            "physical_runs_per_io": buffers.physical_runs(),
        });
        results.emit("begin", result.clone());
        let outcome = match self.op {
            Op::Verify => verify(&device, &mut buffers, self, &mut result),
            _ => measure(&device, &mut buffers, self, &mut result),
        };
        if let Err(error) = &outcome {
            result["error"] = format!("{error:#}").into();
        }
        results.emit("result", result);
        outcome.map_err(|error| error.context(format!("nvme-io on {}", path.display())))
    }
}

fn measure(device: &Device, buffers: &mut Buffers, args: &Args, result: &mut Value) -> Result<()> {
    let direction = if matches!(args.op, Op::Read | Op::Randread) { Direction::Read } else { Direction::Write };
    let mark = if args.until_marked { Some(Mark::new(device)?) } else { None };
    let endless = args.seconds.is_some() || mark.is_some();
    let mut stream = Measured {
        size: args.bs,
        blocks: mark.as_ref().map_or(device.bytes, |mark| mark.at) / args.bs,
        random: matches!(args.op, Op::Randread | Op::Randwrite).then(|| Random::new(1)),
        issued: 0,
        limit: if endless { u64::MAX } else { args.total.unwrap_or(DEFAULT_TOTAL) / args.bs },
        end: args.seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds)),
        mark,
    };
    ensure!(stream.blocks > 0, "--bs: {} bytes do not fit before the last page", args.bs);
    let before = CpuTimes::now();
    let outcome = engine::run(device, direction, buffers, &mut stream)?;
    describe(result, outcome, &before);
    Ok(())
}

fn verify(device: &Device, buffers: &mut Buffers, args: &Args, result: &mut Value) -> Result<()> {
    let blocks = args.total.unwrap_or(DEFAULT_TOTAL).min(device.bytes) / args.bs;
    let before = CpuTimes::now();
    result["verified"] = false.into();
    let written = write_pattern(device, buffers, 0..blocks, 1)?;
    let mut read = check_pattern(device, buffers, 0..blocks, 1)?;
    result["verified"] = true.into();
    result["write_seconds"] = written.elapsed.as_secs_f64().into();
    result["read_seconds"] = read.elapsed.as_secs_f64().into();
    read.bytes += written.bytes;
    read.elapsed += written.elapsed;
    read.latencies.extend(written.latencies);
    describe(result, read, &before);
    Ok(())
}

/// Adds the measurements of a run to a result. Latencies are in microseconds; `cpu_s` is the whole guest's CPU time.
fn describe(result: &mut Value, mut outcome: Outcome, before: &CpuTimes) {
    let seconds = outcome.elapsed.as_secs_f64();
    let ios = outcome.latencies.len();
    let mut latency = |fraction| outcome.percentile(fraction) as f64 / 1e3;
    result["latency_us"] = json!({ "p50": latency(0.5), "p90": latency(0.9), "p99": latency(0.99), "p999": latency(0.999), "max": latency(1.0) });
    result["ios"] = ios.into();
    result["bytes"] = outcome.bytes.into();
    result["seconds"] = seconds.into();
    result["iops"] = (ios as f64 / seconds).into();
    result["mib_per_s"] = (outcome.bytes as f64 / seconds / f64::from(1 << 20)).into();
    result["cpu_s"] = before.until_now();
}

/// Writes the pattern of `seed` into these blocks (units of the buffers' size).
///
/// # Errors
/// An I/O that failed.
pub fn write_pattern(
    device: &Device,
    buffers: &mut Buffers,
    blocks: std::ops::Range<u64>,
    seed: u64,
) -> Result<Outcome> {
    engine::run(device, Direction::Write, buffers, &mut Patterned { blocks, seed, direction: Direction::Write })
}

/// Reads these blocks and compares them with the pattern of `seed`.
///
/// # Errors
/// An I/O that failed, or what is wrong with the first wrong sector.
pub fn check_pattern(
    device: &Device,
    buffers: &mut Buffers,
    blocks: std::ops::Range<u64>,
    seed: u64,
) -> Result<Outcome> {
    engine::run(device, Direction::Read, buffers, &mut Patterned { blocks, seed, direction: Direction::Read })
}

/// Writes and reads back `bytes` from the device's start, in 64 KiB I/Os, 8 in flight: other workloads use this to
/// check that a device works.
///
/// # Errors
/// An I/O that failed, or data that is wrong.
pub fn exercise(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    const SIZE: usize = 64 << 10;
    let device = Device::open(path)?;
    let mut buffers = Buffers::new(8, SIZE, true)?;
    let blocks = bytes.min(device.bytes) / SIZE as u64;
    write_pattern(&device, &mut buffers, 0..blocks, seed)?;
    check_pattern(&device, &mut buffers, 0..blocks, seed)?;
    Ok(())
}

/// The last page of a disk. To end a run, the host writes something other than zeros into it.
struct Mark<'a> {
    device: &'a Device,
    page: Buffers,
    /// Its place, in bytes.
    at: u64,
}

impl<'a> Mark<'a> {
    /// How many I/Os there are between two checks of it.
    const EVERY: u64 = 64;

    fn new(device: &'a Device) -> Result<Self> {
        let at = (device.bytes / PAGE as u64).checked_sub(1).context("The disk has no page")? * PAGE as u64;
        Ok(Self { device, page: Buffers::new(1, PAGE, false)?, at })
    }

    fn is_there(&mut self) -> bool {
        // SAFETY: this buffer is used by the call below alone, which has ended when it returns.
        let page = unsafe { self.page.contents(0) };
        self.device.file.read_exact_at(page, self.at).is_ok() && page.iter().any(|byte| *byte != 0)
    }
}

/// I/O that is only measured: the data does not matter.
pub struct Measured<'a> {
    size: u64,
    blocks: u64,
    random: Option<Random>,
    issued: u64,
    limit: u64,
    end: Option<Instant>,
    mark: Option<Mark<'a>>,
}

impl Measured<'_> {
    /// `limit` I/Os of `size` bytes, block after block, from the device's start, which follows its end again.
    pub fn in_order(device: &Device, size: u64, limit: u64) -> Self {
        Self { size, blocks: device.bytes / size, random: None, issued: 0, limit, end: None, mark: None }
    }
}

impl Stream for Measured<'_> {
    fn next(&mut self, _buffer: &mut [u8]) -> Option<u64> {
        if self.issued.is_multiple_of(Mark::EVERY) && self.mark.as_mut().is_some_and(Mark::is_there) {
            return None;
        }
        if self.issued == self.limit || self.end.is_some_and(|end| Instant::now() >= end) {
            return None;
        }
        let block = self.random.as_mut().map_or(self.issued % self.blocks, |random| random.below(self.blocks));
        self.issued += 1;
        Some(block * self.size)
    }

    fn done(&mut self, _offset: u64, _buffer: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// The pattern, block after block.
struct Patterned {
    blocks: std::ops::Range<u64>,
    seed: u64,
    direction: Direction,
}

impl Stream for Patterned {
    fn next(&mut self, buffer: &mut [u8]) -> Option<u64> {
        let offset = self.blocks.next()? * buffer.len() as u64;
        match self.direction {
            Direction::Write => pattern::fill(buffer, offset, self.seed),
            Direction::Read => pattern::poison(buffer),
        }
        Some(offset)
    }

    fn done(&mut self, offset: u64, buffer: &[u8]) -> Result<()> {
        match self.direction {
            Direction::Write => Ok(()),
            Direction::Read => pattern::check(buffer, offset, self.seed).map_err(|message| anyhow!(message)),
        }
    }
}

/// The guest's CPU time since boot, from the first line of `/proc/stat` (proc_stat(5)), in its ticks of 10 ms.
struct CpuTimes(Vec<u64>);

impl CpuTimes {
    fn now() -> Self {
        let text = sysfs::text("/proc/stat").unwrap_or_default();
        let line = text.lines().next().unwrap_or_default();
        Self(line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect())
    }

    /// Seconds spent since then, by kind.
    fn until_now(&self) -> Value {
        let now = Self::now();
        let spent = |at: usize| match (self.0.get(at), now.0.get(at)) {
            (Some(before), Some(after)) => after.saturating_sub(*before) as f64 / 100.0,
            _ => 0.0,
        };
        json!({ "user": spent(0), "system": spent(2), "idle": spent(3), "iowait": spent(4), "irq": spent(5), "softirq": spent(6) })
    }
}
