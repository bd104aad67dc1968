//! A controller that is plugged in while the guest runs.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;

use crate::results::Results;
use crate::{blockdev, nvme_io, report, sysfs};

/// How long the host may take to plug it in.
const LIMIT: Duration = Duration::from_secs(30);
/// How much is written and read back on it.
const BYTES: u64 = 8 << 20;

/// The workload. Emits a `marker` when the host may plug the controller in, and one `result`.
///
/// # Errors
/// If none comes, or it does not work.
pub fn run(results: &mut Results) -> Result<()> {
    let before = controllers();
    results.emit("marker", json!({ "name": "hotplug-ready" }));
    let end = Instant::now() + LIMIT;
    let bdf = loop {
        if let Some(bdf) = controllers().into_iter().find(|bdf| !before.contains(bdf)) {
            break bdf;
        }
        if Instant::now() >= end {
            bail!("No further NVMe controller appeared within {LIMIT:?}; there are {before:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let namespace = blockdev::wait_for_namespace(&bdf, LIMIT)?;
    nvme_io::exercise(&namespace.node(), BYTES, 1)?;
    results.emit(
        "result",
        json!({
            "workload": "hotplug-wait", "verified": true, "bytes": BYTES,
            "dev": namespace.node(), "function": report::pci_function(&bdf),
        }),
    );
    Ok(())
}

/// The PCI functions that have an NVMe controller, as the driver sees it.
fn controllers() -> Vec<String> {
    let names = sysfs::names("/sys/class/nvme");
    names.iter().filter_map(|name| sysfs::link_name(format!("/sys/class/nvme/{name}/device"))).collect()
}
