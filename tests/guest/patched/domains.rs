//! A function leaves its domain for a while, as one with ATS does around a reset on Linux 7.3. What was linked there is
//! there again afterwards. The cases are those of the module `iova_reset`; the trace shows how they came about.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use viommu_testkit::guest::{Guest, Outcome};

use super::{assert_no_complaint, guest, requests_of};
use crate::is_6_12;

const ENDPOINT: u32 = 0x30;

/// A guest whose only function is the null device, with ATS.
fn away(iommu: &str) -> Guest {
    guest(&format!("[iommu]\n{iommu}[[null]]\naddress = \"06.0\"\nats = true\n"), "iova-test --reset")
}

/// Checks that all cases passed, and that the device refused only the accesses that each of three cases makes.
fn assert_passed(outcome: &Outcome) {
    let result = outcome.results_of("iova-test").next().expect("a result");
    assert_eq!((&result["passed"], &result["failed"], &result["skipped"]), (&json!(5), &json!(0), &json!(0)));
    assert_no_complaint(outcome);
    let faults: Vec<_> = outcome.events("fault").map(|fault| (&fault["endpoint"], &fault["reason"])).collect();
    assert_eq!(faults, [(&json!(ENDPOINT), &json!("MAPPING")); 3]);
    // Between its accesses; QEMU resets it at the start.
    let is_dma = |event: &Value| event["kind"] == "dma";
    let first = outcome.trace.iter().position(is_dma).expect("an access");
    let accesses = outcome.trace[first..].iter().rev().skip_while(|event| !is_dma(event));
    assert_eq!(accesses.filter(|event| event["reset"] == "function" && event["endpoint"] == ENDPOINT).count(), 3);
}

/// The types of the requests for the domain that the function begins in, while it is in another.
fn types_while_away(outcome: &Outcome) -> BTreeSet<&str> {
    let mut attached: Vec<&Value> = Vec::new();
    let mut types = BTreeSet::new();
    for request in outcome.events("request") {
        if request["type"] == "ATTACH" && request["endpoint"] == ENDPOINT {
            attached.push(&request["domain"]);
        } else if let (Some(first), Some(now)) = (attached.first(), attached.last())
            && request["domain"] == **first
            && first != now
        {
            types.insert(request["type"].as_str().unwrap());
        }
    }
    // The cases take it out of its domain six times, and on Linux 7.3 each of the three resets does, too.
    let times = if is_6_12() { 6 } else { 9 };
    assert_eq!(attached.len(), 1 + 2 * times, "{attached:?}");
    types
}

#[test]
fn what_is_linked_outlasts_the_last_endpoint() {
    for mode in ["iommu.strict=1", "iommu.strict=0"] {
        let outcome = away("").append(mode).run();
        assert_passed(&outcome);
        assert_eq!(outcome.count("requests_failed"), 0, "{mode}");
        assert_eq!(types_while_away(&outcome), BTreeSet::from(["LINK", "UNLINK", "RELEASE"]), "{mode}");
        // Each range is reserved once, and released. The last case ends with the RELEASE of a range in which nothing is
        // linked. Linux 7.3 does not wait for that, so the device may be reset before it sees it.
        let ranges = |name| requests_of(&outcome, name).count();
        let (reserved, released) = (ranges("RESERVE"), ranges("RELEASE"));
        assert!(reserved == released || (!is_6_12() && reserved == released + 1), "{mode}: {reserved}, {released}");
        assert_eq!((outcome.count("reservations_live"), outcome.count("linked_bytes")), (0, 0), "{mode}");
    }
}

#[test]
fn mappings_are_made_again() {
    let outcome = away("split = false\n").append("iommu.strict=1").run();
    assert_passed(&outcome);
    assert_eq!(outcome.count("requests_failed"), 0);
    assert_eq!(types_while_away(&outcome), BTreeSet::new());
}

/// A device of the protocol's first version ended reservations with the last endpoint, and so does not know them when
/// they are released.
#[test]
fn a_device_that_drops_ranges_is_named_once() {
    let outcome = away("").append("iommu.strict=1").inject("release=noent:until=1").run();
    assert_passed(&outcome);
    let said = outcome.console.matches("device drops the IOVA ranges of a domain without endpoints").count();
    assert_eq!((said, outcome.count("requests_failed")), (1, 1));
}
