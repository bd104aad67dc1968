//! What the guest sees of its machine.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::results::Results;
use crate::workload::Workload;
use crate::{blockdev, sysfs};

/// Report which IOMMU, PCI and NVMe devices the guest sees; every run starts with this.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    /// The workload: emits [`machine`] again, as it is now.
    fn run(&self, results: &mut Results) -> Result<()> {
        results.emit("report", machine());
        Ok(())
    }
}

/// Kernel, CPUs, memory, IOMMUs, PCI functions with their IOMMU groups, NVMe namespaces.
pub fn machine() -> Value {
    json!({
        "kernel": sysfs::text("/proc/sys/kernel/osrelease"),
        "cmdline": sysfs::text("/proc/cmdline"),
        "uptime_s": uptime(),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_bytes": memory_bytes(),
        "iommus": sysfs::names("/sys/class/iommu"),
        "pci": sysfs::names("/sys/bus/pci/devices").iter().map(|name| pci_function(name)).collect::<Value>(),
        "nvme": namespaces(),
    })
}

/// Seconds since the kernel started.
fn uptime() -> Option<f64> {
    sysfs::text("/proc/uptime")?.split_whitespace().next()?.parse().ok()
}

fn memory_bytes() -> Option<u64> {
    let text = sysfs::text("/proc/meminfo")?;
    let kibibytes: u64 =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.split(' ').rev().nth(1)?.parse().ok()?;
    Some(kibibytes << 10)
}

/// One function: ids as sysfs prints them, its driver, and its IOMMU group with the group's domain type
/// (`DMA`, `DMA-FQ`, `identity`, `blocked`, `unmanaged`), null if it has none.
pub fn pci_function(name: &str) -> Value {
    let folder = Path::new("/sys/bus/pci/devices").join(name);
    json!({
        "bdf": name,
        "id": format!("{}:{}", hexadecimal(&folder, "vendor"), hexadecimal(&folder, "device")),
        "class": hexadecimal(&folder, "class"),
        "driver": sysfs::link_name(folder.join("driver")),
        "iommu": sysfs::link_name(folder.join("iommu")),
        "iommu_group": sysfs::link_name(folder.join("iommu_group")),
        "iommu_type": sysfs::text(folder.join("iommu_group/type")),
    })
}

fn hexadecimal(folder: &Path, name: &str) -> String {
    sysfs::text(folder.join(name)).map_or_else(String::new, |text| text.trim_start_matches("0x").to_owned())
}

fn namespaces() -> Value {
    let mut members = Map::new();
    for namespace in blockdev::namespaces() {
        let size = sysfs::text(format!("/sys/block/{}/size", namespace.name)).and_then(|text| text.parse::<u64>().ok());
        // The kernel gives a block device's size in units of 512 bytes, for any logical block size.
        members.insert(namespace.name, json!({ "bdf": namespace.bdf, "bytes": size.map(|units| units * 512) }));
    }
    members.into()
}
