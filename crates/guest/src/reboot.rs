//! The guest restarts while its devices stay: nothing of the first boot may be left in the IOMMU, and all its data must
//! be on the disk.

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use serde_json::json;

use crate::blockdev::{self, Device};
use crate::buffers::{Buffers, PAGE};
use crate::results::Results;
use crate::workload::Workload;
use crate::{init, nvme_io, pattern};

/// Bytes of an I/O.
const SIZE: usize = 64 << 10;
/// I/Os written before the restart: 16 MiB.
const BLOCKS: u64 = 256;
/// The seed of the data that must survive.
const DATA_SEED: u64 = 0x6265_666f_7265;
/// The seed of the marker page that tells the second boot from the first.
const MARKER_SEED: u64 = 0x6d61_726b_6572;

/// Write data, restart the guest, and check that the data is still there.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    /// The workload. In the first boot it emits `restart` and does not return; in the second it emits one `result`.
    ///
    /// # Errors
    /// An I/O that failed, or data that did not survive.
    fn run(&self, results: &mut Results) -> Result<()> {
        let path = blockdev::choose(None)?;
        let device = Device::open(&path)?;
        let mut buffers = Buffers::new(8, SIZE, true)?;
        let mut page = Buffers::new(1, PAGE, false)?;
        // SAFETY: this buffer is used by the calls below alone, which have ended when they return.
        let marker = unsafe { page.contents(0) };
        // At the disk's end, where other workloads of the same run do not write: the data, and after it the marker.
        let marker_at = (device.bytes - PAGE as u64) / SIZE as u64 * SIZE as u64;
        let end = marker_at / SIZE as u64;
        let blocks = end.checked_sub(BLOCKS).with_context(|| format!("{} is too small", path.display()))?..end;
        device.file.read_exact_at(marker, marker_at).context("Cannot read the marker")?;

        if pattern::check(marker, marker_at, MARKER_SEED).is_err() {
            nvme_io::write_pattern(&device, &mut buffers, blocks, DATA_SEED)?;
            pattern::fill(marker, marker_at, MARKER_SEED);
            device.file.write_all_at(marker, marker_at).context("Cannot write the marker")?;
            device.file.sync_all().context("Cannot flush the disk")?;
            results.emit("restart", json!({ "bytes": BLOCKS * SIZE as u64 }));
            init::restart(results);
        }

        marker.fill(0);
        device.file.write_all_at(marker, marker_at).context("Cannot clear the marker")?;
        nvme_io::check_pattern(&device, &mut buffers, blocks, DATA_SEED).context("After the restart")?;
        nvme_io::exercise(&path, BLOCKS * SIZE as u64, DATA_SEED + 1)?;
        results.emit(
            "result",
            json!({ "workload": "reboot", "verified": true, "bytes": BLOCKS * SIZE as u64, "lives": 2 }),
        );
        Ok(())
    }
}
