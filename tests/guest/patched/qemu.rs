//! Guests on QEMU's own virtio-iommu, which does not offer the protocol, with QEMU's own NVMe controller behind it.

use viommu_testkit::guest::{Folder, Guest, Outcome};

/// Machine and devices.
const QEMUS_OWN: [&str; 10] = [
    "-machine",
    "q35",
    "-m",
    "512M",
    "-device",
    "virtio-iommu-pci,addr=03.0",
    "-drive",
    "if=none,id=disk,file=disk.img,format=raw",
    "-device",
    "nvme,drive=disk,serial=test,addr=04.0",
];

/// A guest without a process of viommu.
fn guest(append: &str, workload: &str) -> Guest {
    let folder = Folder::new();
    std::fs::File::create(folder.join("disk.img")).unwrap().set_len(64 << 20).unwrap();
    Guest::plain(QEMUS_OWN, workload).folder(&folder).kernel(&crate::patched_kernel()).append(append)
}

/// Boots it, and checks that nothing of viommu was used.
fn run(guest: Guest) -> Outcome {
    let outcome = guest.run();
    super::assert_no_complaint(&outcome);
    let is_ours = outcome.console.contains("mapping in two steps");
    assert!(outcome.console.contains("virtio_iommu") && !is_ours, "which IOMMU is this?");
    outcome
}

fn assert_verified(outcome: &Outcome, iommu_type: &str) {
    assert!(outcome.results_of("nvme-io").any(|result| result["verified"] == true));
    assert_eq!(outcome.results.function("0000:00:04.0")["iommu_type"], iommu_type);
}

#[test]
fn strict() {
    assert_verified(&run(guest("iommu.strict=1", super::IO)), "DMA");
}

#[test]
fn lazy() {
    assert_verified(&run(guest("iommu.strict=0", super::IO)), "DMA-FQ");
}

#[test]
fn passthrough() {
    assert_verified(&run(guest("iommu.passthrough=1", super::IO)), "identity");
}

#[test]
fn unbind_and_rebind_the_driver() {
    let outcome = run(guest("", "rebind nvme 0000:00:04.0 --times 3"));
    assert!(outcome.results_of("rebind").any(|result| result["verified"] == true));
}

#[test]
fn reboot() {
    let outcome = run(guest("", "reboot").reboots());
    assert_eq!(outcome.results.events("boot").count(), 2);
    assert!(outcome.results_of("reboot").any(|result| result["verified"] == true));
}
