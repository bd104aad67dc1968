//! What only the series for Linux 7.3 does: VFIO and iommufd map all runs of a program's memory before they wait for the
//! IOMMU, a request that is refused is not retried for ever, and an endpoint that the device does not attach is not lost.

mod mainline;

use serde_json::{Value, json};
use viommu_testkit::guest::Outcome;

use super::failures::{assert_all_fail_after_200_maps, reads};
use super::suspend::{BLOCKED, told_of_endpoints};
use super::{address, assert_no_complaint, guest, requests_of};
use crate::{NVME, nvme_in};

/// MAP requests that fit the queue.
const QUEUE: u64 = 128;

/// What it took to fill a domain with memory of a program.
struct Filled {
    maps: u64,
    /// Between the first MAP and the last.
    kicks: u64,
}

fn fill(arguments: &str) -> Filled {
    let topology =
        format!("[iommu]\npolling = false\n{}[[dma-engine]]\naddress = \"05.0\"\n", nvme_in("memory = \"2G\""));
    let outcome = guest(&topology, &format!("vfio-map {arguments}")).append("transparent_hugepage=never").run();
    assert_no_complaint(&outcome);
    let result = outcome.results_of("vfio-map").next().expect("a result");
    let (start, bytes) = (address(result, "iova"), result["bytes"].as_u64().unwrap());
    let is_of_program = |map: &&Value| (start..start + bytes).contains(&address(map, "virt_start"));
    let maps: Vec<&Value> = requests_of(&outcome, "MAP").filter(is_of_program).collect();
    let mapped: u64 = maps.iter().map(|map| map["size"].as_u64().unwrap()).sum();
    assert_eq!(mapped, bytes);
    let seq = |event: &Value| event["seq"].as_u64().unwrap();
    let between = seq(maps[0])..seq(maps[maps.len() - 1]);
    let kicks = outcome.events("kick").filter(|kick| between.contains(&seq(kick))).count() as u64;
    println!("vfio-map {arguments}: {} runs, {} MAP, {kicks} kicks", result["runs"], maps.len());
    Filled { maps: maps.len() as u64, kicks }
}

/// A gigabyte of a guest that was just booted is in 590 to 640 runs, if it has no huge pages. Before, each took a kick.
fn gigabyte_is_filled_with_few_kicks(arguments: &str) {
    let Filled { maps, kicks } = fill(&format!("--size 1G --run 1728k{arguments}"));
    assert!((590..=640).contains(&maps), "{maps} MAP");
    assert!(kicks <= 10, "{kicks} kicks");
}

#[test]
fn vfio_maps_a_gigabyte_with_few_kicks() {
    gigabyte_is_filled_with_few_kicks("");
}

#[test]
fn iommufd_maps_a_gigabyte_with_few_kicks() {
    gigabyte_is_filled_with_few_kicks(" --iommufd");
}

#[test]
fn scattered_pages_take_a_kick_for_each_full_queue() {
    for arguments in ["", " --iommufd"] {
        let Filled { maps, kicks } = fill(&format!("--size 32M --scatter{arguments}"));
        assert!(maps > 32 * QUEUE, "{maps} MAP are not scattered");
        assert!(kicks <= maps.div_ceil(QUEUE), "{kicks} kicks for {maps} MAP");
    }
}

/// With this switch there is no second way to map: LINK, which the device accepts, is not used.
#[test]
fn mappings_that_are_refused_fail_the_reads_if_there_is_no_other_way() {
    let outcome =
        guest(NVME, "io-errors --ios 400 --bs 4k").append("dma_iommu.oneshot=1").inject("map=inval:after=200").run();
    assert_all_fail_after_200_maps(reads(&outcome), "EIO");
    assert_no_complaint(&outcome);
}

const ENDPOINT: u64 = 0x30;

/// The null device leaves its domain and comes back, several times in each case. Something goes wrong the first time. So
/// the first case fails, and the others must pass.
fn away(iommu: &str, append: &str, injections: &[&str]) -> Outcome {
    let topology = format!("[iommu]\n{iommu}[[null]]\naddress = \"06.0\"\nats = true\n");
    let guest = guest(&topology, "iova-test --reset").append(&format!("iommu.strict=1 {append}"));
    let outcome = injections.iter().fold(guest, |guest, injection| guest.inject(injection)).start().end();
    let result = outcome.results_of("iova-test").next().expect("a result");
    assert_eq!((&result["passed"], &result["failed"]), (&json!(4), &json!(1)), "{result}");
    outcome
}

/// When the endpoint comes back to its domain the device refuses a mapping there, and then to attach the endpoint to the
/// domain that it has left, and to others until the ATTACH with this number. Checks what it is told next about endpoints.
fn there_is_no_way_back(until: u64, wanted: &[(u64, &str, &str)]) {
    let attach = format!("attach=nomem:after=3:until={until}");
    let outcome = away("split = false\n", "", &["map=nomem:after=3:until=4", &attach]);
    assert_eq!(outcome.events("injected").count(), outcome.count("requests_failed") as usize);
    let is_refused = |event: &Value| event["type"] == "MAP" && event["status"] == "NOMEM";
    let at = outcome.trace.iter().position(is_refused).expect("a refused MAP");
    let told = told_of_endpoints(&outcome.trace[at..]).into_iter().map(|(endpoint, what, status, domain)| {
        (endpoint, if domain == BLOCKED { "ATTACH without mappings" } else { what }, status)
    });
    assert_eq!(told.take(wanted.len()).collect::<Vec<_>>(), wanted);
}

/// The endpoint must not stay in the domain that it has come to: nobody knows that it is there, and the domain's id would be
/// given to another domain one day.
#[test]
fn an_endpoint_without_a_way_back_is_moved_to_where_nothing_is_mapped() {
    there_is_no_way_back(4, &[(ENDPOINT, "ATTACH", "NOMEM"), (ENDPOINT, "ATTACH without mappings", "OK")]);
}

#[test]
fn an_endpoint_that_can_go_nowhere_is_detached_without_bypass() {
    let wanted = [
        (ENDPOINT, "ATTACH", "NOMEM"),
        (ENDPOINT, "ATTACH without mappings", "NOMEM"),
        (0, "bypass", ""),
        (ENDPOINT, "DETACH", "OK"),
    ];
    there_is_no_way_back(5, &wanted);
}

/// The device has attached an endpoint when the driver has given up waiting for that. The next time it is taken out of
/// wherever it is, so that nothing is refused.
#[test]
fn an_attach_that_is_answered_too_late_is_settled() {
    let outcome = away("", "virtio_iommu.timeout_ms=500", &["attach=late:ms=3600000:behind=1:after=1:until=2"]);
    assert_eq!((outcome.events("injected").count(), outcome.count("requests_failed")), (1, 0));
    assert_eq!(outcome.count("faults"), 3);
}
