//! A controller that is plugged in and unplugged while the guest runs.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::json;

use crate::results::Results;
use crate::workload::Workload;
use crate::{blockdev, nvme_io, pci, report, sysfs};

/// How long the host may take to plug it in or out.
const LIMIT: Duration = Duration::from_secs(300);
/// How much is written and read back on it.
const BYTES: u64 = 8 << 20;
/// Where the kernel shows the slots for hot-plugging.
const SLOTS: &str = "/sys/bus/pci/slots";

/// Wait for another NVMe controller to be plugged in, and use it; have it unplugged and plugged in again.
#[derive(clap::Args)]
pub struct Args {
    /// Who unplugs it after it was used; then it is plugged in again. May be given several times.
    #[arg(long)]
    unplug: Vec<Who>,
}

/// Who unplugs a controller.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Who {
    /// The host, by device_del.
    Host,
    /// The guest, by switching the slot's power off.
    Guest,
}

impl Workload for Args {
    /// The workload. Emits a `marker` each time that the host may plug the controller in, one each time that the host
    /// has to unplug it, and one `result`.
    ///
    /// # Errors
    /// If no controller comes or goes, or if it does not work.
    fn run(&self, results: &mut Results) -> Result<()> {
        let before = controllers();
        let mut bdf = use_next(&before, 0, results)?;
        for (round, who) in (1..).zip(&self.unplug) {
            match who {
                Who::Host => results.emit("marker", json!({ "name": "hotplug-unplug", "round": round })),
                Who::Guest => power_off(&bdf)?,
            }
            wait(|| !pci::folder(&bdf).exists()).with_context(|| format!("{bdf} is still there"))?;
            bdf = use_next(&before, round, results)?;
        }
        results.emit(
            "result",
            json!({
                "workload": "hotplug-wait", "verified": true, "bytes": BYTES, "times": self.unplug.len() + 1,
                "function": report::pci_function(&bdf),
            }),
        );
        Ok(())
    }
}

/// Waits for a controller that was not there before, and uses it.
fn use_next(before: &[String], round: u64, results: &mut Results) -> Result<String> {
    results.emit("marker", json!({ "name": "hotplug-ready", "round": round }));
    let new = || controllers().into_iter().find(|bdf| !before.contains(bdf));
    wait(|| new().is_some()).with_context(|| format!("No further NVMe controller; there are {before:?}"))?;
    let bdf = new().context("The new NVMe controller went away")?;
    let namespace = blockdev::wait_for_namespace(&bdf, LIMIT)?;
    nvme_io::exercise(&namespace.node(), BYTES, round + 1)?;
    Ok(bdf)
}

fn wait(until: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !until() {
        if Instant::now() >= end {
            bail!("It took more than {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Switches off the power of a function's slot, which unplugs the device in it.
fn power_off(bdf: &str) -> Result<()> {
    let device = bdf.split('.').next().unwrap_or(bdf);
    let slots = sysfs::names(SLOTS);
    let is_its = |slot: &&String| sysfs::text(Path::new(SLOTS).join(slot).join("address")).as_deref() == Some(device);
    let slot = slots.iter().find(is_its).with_context(|| format!("No slot of {slots:?} has {device}"))?;
    let power = Path::new(SLOTS).join(slot).join("power");
    std::fs::write(&power, "0").with_context(|| format!("Cannot write to {}", power.display()))
}

/// The PCI functions that have an NVMe controller, as the driver sees it.
fn controllers() -> Vec<String> {
    let names = sysfs::names("/sys/class/nvme");
    names.iter().filter_map(|name| sysfs::link_name(format!("/sys/class/nvme/{name}/device"))).collect()
}
