//! Configurations in which a guest with the series must boot, and the cost of its I/O.

use serde_json::Value;
use viommu_testkit::guest::Outcome;

use super::{IO, assert_no_complaint, assert_nothing_left, count_of_io, guest, requests_of_io};
use crate::{NVME, nvme_in};

/// I/Os of [`large_io`], and bytes of each: 32 pages.
const IOS: u64 = 512;
const SIZE: u64 = 128 << 10;

/// Scattered I/O, written and read back. The device waits for kicks: if it polled, their number would depend on the
/// machine.
fn large_io(append: &str) -> Outcome {
    let workload = "nvme-io --op verify --bs 128k --depth 8 --total 32M --scatter";
    let outcome = guest(&format!("[iommu]\npolling = false\n{NVME}"), workload).append(append).run();
    outcome.assert_translated();
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
    outcome
}

/// The kicks of the workload's I/O, without those of the devices' set-up.
fn kicks_of_the_io(outcome: &Outcome) -> u64 {
    let first = requests_of_io(outcome, "RESERVE").next().expect("a RESERVE")["seq"].as_u64().unwrap();
    let last = requests_of_io(outcome, "RELEASE").last().expect("a RELEASE")["seq"].as_u64().unwrap();
    let kicks = outcome.events("kick").filter(|kick| (first..=last).contains(&kick["seq"].as_u64().unwrap()));
    // The first kick comes before its request.
    kicks.count() as u64 + 1
}

/// Checks that each I/O takes RESERVE, one LINK of all pages and RELEASE, and that there is hardly a MAP: those are for
/// the controller's set-up, for contiguous pages, and for PRP lists.
fn assert_three_requests_an_io(outcome: &Outcome) {
    let ios = outcome.events("command").filter(|command| command["len"] == SIZE).count() as u64;
    assert_eq!(ios, IOS);
    assert_eq!(count_of_io(outcome, ["RESERVE", "LINK", "RELEASE", "UNLINK"]), [IOS, IOS, IOS, 0]);
    let links: Vec<&Value> = requests_of_io(outcome, "LINK").collect();
    assert!(links.iter().all(|link| link["size"] == SIZE && link["extents"].as_u64().unwrap() <= 32), "{links:?}");
    let extents: u64 = links.iter().map(|link| link["extents"].as_u64().unwrap()).sum();
    assert!(extents > IOS * 31, "{extents} runs of pages: they are not scattered");
    assert!(outcome.requests("map") <= 24, "{}", outcome.summary);
}

#[test]
fn strict_takes_three_requests_and_two_kicks_an_io() {
    let outcome = large_io("iommu.strict=1");
    assert_three_requests_an_io(&outcome);
    let kicks = kicks_of_the_io(&outcome);
    assert!(kicks <= 2 * IOS, "{kicks} kicks for {IOS} I/Os");
    println!("strict: {kicks} kicks for {IOS} I/Os");
}

#[test]
fn lazy_takes_three_requests_and_little_more_than_a_kick_an_io() {
    let outcome = large_io("iommu.strict=0");
    assert_three_requests_an_io(&outcome);
    let kicks = kicks_of_the_io(&outcome);
    // One for each I/O, and one for each flush of the queue of IOVAs to be freed: every 256 I/Os, when it is full, and
    // every 10 ms, so that a slow machine has more of them.
    let seconds = outcome.results_of("nvme-io").next().expect("a result")["seconds"].as_f64().unwrap();
    let flushes = IOS / 256 + (seconds * 100.0) as u64 + 2;
    assert!(kicks <= IOS + flushes, "{kicks} kicks for {IOS} I/Os and at most {flushes} flushes");
    println!("lazy: {kicks} kicks for {IOS} I/Os in {seconds:.2} s");
}

#[test]
fn passthrough_maps_nothing() {
    let outcome = guest(NVME, IO).append("iommu.passthrough=1").run();
    assert_eq!(outcome.summary["verified"], true);
    assert_no_complaint(&outcome);
    for name in ["map", "reserve", "link"] {
        assert_eq!(outcome.requests(name), 0, "{name}");
    }
    assert_eq!(outcome.count("faults"), 0);
    assert!(outcome.events("dma").all(|dma| dma["route"] == "bypass"));
}

#[test]
fn without_the_protocol_it_maps_page_by_page() {
    let workload = "nvme-io --op verify --bs 128k --depth 4 --total 4M --scatter";
    let outcome = guest(&format!("[iommu]\nsplit = false\n{NVME}"), workload).run();
    outcome.assert_translated();
    assert_no_complaint(&outcome);
    assert_eq!(["reserve", "link", "unlink", "release"].map(|name| outcome.requests(name)), [0; 4]);
    let ios = outcome.events("command").filter(|command| command["len"] == SIZE).count() as u64;
    assert_eq!(ios, 64);
    assert!(outcome.requests("map") > ios * 31 && outcome.requests("unmap") >= ios, "{}", outcome.summary);
}

#[test]
fn two_processors_map_in_one_domain() {
    let io = "nvme-io --op verify --bs 128k --depth 8 --total 8M --scatter --cpu";
    let outcome = guest(&nvme_in("vcpus = 2"), &format!("{io} 0 + {io} 1")).run();
    outcome.assert_translated();
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
    let queues: std::collections::BTreeSet<_> =
        outcome.events("command").filter_map(|command| command["queue"].as_u64()).collect();
    assert!(queues.contains(&1) && queues.contains(&2), "each processor has a queue: {queues:?}");
}

#[test]
fn reboot() {
    let outcome = guest(NVME, "reboot").run();
    assert_eq!(outcome.summary["verified"], true);
    assert_no_complaint(&outcome);
    assert_eq!((outcome.count("faults"), outcome.count("requests_failed")), (0, 0));
    assert!(outcome.events("reset").any(|reset| reset["reset"] == "system"));
    assert!(outcome.requests("link") > 0);
}

#[test]
fn unbind_and_rebind_the_driver() {
    let outcome = guest(NVME, "rebind nvme 0000:00:04.0 --times 5").run();
    outcome.assert_translated();
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
}

#[test]
fn the_kernels_driver_of_the_dma_engine_passes_its_self_test() {
    let topology = format!("{NVME}[[dma-engine]]\naddress = \"05.0\"\n");
    let outcome = guest(&topology, "ioat-selftest").run();
    assert_no_complaint(&outcome);
    assert_eq!(outcome.count("faults"), 0);
    assert!(outcome.events("dma").any(|dma| dma["endpoint"] == 0x28 && dma["route"] == "mapped"));
}

#[test]
fn a_function_that_vfio_owns_is_mapped_by_its_program_alone() {
    let topology = format!("{NVME}[[dma-engine]]\naddress = \"05.0\"\n");
    let outcome = guest(&topology, "vfio-dma").run();
    let result = outcome.results_of("vfio-dma").next().expect("a result");
    assert_no_complaint(&outcome);
    // The program made each refused access.
    let expected = result["cases"].as_array().unwrap().iter().filter(|case| !case["fault_iova"].is_null()).count();
    assert_eq!(outcome.events("fault").count(), expected);
    assert!(expected > 0);
}
