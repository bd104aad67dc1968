//! On QEMU's own virtio-iommu, which offers nothing of the protocol, with QEMU's own NVMe controller behind it.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Process, guest_files, lines, read};

/// A plain QEMU, without a process of ours; its results.
fn run(append: &str, workload: &str) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let files = guest_files("patched");
    std::fs::File::create(folder.path().join("disk.img")).unwrap().set_len(64 << 20).unwrap();
    let child = Command::new(files.join("qemu"))
        .current_dir(folder.path())
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512M"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        // A guest that panics is to end, not to start anew.
        .args(["-action", if workload == "reboot" { "reboot=reset" } else { "reboot=shutdown" }])
        .args(["-serial", "file:console.log", "-serial", "file:results.jsonl"])
        .args(["-device", "virtio-iommu-pci,addr=03.0", "-drive", "if=none,id=disk,file=disk.img,format=raw"])
        .args(["-device", "nvme,drive=disk,serial=test,addr=04.0"])
        .arg("-kernel")
        .arg(files.join("vmlinuz"))
        .arg("-initrd")
        .arg(files.join("initramfs"))
        .args(["-append", &format!("console=ttyS0 panic=-1 {append} -- {}", workload.replace(' ', ","))])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let console = Console(folder.path().join("console.log"));
    Process(child).end();
    let results = lines(&folder.path().join("results.jsonl"));
    assert!(results.iter().any(|result| result["event"] == "end" && result["ok"] == true), "{results:?}");
    let log = results.iter().find(|result| result["event"] == "kernel-log").expect("a report of the kernel's log");
    assert_eq!(log["complaints"], json!([]));
    let text = read(&console.0);
    assert!(text.contains("virtio_iommu") && !text.contains("mapping in two steps"), "which IOMMU is this?");
    results
}

/// Shows the guest's console when the test fails.
struct Console(std::path::PathBuf);

impl Drop for Console {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("==== the guest's console ====\n{}", read(&self.0));
        }
    }
}

fn assert_verified(results: &[Value], iommu_type: &str) {
    assert!(results.iter().any(|result| result["workload"] == "nvme-io" && result["verified"] == true), "{results:?}");
    let boot = results.iter().find(|result| result["event"] == "boot").expect("a report of the boot");
    let function = boot["pci"].as_array().unwrap().iter().find(|function| function["bdf"] == "0000:00:04.0");
    assert_eq!(function.expect("the controller")["iommu_type"], iommu_type);
}

#[test]
fn strict() {
    assert_verified(&run("iommu.strict=1", super::IO), "DMA");
}

#[test]
fn lazy() {
    assert_verified(&run("iommu.strict=0", super::IO), "DMA-FQ");
}

#[test]
fn passthrough() {
    assert_verified(&run("iommu.passthrough=1", super::IO), "identity");
}

#[test]
fn unbind_and_rebind_the_driver() {
    let results = run("", "rebind nvme 0000:00:04.0 --times 3");
    assert!(results.iter().any(|result| result["workload"] == "rebind" && result["verified"] == true), "{results:?}");
}

#[test]
fn reboot() {
    let results = run("", "reboot");
    assert_eq!(results.iter().filter(|result| result["event"] == "boot").count(), 2);
    assert!(results.iter().any(|result| result["workload"] == "reboot" && result["verified"] == true), "{results:?}");
}
