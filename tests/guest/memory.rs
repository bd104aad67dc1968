//! Guest memory that is not one piece of small pages: a device must reach all of it.

use std::collections::BTreeMap;

use crate::NVME;
use serde_json::Value;
use viommu_testkit::guest::{Guest, Outcome};
use viommu_testkit::huge::HugePages;

/// The regions of at least `len` bytes that the controller had in the end, each with the numbers of its mapped reads
/// and writes.
fn regions(outcome: &Outcome, len: u64) -> Vec<(u64, u64, [u32; 2])> {
    let number = |event: &Value, key: &str| u64::from_str_radix(&event[key].as_str().unwrap()[2..], 16).unwrap();
    let is_access = |event: &Value| event["kind"] == "dma" && event["route"] == "mapped" && event["failed"] == false;
    // After the last access QEMU quits and removes all of them. Before that, firmware causes some to be mapped again.
    let end = outcome.trace.iter().rposition(is_access).expect("an access through a mapping") + 1;
    let mut regions: BTreeMap<u64, (u64, [u32; 2])> = BTreeMap::new();
    for event in &outcome.trace[..end] {
        if event["kind"] == "memory" && event["channel"] == "vfio-user" {
            let gpa = number(event, "gpa");
            if event["added"] == true {
                regions.insert(gpa, (event["len"].as_u64().unwrap(), [0, 0]));
            } else {
                regions.remove(&gpa);
            }
        } else if is_access(event) {
            let gpa = number(event, "gpa");
            if let Some((start, (len, counts))) = regions.range_mut(..=gpa).next_back()
                && gpa - *start < *len
            {
                counts[usize::from(event["access"] == "write")] += 1;
            }
        }
    }
    let found = regions.into_iter().map(|(gpa, (len, counts))| (gpa, len, counts));
    found.filter(|region| region.1 >= len).collect()
}

fn assert_sound(outcome: &Outcome, bytes: u64) {
    outcome.assert_translated();
    let result = outcome.results_of("memory").next().expect("a result");
    println!("{result}");
    assert!(result["bytes"].as_u64().unwrap() >= bytes, "{result}");
    assert!(!outcome.log.contains("Refused"), "{}", outcome.log);
}

/// Checks that I/O reached all parts of the machine's memory, of at least `len` bytes each, and that there are `count`
/// or more.
fn assert_all_reached(outcome: &Outcome, count: usize, len: u64) {
    let regions = regions(outcome, len);
    assert!(regions.len() >= count, "{regions:x?}");
    for (gpa, len, [reads, writes]) in regions {
        assert!(reads > 0 && writes > 0, "{gpa:#x} + {len:#x}: {reads} reads, {writes} writes");
    }
}

#[test]
fn virtio_mem() {
    let machine = [
        "-machine",
        "q35",
        "-m",
        "1G,maxmem=16G",
        "-smp",
        "2",
        "-object",
        "memory-backend-memfd,id=ram,size=1G,share=on",
        "-machine",
        "memory-backend=ram",
        "-object",
        "memory-backend-memfd,id=plugged,size=4G,share=on",
        "-device",
        "virtio-mem-pci,id=vm0,memdev=plugged,requested-size=4G,block-size=2M,addr=08.0",
    ];
    let guest = Guest::new(NVME, "memory --wait 4800M").machine(machine).append("memhp_default_state=online_kernel");
    let outcome = guest.run();
    assert_sound(&outcome, 4 << 30);
    let plugged: Vec<_> =
        regions(&outcome, 2 << 20).into_iter().filter(|region| region.0 >= 1 << 32 && region.1 == 2 << 20).collect();
    assert_eq!(plugged.len(), 2048, "QEMU gives each block by itself");
    // The kernel uses some memory itself, such as for the descriptions of all these pages.
    let reached = plugged.iter().filter(|(_, _, [reads, writes])| *reads > 0 && *writes > 0).count();
    assert!(reached > 2048 * 3 / 4, "{reached} blocks of 2048");
}

fn huge_pages(name: &str, size: u64) {
    let Some(_pages) = HugePages::reserve(size, (1 << 20) / size) else { return };
    let backend = format!("memory-backend-memfd,id=ram,size=1G,share=on,hugetlb=on,hugetlbsize={name}");
    let machine = ["-machine", "q35,memory-backend=ram", "-m", "1G", "-object", &backend];
    let outcome = Guest::new(NVME, "memory").machine(machine).run();
    assert_sound(&outcome, 512 << 20);
    assert_all_reached(&outcome, 1, 64 << 20);
}

#[test]
fn huge_pages_of_2_mib() {
    huge_pages("2M", 2 << 10);
}

#[test]
fn huge_pages_of_1_gib() {
    huge_pages("1G", 1 << 20);
}

#[test]
fn sixteen_numa_nodes() {
    let nodes = (0..16).flat_map(|node| {
        let backend = format!("memory-backend-memfd,id=n{node},size=128M,share=on");
        ["-object".to_owned(), backend, "-numa".to_owned(), format!("node,nodeid={node},memdev=n{node}")]
    });
    let arguments: Vec<String> = ["-machine", "q35", "-m", "2G"].map(String::from).into_iter().chain(nodes).collect();
    let outcome = Guest::new(NVME, "memory --leave 256M").machine(arguments.iter().map(String::as_str)).run();
    assert_sound(&outcome, 1 << 30);
    assert_eq!(outcome.results_of("memory").next().unwrap()["nodes"], 16);
    assert_all_reached(&outcome, 16, 64 << 20);
}

#[test]
fn sixteen_dimms() {
    let dimms = (0..16).flat_map(|dimm| {
        let backend = format!("memory-backend-memfd,id=d{dimm},size=128M,share=on");
        ["-object".to_owned(), backend, "-device".to_owned(), format!("pc-dimm,id=dimm{dimm},memdev=d{dimm}")]
    });
    let ram = "memory-backend-memfd,id=ram,size=512M,share=on";
    let machine = ["-machine", "q35,memory-backend=ram", "-m", "512M,slots=16,maxmem=4G", "-object", ram];
    let arguments: Vec<String> = machine.map(String::from).into_iter().chain(dimms).collect();
    let guest = Guest::new(NVME, "memory --wait 2400M").append("memhp_default_state=online_kernel");
    let outcome = guest.machine(arguments.iter().map(String::as_str)).run();
    assert_sound(&outcome, 2 << 30);
    assert_all_reached(&outcome, 17, 128 << 20);
}
