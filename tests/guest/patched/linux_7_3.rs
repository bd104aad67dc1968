//! What only the series for Linux 7.3 does: VFIO and iommufd map all runs of a program's memory before they wait for the
//! IOMMU.

use serde_json::Value;

use super::{address, assert_no_complaint, guest};
use crate::nvme_in;

/// MAP requests that fit the queue.
const QUEUE: u64 = 128;

/// Checks how often the device was kicked while a domain was filled with this much memory. Each time that the queue is
/// full the driver kicks the device and waits, and it may do so again before the queue is empty. Without huge pages the
/// memory of a guest that was just booted is in some hundred runs a gigabyte.
fn domain_is_filled_with_few_kicks(arguments: &str) {
    let topology =
        format!("[iommu]\npolling = false\n{}[[dma-engine]]\naddress = \"05.0\"\n", nvme_in("memory = \"2G\""));
    let outcome = guest(&topology, &format!("vfio-map {arguments}")).append("transparent_hugepage=never").run();
    assert_no_complaint(&outcome);
    let result = outcome.results_of("vfio-map").next().expect("a result");
    let (start, bytes) = (address(result, "iova"), result["bytes"].as_u64().unwrap());
    let is_of_program = |map: &&Value| (start..start + bytes).contains(&address(map, "virt_start"));
    let maps: Vec<&Value> = super::requests_of(&outcome, "MAP").filter(is_of_program).collect();
    let mapped: u64 = maps.iter().map(|map| map["size"].as_u64().unwrap()).sum();
    assert_eq!(mapped, bytes);
    let seq = |event: &Value| event["seq"].as_u64().unwrap();
    let between = seq(maps[0])..seq(maps[maps.len() - 1]);
    let kicks = outcome.events("kick").filter(|kick| between.contains(&seq(kick))).count() as u64;
    let count = maps.len() as u64;
    println!("vfio-map {arguments}: {} runs, {count} MAP, {kicks} kicks", result["runs"]);
    assert!(count > QUEUE / 2, "{count} MAP are too few to show anything");
    assert!(kicks <= 2 * count.div_ceil(QUEUE) + 1, "{kicks} kicks for {count} MAP");
}

#[test]
fn vfio_maps_a_gigabyte_with_few_kicks() {
    domain_is_filled_with_few_kicks("--size 1G");
}

#[test]
fn iommufd_maps_a_gigabyte_with_few_kicks() {
    domain_is_filled_with_few_kicks("--size 1G --iommufd");
}

#[test]
fn vfio_maps_scattered_pages_with_few_kicks() {
    domain_is_filled_with_few_kicks("--size 32M --scatter");
}
