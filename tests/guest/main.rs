//! Real guests: Linux on stock QEMU, with our devices behind our IOMMU. `scripts/prepare-guest stock`, `backports` and
//! `patched` get what they need; each prints the guest's console when it fails.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

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

/// One NVMe controller.
const NVME: &str = "[[nvme]]\naddress = \"04.0\"\nimage = \"nvme0.img\"\n";

/// I/O that continues until the test marks the disk.
const BUSY: &str = "nvme-io --op randwrite --bs 16k --depth 8 --until-marked";

/// One NVMe controller in a machine that has these keys.
fn nvme_in(machine: &str) -> String {
    format!("[machine]\n{machine}\n{NVME}")
}
