//! I/O into nearly all of the guest's memory: a device must reach all memory that is plugged, on every node.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::json;
use viommu_wire::size;

use crate::blockdev::{self, Device};
use crate::buffers::Buffers;
use crate::results::Results;
use crate::workload::{Needs, Workload};
use crate::{pattern, sysfs};

/// The memory is taken in pieces of this size. Each should be a huge page, and gets one I/O.
const PIECE: u64 = 2 << 20;

/// Bytes of an I/O.
const IO: usize = 16 << 10;

/// How long plugged memory may take to come.
const PATIENCE: Duration = Duration::from_secs(60);

/// I/O into nearly all of the guest's memory.
#[derive(clap::Args)]
pub struct Args {
    /// The namespace; the first function's if not given.
    #[arg(long)]
    dev: Option<PathBuf>,
    /// Bytes to leave to others.
    #[arg(long, default_value = "192M", value_parser = size::parse)]
    leave: u64,
    /// Wait until the guest has this much memory.
    #[arg(long, default_value = "0", value_parser = size::parse)]
    wait: u64,
}

impl Workload for Args {
    const NEEDS: Needs = Needs { optional: &["virtio_mem"], ..Needs::NOTHING };

    /// The workload. Takes memory from all nodes in turn, and writes from and reads into a part of each 2 MiB of it.
    ///
    /// # Errors
    /// Memory that does not come, an I/O that failed, or data that is wrong.
    fn run(&self, results: &mut Results) -> Result<()> {
        let begin = Instant::now();
        while meminfo("MemTotal")? < self.wait {
            ensure!(begin.elapsed() < PATIENCE, "Wanted {} bytes of memory, found {}", self.wait, meminfo("MemTotal")?);
            std::thread::sleep(Duration::from_millis(100));
        }
        let nodes = interleave()?;
        let device = Device::open(&blockdev::choose(self.dev.as_deref())?)?;
        let available = meminfo("MemAvailable")?;
        let count = available.saturating_sub(self.leave) / PIECE;
        ensure!(count > 0, "No memory to take: {available} bytes are available, and {} are to be left", self.leave);
        let mut buffers = Buffers::new(count as usize, PIECE as usize, false)?;
        let blocks = device.bytes / IO as u64;
        for piece in 0..count {
            // SAFETY: no I/O is in flight, as each call returns when it is done.
            let buffer = unsafe { &mut buffers.contents(piece as usize)[..IO] };
            // The block on the device may be that of an earlier piece; the seed is this piece's own.
            let offset = piece % blocks * IO as u64;
            pattern::fill(buffer, offset, piece);
            device.file.write_all_at(buffer, offset).with_context(|| format!("Cannot write from piece {piece}"))?;
            pattern::poison(buffer);
            device.file.read_exact_at(buffer, offset).with_context(|| format!("Cannot read into piece {piece}"))?;
            pattern::check(buffer, offset, piece).map_err(|message| anyhow!("Piece {piece}: {message}"))?;
        }
        results.emit(
            "result",
            json!({
                "workload": "memory", "verified": true, "pieces": count, "bytes": count * PIECE, "nodes": nodes,
                "total": meminfo("MemTotal")?, "seconds": begin.elapsed().as_secs_f64(),
            }),
        );
        Ok(())
    }
}

/// Makes allocations come from all nodes in turn. Returns the number of nodes.
fn interleave() -> Result<usize> {
    let nodes: Vec<u32> = sysfs::names("/sys/devices/system/node")
        .iter()
        .filter(|node| sysfs::text(format!("/sys/devices/system/node/{node}/meminfo")).is_some_and(has_memory))
        .filter_map(|node| node.strip_prefix("node")?.parse().ok())
        .collect();
    if nodes.len() < 2 {
        return Ok(nodes.len());
    }
    ensure!(nodes.iter().all(|node| *node < u64::BITS), "More nodes than this workload knows: {nodes:?}");
    let mask: u64 = nodes.iter().map(|node| 1 << node).sum();
    // SAFETY: the mask is there during the call, and one bit longer than the kernel reads (set_mempolicy(2)).
    let code = unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_INTERLEAVE, &mask, u64::BITS as usize + 1) };
    ensure!(code == 0, "Cannot interleave memory of the nodes {nodes:?}: {}", std::io::Error::last_os_error());
    Ok(nodes.len())
}

/// Whether the `meminfo` of a node says that it has memory.
fn has_memory(meminfo: String) -> bool {
    meminfo.lines().any(|line| line.contains("MemTotal:") && !line.contains(" 0 kB"))
}

/// A number of bytes in `/proc/meminfo`.
fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("Cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix(" kB"));
    let Some(kib) = line.and_then(|kib| kib.parse::<u64>().ok()) else { bail!("/proc/meminfo has no {name} in kB") };
    Ok(kib << 10)
}
