//! Memory behind a BAR, in stock QEMU.

use std::fs;
use std::process::Command;

use serde_json::json;
use viommu_testkit::frames::{Frames, MAPPED};
use viommu_testkit::function::Served;
use viommu_testkit::guest::guest_files;
use viommu_testkit::process::Process;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_trace::Tracer;

/// The guest's accesses then go directly to the memory, and neither to QEMU nor as messages to the device.
#[test]
fn qemu_maps_what_a_function_says_can_be_mapped() {
    let served = Served::new(0x20, Tracer::default(), Frames::make, || ());
    let socket = json!({ "type": "unix", "path": served.path() });
    let device = json!({ "driver": "vfio-user-pci", "addr": "04.0", "socket": socket });
    let mut qemu = Command::new(guest_files("stock").join("qemu"));
    qemu.args(["-machine", "q35,memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=64M,share=on"]);
    qemu.args(["-m", "64M", "-nodefaults", "-display", "none", "-S", "-device", &device.to_string()]);
    let qemu = Process::start(&mut qemu);
    // Where each mapping begins in the memory, and its length in bytes.
    let mapped = || -> Vec<(u64, u64)> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", qemu.id())).unwrap_or_default();
        let of_bar = maps.lines().filter(|line| line.contains("memfd:viommu-bar"));
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let mut mapped: Vec<_> = of_bar
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let (start, end) = words[0].split_once('-').unwrap();
                assert!(words[1].starts_with("rw") && words[1].ends_with('s'), "{line}");
                (hex(words[2]), hex(end) - hex(start))
            })
            .collect();
        mapped.sort_unstable();
        mapped
    };
    let wanted: Vec<_> = MAPPED.iter().map(|area| (area.start, area.end - area.start)).collect();
    wait_until(PATIENCE, "that QEMU maps the memory", || {
        assert!(!qemu.ended(), "QEMU ended");
        mapped() == wanted
    });
}
