//! The guest suspends its devices and resumes them, with I/O before, after, and up to the moment when programs are frozen.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;

use crate::blockdev::{self, Device};
use crate::buffers::Buffers;
use crate::results::Results;
use crate::workload::Workload;
use crate::{nvme_io, pattern};

/// Bytes of an I/O. Its pages are scattered, so that it takes several mappings.
const SIZE: usize = 64 << 10;
/// The size of the area that is read, in I/Os: 4 MiB.
const BLOCKS: u64 = 64;
/// The seed of its data.
const SEED: u64 = 0x7375_7370_656e;
/// How many threads read it.
const READERS: usize = 2;
/// How many reads each of them does between two suspends.
const READS: u64 = 20;
/// The time between two checks of their progress.
const LOOK: Duration = Duration::from_millis(5);

/// Suspend the devices and resume them, with I/O before and after.
#[derive(clap::Args)]
pub struct Args {
    /// How often.
    #[arg(long, default_value_t = 2)]
    times: u32,
    /// How far the kernel goes before it turns back (Documentation/power/basic-pm-debugging.rst).
    #[arg(long, default_value = "devices")]
    level: String,
}

impl Workload for Args {
    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// What the kernel refused, an I/O that failed, or data that is wrong.
    fn run(&self, results: &mut Results) -> Result<()> {
        let path = blockdev::choose(None)?;
        let device = Device::open(&path)?;
        nvme_io::write_pattern(&device, &mut Buffers::new(8, SIZE, true)?, 0..BLOCKS, SEED)?;
        let reads: [AtomicU64; READERS] = Default::default();
        let end = AtomicBool::new(false);
        thread::scope(|scope| {
            let readers: Vec<_> = reads.iter().map(|count| scope.spawn(|| read_on(&device, count, &end))).collect();
            let suspended = (1..=self.times).try_for_each(|time| {
                wait_for_reads(&reads, &readers)?;
                suspend(&self.level).with_context(|| format!("Suspending, time {time}"))
            });
            let outcome = suspended.and_then(|()| wait_for_reads(&reads, &readers));
            end.store(true, Ordering::Relaxed);
            let ended = readers.into_iter().try_for_each(|reader| match reader.join() {
                Ok(result) => result,
                Err(_) => bail!("A reader panicked"),
            });
            // The reason why a reader ended says more than the fact.
            ended.and(outcome)
        })?;
        nvme_io::exercise(&path, BLOCKS * SIZE as u64, SEED + 1)?;
        let reads: u64 = reads.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        results.emit(
            "result",
            json!({ "workload": "suspend", "level": self.level, "times": self.times, "reads": reads, "verified": true }),
        );
        Ok(())
    }
}

/// Suspends to memory as far as `level`. Programs are thawed when this returns.
fn suspend(level: &str) -> Result<()> {
    for (file, value) in [("pm_test", level), ("state", "mem")] {
        let path = Path::new("/sys/power").join(file);
        fs::write(&path, value)
            .with_context(|| format!("Cannot write {value} to {} (CONFIG_PM_DEBUG?)", path.display()))?;
    }
    Ok(())
}

/// Reads the area and compares it, repeatedly.
fn read_on(device: &Device, count: &AtomicU64, end: &AtomicBool) -> Result<()> {
    let mut buffers = Buffers::new(1, SIZE, true)?;
    // SAFETY: this buffer is used by the calls below alone, one after the other.
    let contents = unsafe { buffers.contents(0) };
    while !end.load(Ordering::Relaxed) {
        let offset = count.load(Ordering::Relaxed) % BLOCKS * SIZE as u64;
        pattern::poison(contents);
        device.file.read_exact_at(contents, offset).with_context(|| format!("A read at {offset} failed"))?;
        pattern::check(contents, offset, SEED).map_err(|message| anyhow!(message))?;
        count.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Waits until each reader has done this many more reads.
fn wait_for_reads<T>(reads: &[AtomicU64], readers: &[thread::ScopedJoinHandle<'_, T>]) -> Result<()> {
    let now = || reads.iter().map(|count| count.load(Ordering::Relaxed));
    let goals: Vec<u64> = now().map(|count| count + READS).collect();
    while now().zip(&goals).any(|(count, goal)| count < *goal) {
        if readers.iter().any(thread::ScopedJoinHandle::is_finished) {
            bail!("A reader has ended");
        }
        thread::sleep(LOOK);
    }
    Ok(())
}
