//! The virtio-iommu is reset, or its queues are broken, while functions behind it are in use: power-off, reboot,
//! another kernel. A driver that waits for an answer then waits for ever. Here the driver's timeout is longer than a
//! guest may take, so a test that ends has shown that the driver did not wait.

use std::fs;

use serde_json::{Value, json};
use viommu_testkit::guest::{Guest, Outcome, guest_files};

use super::{IO, assert_no_complaint, guest};
use crate::nvme_in;

/// The driver's timeout: an hour.
pub(super) const PATIENCE: &str = "virtio_iommu.timeout_ms=3600000";
/// The ways in which the driver undoes mappings.
pub(super) const MODES: [&str; 2] = ["iommu.strict=0", "iommu.strict=1"];

/// A guest whose second processor keeps reading while the first does this.
fn busy(workload: &str, mode: &str) -> Guest {
    guest(&nvme_in("vcpus = 2"), &format!("busy-end + {workload}")).append(&format!("{mode} {PATIENCE}"))
}

/// Checks that Linux stopped the controller before the IOMMU: nothing was mapped after that. In lazy mode earlier
/// unmaps may be flushed then.
fn assert_stopped_first(outcome: &Outcome, mode: &str) {
    let lost = outcome.console.matches("device does not answer").count();
    assert!(lost == 0 || (lost == 1 && mode == MODES[0]), "{mode}: {lost} times");
}

/// Checks that all of the controller's DMA went through mappings, from its first mapped access to the end.
pub(super) fn assert_always_translated(outcome: &Outcome) {
    assert_eq!(outcome.count("faults"), 0);
    let astray: Vec<&Value> = outcome
        .events("dma")
        .skip_while(|dma| dma["route"] != "mapped")
        .filter(|dma| dma["route"] != "mapped")
        .collect();
    assert!(astray.is_empty(), "not translated: {:?} of {}", astray.first(), astray.len());
}

/// How often the driver reset the virtio-iommu.
pub(super) fn resets(outcome: &Outcome) -> usize {
    outcome.events("reset").filter(|reset| reset["reset"] == "device").count()
}

#[test]
fn a_guest_powers_off_while_its_io_goes_on() {
    for mode in MODES {
        let outcome = busy("report", mode).run();
        assert_no_complaint(&outcome);
        assert_always_translated(&outcome);
        assert_stopped_first(&outcome, mode);
        assert!(outcome.console.contains("reboot: Power down"), "{mode}");
    }
}

#[test]
fn a_guest_reboots_while_its_io_goes_on() {
    for mode in MODES {
        let outcome = busy("reboot", mode).run();
        assert_no_complaint(&outcome);
        assert_eq!((&outcome.summary["verified"], outcome.count("requests_failed")), (&json!(true), 0));
        assert_stopped_first(&outcome, mode);
        assert!(outcome.events("reset").any(|reset| reset["reset"] == "system"));
        assert_eq!(outcome.count("faults"), 0);
    }
}

#[test]
fn another_kernel_takes_over_while_io_goes_on() {
    let files = guest_files(&crate::patched_kernel());
    let [kernel, initramfs] = ["vmlinuz", "initramfs"].map(|name| fs::read(files.join(name)).unwrap());
    let mut disk = kernel.clone();
    disk.resize(kernel.len().next_multiple_of(4096), 0);
    disk.extend(&initramfs);
    for mode in MODES {
        let workload = format!("kexec --kernel {} --initramfs {} + {IO}", kernel.len(), initramfs.len());
        let outcome = busy(&workload, mode).disk(disk.clone()).run();
        let boots = outcome.results.iter().filter(|result| result["event"] == "boot").count();
        assert_eq!((boots, outcome.console.matches("Linux version").count()), (2, 2), "{mode}");
        assert_eq!((&outcome.summary["verified"], outcome.count("requests_failed")), (&json!(true), 0));
        assert_no_complaint(&outcome);
        assert_eq!(resets(&outcome), 1, "the second kernel resets the device that it finds");
        assert!(!outcome.events("reset").any(|reset| reset["reset"] == "system"), "firmware was not involved");
        assert_stopped_first(&outcome, mode);
        assert_always_translated(&outcome);
    }
}
