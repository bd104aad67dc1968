//! Real guests: Linux on stock QEMU, with our devices behind our IOMMU. `scripts/prepare-guest stock`, `backports`,
//! `patched` and `patched-6.12` get what they need; each prints the guest's console when it fails.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use viommu_testkit::guest::of_series;

mod api;
mod at_once;
mod bar_memory;
mod boots;
mod file_system;
mod functions;
mod guest_trace;
mod hotplug;
mod kernel_debug;
mod lifecycles;
mod memory;
mod observers;
mod patched;
mod resets;
mod sgl;

/// The kernel that the tests in modules named `patched` boot: Linux with one of the series.
fn patched_kernel() -> String {
    of_series("patched")
}

/// Whether that is Linux 6.12. Its nvme-pci answers EIO to every failure, and its virtio-iommu driver prints them; Linux
/// 7.3 returns the reason to the application instead.
fn is_6_12() -> bool {
    patched_kernel() == "patched-6.12"
}

/// One NVMe controller.
const NVME: &str = "[[nvme]]\naddress = \"04.0\"\nimage = \"nvme0.img\"\n";

/// I/O that continues until the test marks the disk.
const BUSY: &str = "nvme-io --op randwrite --bs 16k --depth 8 --until-marked";

/// One NVMe controller in a machine that has these keys.
fn nvme_in(machine: &str) -> String {
    format!("[machine]\n{machine}\n{NVME}")
}
