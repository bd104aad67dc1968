//! The virtio-iommu is reset while the machine is suspended, and told everything again when it resumes.

use serde_json::{Value, json};
use viommu_testkit::guest::{Guest, Outcome};

use super::power::{MODES, PATIENCE, assert_always_translated, resets};
use super::{IO, assert_no_complaint, assert_nothing_left, guest, requests_of};
use crate::{NVME, nvme_in};

/// The workload checks the data of reads that continue over the suspends, and of writes.
fn suspends(topology: &str, mode: &str) -> Outcome {
    const TIMES: u64 = 3;
    let outcome = guest(topology, &format!("suspend --times {TIMES} + {IO}"))
        .append(&format!("{mode} {PATIENCE} suspend.pm_test_delay=0"))
        .run();
    assert_eq!(outcome.results_of("suspend").next().expect("a result of suspend")["verified"], true);
    assert_eq!((&outcome.summary["verified"], outcome.count("requests_failed")), (&json!(true), 0));
    assert_no_complaint(&outcome);
    assert_always_translated(&outcome);
    assert_eq!(outcome.requests("attach"), 1 + TIMES, "{mode}: an ATTACH at each resume");
    assert_eq!(resets(&outcome) as u64, TIMES, "{mode}");
    outcome
}

#[test]
fn devices_are_suspended_between_io() {
    for mode in MODES {
        assert_nothing_left(&suspends(NVME, mode));
    }
}

#[test]
fn devices_are_suspended_between_io_without_the_protocol() {
    let topology = format!("[iommu]\nsplit = false\n{}", nvme_in("vcpus = 2"));
    suspends(&topology, "iommu.strict=0");
}

/// Two functions share a slot, and so a domain. When the guest resumes, the device refuses the first. The domain's
/// mappings come back with the second, the first must not be in bypass, and the next resume attaches both.
#[test]
fn an_endpoint_that_is_refused_at_resume_leaves_the_mappings_to_the_next() {
    let [first, second] = [0x20, 0x21];
    let nvme = |function| format!("[[nvme]]\naddress = \"04.{function}\"\nimage = \"nvme{function}.img\"\n");
    // Endpoints are attached again in the order in which the driver found them. The first has no driver of its own, so
    // nothing needs it. The other is removed and found again, so that it is certainly the second.
    let workload = format!(
        "set /sys/bus/pci/drivers/nvme/unbind 0000:00:04.0 + set /sys/bus/pci/devices/0000:00:04.1/remove 1 \
         + set /sys/bus/pci/rescan 1 + suspend --times 2 + {IO}"
    );
    let outcome = guest(&[0, 1].map(nvme).concat(), &workload)
        .append(&format!("{PATIENCE} suspend.pm_test_delay=0"))
        .inject("attach=nomem:after=3:until=4")
        .run();
    assert_eq!(outcome.results_of("suspend").next().expect("a result of suspend")["verified"], true);
    assert_eq!(outcome.summary["verified"], true);
    assert_no_complaint(&outcome);
    assert_always_translated(&outcome);
    assert_nothing_left(&outcome);
    let attaches: Vec<(u64, &str)> = requests_of(&outcome, "ATTACH")
        .skip(2)
        .map(|attach| (attach["endpoint"].as_u64().unwrap(), attach["status"].as_str().unwrap()))
        .collect();
    let resume = |status| [(first, status), (second, "OK")];
    assert_eq!(attaches, [&[(second, "OK")][..], &resume("NOMEM"), &resume("OK")].concat());
    assert_eq!(outcome.console.matches("could not restore its mappings (-12)").count(), 1);
    assert_eq!(outcome.events("bypass").map(|bypass| &bypass["value"]).collect::<Vec<_>>(), [0]);
}

/// The domain in which nothing is mapped: the last one.
pub(super) const BLOCKED: u64 = u32::MAX as u64;

/// Two functions share a slot, and so a domain. When the guest resumes, the device attaches the first, but refuses its
/// first mapping. The mappings come back with the second function. The first must not be in bypass: its controller
/// reaches nothing until the next resume restores everything.
///
/// `told` lists the requests about the first endpoint after the refused mapping: type, status, and domain or value.
fn mappings_are_refused_at_resume(injection: Option<&str>, told: &[(&str, &str, Option<u64>)], reason: &str) {
    const SUSPEND: &str = "set /sys/power/state mem";
    let [first, second] = [0x20, 0x21];
    let nvme = |function| format!("[[nvme]]\naddress = \"04.{function}\"\nimage = \"nvme{function}.img\"\n");
    let workload = [
        // This sets the order of the endpoints: see above.
        "set /sys/bus/pci/devices/0000:00:04.1/remove 1",
        "set /sys/bus/pci/rescan 1",
        "set /sys/power/pm_test devices",
        SUSPEND,
        // The controller's driver waits for its first command, and gives up. A dead controller is not suspended.
        "set --refused /sys/power/state mem",
        "set /sys/bus/pci/drivers/nvme/unbind 0000:00:04.0",
        "rebind nvme 0000:00:04.1",
        SUSPEND,
        "set /sys/bus/pci/drivers/nvme/bind 0000:00:04.0",
        "rebind nvme 0000:00:04.0",
    ];
    let guest = guest(&[0, 1].map(nvme).concat(), &workload.join(" + "))
        .append(&format!("{PATIENCE} suspend.pm_test_delay=0 nvme_core.admin_timeout=10"))
        .inject("map=nomem:resets=1:until=1");
    let outcome = injection.into_iter().fold(guest, Guest::inject).run();
    assert_eq!(outcome.results_of("rebind").filter(|result| result["verified"] == true).count(), 2);
    assert_no_complaint(&outcome);
    assert_eq!(outcome.console.matches("could not restore its mappings (-12)").count(), 1);

    // From one reset to the next.
    let is_reset = |event: &Value| event["kind"] == "reset" && event["reset"] == "device";
    let phases: Vec<&[Value]> = outcome.trace.split(is_reset).collect();
    let [boot, refused, given] = phases[..] else { panic!("{} resets", phases.len() - 1) };
    let domain = told_of_endpoints(boot)[0].3;
    let attached = |endpoint| (endpoint, "ATTACH", "OK", domain);
    let mut wanted = vec![attached(first)];
    wanted.extend(told.iter().map(|&(what, status, value)| {
        let endpoint = if what == "bypass" { 0 } else { first };
        (endpoint, what, status, value.unwrap_or(domain))
    }));
    wanted.push(attached(second));
    assert_eq!(told_of_endpoints(refused), wanted);
    assert_eq!(told_of_endpoints(given), [attached(first), attached(second)]);

    let of_first =
        |kind: &'static str| refused.iter().filter(move |event| event["kind"] == kind && event["endpoint"] == first);
    assert!(of_first("fault").count() > 0, "the controller tried nothing");
    assert!(of_first("fault").all(|fault| fault["reason"] == reason));
    assert_eq!(of_first("dma").next(), None);
}

/// The requests about endpoints, and writes of `bypass`, in their order: endpoint, type, status, and domain or value.
pub(super) fn told_of_endpoints(events: &[Value]) -> Vec<(u64, &str, &str, u64)> {
    let told = events.iter().filter_map(|event| {
        let text = |name: &str| event[name].as_str().unwrap_or_default();
        let number = |name: &str| event[name].as_u64().unwrap_or_default();
        match text("kind") {
            // It applies to all of them.
            "bypass" => Some((0, "bypass", "", number("value"))),
            "request" if ["ATTACH", "DETACH"].contains(&text("type")) => {
                Some((number("endpoint"), text("type"), text("status"), number("domain")))
            }
            _ => None,
        }
    });
    told.collect()
}

#[test]
fn an_endpoint_whose_mappings_are_refused_at_resume_is_moved_to_where_nothing_is_mapped() {
    mappings_are_refused_at_resume(None, &[("ATTACH", "OK", Some(BLOCKED))], "MAPPING");
}

#[test]
fn an_endpoint_that_cannot_be_moved_there_is_detached_without_bypass() {
    let told = [("ATTACH", "NOMEM", Some(BLOCKED)), ("bypass", "", Some(0)), ("DETACH", "OK", None)];
    mappings_are_refused_at_resume(Some("attach=nomem:resets=1:after=1:until=2"), &told, "DOMAIN");
}
