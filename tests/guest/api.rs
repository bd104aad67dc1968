//! The two-step DMA API in the guest's kernel, exercised by the series' own tests (the workload `iova-test`), and the
//! number of requests that it takes.

use std::collections::BTreeSet;

use serde_json::Value;
use viommu_testkit::guest::{Guest, Outcome};

use crate::{is_6_12, nvme_in, patched_kernel};

/// Pages of each case that is counted, and their bytes.
const PAGES: u64 = 512;
const BYTES: u64 = PAGES * 4096;

/// The case that the ordinary kernels skip, since they cannot make memory short. `make check-kernel-debug` boots a kernel
/// that can.
const SHORT: &str = "iova_test_memory_short";
/// The case that Linux 7.3 skips, which links what it is told.
const NO_MEMORY: &str = "iova_test_no_memory";

/// Runs the series' tests with this IOMMU and everything that a case may need: two processors, bounce buffers, and a
/// function without a driver. No case may fail, and only those that the kernel cannot run and these may be skipped.
fn run(iommu: &str, skipped: &[&'static str]) -> Outcome {
    // The device waits for kicks: if it polled, their number would depend on the machine.
    let topology =
        format!("[iommu]\n{iommu}\npolling = false\n{}[[dma-engine]]\naddress = \"05.0\"\n", nvme_in("vcpus = 2"));
    let workload = "set /sys/bus/pci/drivers/nvme/unbind 0000:00:04.0 + iova-test";
    let outcome =
        Guest::new(&topology, workload).kernel(&patched_kernel()).append("iommu.strict=1 swiotlb=force").run();
    let result = outcome.results_of("iova-test").next().expect("a result");
    assert_eq!(result["failed"], 0, "{result:#}");
    let cases = result["cases"].as_array().unwrap().iter();
    let found = cases.filter(|case| case["outcome"] == "skipped").filter_map(|case| case["name"].as_str());
    let mut wanted: BTreeSet<_> = skipped.iter().copied().chain([SHORT]).collect();
    if !is_6_12() {
        wanted.insert(NO_MEMORY);
    }
    assert_eq!(found.collect::<BTreeSet<_>>(), wanted, "{result:#}");
    outcome
}

/// Whether [`PAGES`] scattered pages can make this many runs. A few may be adjacent by chance.
fn are_scattered(runs: u64) -> bool {
    (PAGES - 8..=PAGES).contains(&runs)
}

/// The requests with a tag, in their order.
fn tagged<'a>(outcome: &'a Outcome, tag: &str) -> Vec<&'a Value> {
    outcome.events("request").filter(|request| request["tag"] == tag).collect()
}

fn types<'a>(requests: &[&'a Value]) -> Vec<&'a str> {
    requests.iter().filter_map(|request| request["type"].as_str()).collect()
}

/// A hexadecimal string of the trace as a number, or `None` if the request does not have it.
fn hex(value: &Value) -> u64 {
    value.as_str().map_or(0, |text| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap())
}

mod patched {
    use super::*;

    #[test]
    fn two_steps_take_as_many_requests_as_they_should() {
        let outcome = run("split = true", &[]);

        // 512 pages take one RESERVE and one LINK. A page in the middle is unlinked alone.
        let many = tagged(&outcome, "0x1051");
        assert_eq!(types(&many), ["RESERVE", "LINK", "UNLINK", "RELEASE"]);
        assert!(are_scattered(many[1]["extents"].as_u64().unwrap()), "{}", many[1]);
        assert_eq!(many[1]["size"], BYTES);
        assert_eq!((&many[2]["granules"], &many[2]["size"]), (&1.into(), &4096.into()));
        assert_eq!(many[3]["granules"], PAGES - 1);
        // One kick announces both, with what was posted before and not waited for.
        let at = |event: &Value| outcome.trace.iter().position(|other| other["seq"] == event["seq"]).unwrap();
        let (reserve, link) = (at(many[0]), at(many[1]));
        let kick = outcome.trace[..link].iter().rposition(|event| event["kind"] == "kick").expect("a kick");
        assert!(kick < reserve, "{:#?}", &outcome.trace[reserve..=link]);
        let announced = outcome.trace[kick..=link].iter().filter(|event| event["kind"] == "request").count();
        assert_eq!(outcome.trace[kick]["requests"], announced);

        // 512 faults, with a page and a wait each; then the same pages with one wait.
        let faults = tagged(&outcome, "0x1052");
        assert_eq!(types(&faults).iter().filter(|name| **name == "LINK").count() as u64, PAGES);
        assert_eq!(faults.len() as u64, PAGES + 2);
        assert_eq!(types(&tagged(&outcome, "0x1053")), ["RESERVE", "LINK", "RELEASE"]);

        // dma_map_sg() of 512 scattered pages, by a driver that does not know the new API.
        let untagged = tagged(&outcome, "0x0");
        let full = |request: &&&Value| {
            request["type"] == "RELEASE" && request["size"] == BYTES && request["granules"] == PAGES
        };
        let releases: Vec<_> = untagged.iter().filter(full).collect();
        assert_eq!(releases.len(), 1, "{releases:?}");
        let (start, end) = (&releases[0]["virt_start"], at(releases[0]));
        let reserve = outcome.trace[..end]
            .iter()
            .rposition(|event| event["type"] == "RESERVE" && event["virt_start"] == *start)
            .expect("the RESERVE");
        let requests = outcome.trace[reserve..=end].iter().filter(|event| event["kind"] == "request");
        let requests: Vec<_> = requests.collect();
        assert_eq!(types(&requests), ["RESERVE", "LINK", "RELEASE"]);
        assert!(are_scattered(requests[1]["extents"].as_u64().unwrap()), "{}", requests[1]);
        assert_eq!((outcome.count("faults"), outcome.count("reservations_live")), (0, 0));
    }

    #[test]
    fn without_the_protocol_each_page_is_a_request() {
        // Mappings in one step have no holes and cannot be split.
        let skipped = [
            "iova_test_split",
            "iova_test_holes",
            "iova_test_refused",
            "iova_test_refused_apart",
            "iova_test_refused_order",
            "iova_test_count_many",
            "iova_test_count_faults",
            "iova_test_count_batch",
        ];
        let outcome = run("split = false", &skipped);
        assert_eq!((outcome.requests("reserve"), outcome.requests("link")), (0, 0));
        // The last UNMAP of this size is that of dma_map_sg(). It was mapped run by run: 513 requests.
        let requests: Vec<_> = outcome.events("request").collect();
        let unmap = requests
            .iter()
            .rposition(|request| request["type"] == "UNMAP" && request["size"] == BYTES)
            .expect("an UNMAP of 512 pages");
        let start = hex(&requests[unmap]["virt_start"]);
        let inside = |request: &&&Value| (start..start + BYTES).contains(&hex(&request["virt_start"]));
        let since = requests[..unmap].iter().rev().filter(inside).take_while(|request| request["type"] == "MAP");
        let maps: Vec<_> = since.collect();
        assert!(are_scattered(maps.len() as u64), "{} MAP", maps.len());
        // The queue holds 128 of them. When it is full the device is notified, and again for requests that had to wait,
        // but not each time that the driver checks for an answer. A slow device answers them in smaller batches.
        let seq = |event: &Value| event["seq"].as_u64().unwrap();
        let between = seq(maps[maps.len() - 1])..seq(requests[unmap]);
        let kicks = outcome.events("kick").filter(|kick| between.contains(&seq(kick))).count();
        println!("{} MAP and an UNMAP: {kicks} kicks", maps.len());
        assert!((4..=maps.len() / 4).contains(&kicks), "{kicks} kicks");
    }
}
