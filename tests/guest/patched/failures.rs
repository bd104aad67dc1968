//! A device that refuses requests, or does not answer them: the application's I/O fails, the kernel reports that once,
//! and leaks nothing. [`viommu run --inject`](viommu::vhost::Injection) says what the device does to which request.

use serde_json::{Value, json};
use viommu_testkit::guest::Outcome;

use super::{address, assert_no_complaint, assert_nothing_left, guest, requests_of, requests_of_io};
use crate::{NVME, is_6_12};

/// The result of the reads that may fail.
pub(super) fn reads(outcome: &Outcome) -> &Value {
    outcome.results_of("io-errors").next().expect("a result of io-errors")
}

/// The injection with which a device holds an answer back until the driver, which waits for it, has given up and added
/// this many more requests. The time is longer than a guest may take.
fn held_until_behind(requests: u64) -> String {
    format!("late:ms=3600000:behind={requests}")
}

/// Checks reads that wait for an answer which never comes: one of them, or a few that are in flight, waits for the
/// timeout; the others fail at once.
fn assert_one_wait(result: &Value, timeout_ms: u64) {
    let time = |name: &str| result[name].as_u64().unwrap();
    assert!(time("slowest_ms") >= timeout_ms && time("median_failed_ms") < timeout_ms, "{result}");
}

/// How many lines of the guest's console contain this.
fn said(outcome: &Outcome, what: &str) -> usize {
    outcome.console.lines().filter(|line| line.contains(what)).count()
}

/// The error that an application gets for a request which the device refuses with this status.
fn error_of(status: &str) -> &'static str {
    match status {
        "inval" if !is_6_12() => "EINVAL",
        "nomem" if !is_6_12() => "ENOSPC",
        _ => "EIO",
    }
}

/// Checks how often the IOMMU's driver said that it could not map.
fn assert_said_that_it_could_not_map(outcome: &Outcome, times: usize) {
    assert_eq!(said(outcome, "could not map"), if is_6_12() { times } else { 0 });
}

/// Which read has the 11th request of a type, counted from 0. Memory that drivers keep may have taken the first
/// requests.
fn eleventh(outcome: &Outcome, name: &str) -> u64 {
    10 - (requests_of(outcome, name).count() - requests_of_io(outcome, name).count()) as u64
}

/// The 11th LINK is refused with this status. The others, and later I/O, work.
fn one_refused_link(status: &str) {
    let workload = "io-errors --ios 30 + nvme-io --op verify --bs 128k --depth 4 --total 4M --scatter";
    let outcome = guest(NVME, workload).inject(&format!("link={status}:after=10:until=11")).run();
    let result = reads(&outcome);
    assert_eq!(result["errors"], json!({ error_of(status): 1 }));
    assert_eq!((&result["first_failed"], &result["failed"]), (&json!(eleventh(&outcome, "LINK")), &json!(1)));
    assert_said_that_it_could_not_map(&outcome, 1);
    assert_eq!(outcome.events("injected").count(), 1);
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
    // The controller did not get the command.
    let commands = outcome.events("command").filter(|command| command["len"] == 128 << 10);
    assert_eq!(commands.count(), 29 + 64);
    assert_eq!((outcome.summary["verified"].as_bool(), outcome.count("faults")), (Some(true), 0));
}

#[test]
fn a_link_that_is_invalid_fails_one_read() {
    one_refused_link("inval");
}

#[test]
fn a_link_for_which_the_device_has_no_memory_fails_one_read() {
    one_refused_link("nomem");
}

#[test]
fn a_reservation_that_is_refused_fails_one_read() {
    let workload = "io-errors --ios 30 + nvme-io --op verify --bs 128k --depth 4 --total 4M --scatter";
    let outcome = guest(NVME, workload).inject("reserve=nomem:after=10:until=11").run();
    let result = reads(&outcome);
    assert_eq!(result["errors"], json!({ error_of("nomem"): 1 }));
    assert_eq!(result["first_failed"], eleventh(&outcome, "RESERVE"));
    assert_said_that_it_could_not_map(&outcome, 1);
    assert_no_complaint(&outcome);
    assert_eq!((outcome.count("reservations_live"), outcome.count("linked_bytes")), (0, 0));
    assert_eq!(outcome.summary["verified"], true);
}

/// Checks 400 reads of one page, which is mapped in one step: the read with the 201st MAP fails with this error, and all
/// later ones. Memory that drivers keep took some of the earlier MAPs.
pub(super) fn assert_all_fail_after_200_maps(result: &Value, error: &str) {
    let (first, failed) = (result["first_failed"].as_u64().unwrap(), result["failed"].as_u64().unwrap());
    assert!((100..=200).contains(&first), "{result}");
    assert_eq!((failed, &result["errors"][error]), (400 - first, &json!(failed)));
}

/// Reads of one page, of which the device refuses all mappings after the 200th MAP. Linux 7.3 tries again in two steps,
/// so it refuses these too.
fn reads_that_are_refused_after_200_maps(status: &str) -> Outcome {
    let refusing = guest(NVME, "io-errors --ios 400 --bs 4k").inject(&format!("map={status}:after=200"));
    let outcome = if is_6_12() { refusing } else { refusing.inject(&format!("link={status}")) }.run();
    assert_all_fail_after_200_maps(reads(&outcome), error_of(status));
    assert_no_complaint(&outcome);
    outcome
}

#[test]
fn mappings_in_one_step_that_are_refused_fail_the_reads() {
    let outcome = reads_that_are_refused_after_200_maps("inval");
    assert_eq!(said(&outcome, "could not map") > 0, is_6_12());
}

/// The device refuses to move an endpoint to another domain. Linux goes back to the old domain, and must be able to map
/// there.
#[test]
fn an_attach_that_is_refused_leaves_the_endpoint_where_it_was() {
    let workload = "set /sys/bus/pci/drivers/nvme/unbind 0000:00:04.0 \
                    + set --refused /sys/kernel/iommu_groups/0/type identity \
                    + set /sys/bus/pci/drivers/nvme/bind 0000:00:04.0 + rebind nvme 0000:00:04.0 --times 1";
    let outcome = guest(NVME, workload).inject("attach=nomem:after=1:until=2").run();
    assert_eq!((outcome.events("injected").count(), outcome.count("requests_failed")), (1, 1));
    assert_eq!((outcome.summary["verified"].as_bool(), outcome.count("faults")), (Some(true), 0));
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
}

/// A leak of 128 KiB of IOVAs in each of 10,000 failures would be 1.2 GiB of addresses, which are allocated from 4 GiB
/// downwards. A leak of a reservation's memory would be about 10 MiB of kernel memory.
#[test]
fn ten_thousand_refused_links_leak_nothing() {
    const FAILURES: u64 = 10_000;
    let workload = format!(
        "io-errors --ios 100 + io-errors --ios {FAILURES} + nvme-io --op verify --bs 128k --depth 8 --total 8M --scatter"
    );
    let injection = format!("link=ioerr:after=100:until={}", 100 + FAILURES);
    let outcome = guest(NVME, &workload).inject(&injection).run();
    let results: Vec<_> = outcome.results_of("io-errors").collect();
    // The first 100 LINKs succeed; a few of them may be for memory that drivers keep.
    let failed = |index: usize| results[index]["errors"]["EIO"].as_u64().unwrap_or(0);
    assert_eq!((failed(0) + failed(1), failed(0) < 10), (FAILURES, true));
    assert_eq!(outcome.count("requests_failed"), FAILURES);
    assert_no_complaint(&outcome);

    // IOVAs: as many are freed as were allocated, except for memory that drivers keep, and the same few are used from
    // first to last. The trace is so long that events may be lost, so nothing is counted in it.
    let ios = 100 + FAILURES + 128;
    let [reserved, linked, released] = ["reserve", "link", "release"].map(|name| outcome.requests(name));
    assert_eq!((linked, released), (reserved, ios));
    assert!((ios..ios + 10).contains(&reserved), "{reserved}");
    assert_eq!((outcome.count("reservations_live"), outcome.count("linked_bytes")), (0, 0));
    let starts: Vec<u64> = requests_of_io(&outcome, "RESERVE").map(|request| address(request, "virt_start")).collect();
    let lowest = |starts: &[u64]| *starts.iter().min().unwrap();
    let (early, late) = (lowest(&starts[..100]), lowest(&starts[100..]));
    assert!(early.saturating_sub(late) < 16 << 20, "addresses went down from {early:#x} to {late:#x}");
    let distinct: std::collections::BTreeSet<_> = starts.iter().collect();
    assert!(distinct.len() < 1000, "{} different ranges", distinct.len());

    // The kernel's memory.
    let slab = |when: &str| results[1][when]["slab_kib"].as_u64().expect("SUnreclaim of /proc/meminfo");
    let grown = slab("memory_after").saturating_sub(slab("memory_before"));
    assert!(grown < 1024, "the kernel's slabs grew by {grown} KiB");
    if let (Some(before), Some(after)) =
        (results[1]["memory_before"]["iova_ranges"].as_u64(), results[1]["memory_after"]["iova_ranges"].as_u64())
    {
        assert!(after < before + 1000, "IOVA ranges: {before}, then {after}");
    }
    println!(
        "{FAILURES} failures: {} ranges from {:#x} up, slabs grew by {grown} KiB",
        distinct.len(),
        lowest(&starts)
    );
    // The last workload runs after the injection has ended.
    assert_eq!(outcome.summary["verified"], true);
}

#[test]
fn a_link_that_is_never_answered_fails_the_reads_after_a_bounded_wait() {
    const TIMEOUT_MS: u64 = 1500;
    let outcome = guest(NVME, "io-errors --ios 30")
        .append(&format!("virtio_iommu.timeout_ms={TIMEOUT_MS}"))
        .inject("link=silent:after=10")
        .run();
    let result = reads(&outcome);
    // From then on the device is lost: all other reads fail too, without another wait.
    let first = eleventh(&outcome, "LINK");
    assert_eq!((&result["first_failed"], &result["errors"]), (&json!(first), &json!({ "EIO": 30 - first })));
    assert_one_wait(result, TIMEOUT_MS);
    assert_eq!(said(&outcome, "device does not answer"), 1);
    assert_eq!(outcome.events("injected").count(), 1);
    assert_no_complaint(&outcome);
}

/// If the device has no memory, trying again does not help, as it does when the kernel has none.
#[test]
fn a_mapping_in_one_step_for_which_the_device_has_no_memory_fails_the_reads() {
    reads_that_are_refused_after_200_maps("nomem");
}

#[test]
fn a_mapping_in_one_step_that_is_never_answered_fails_the_reads_too() {
    const TIMEOUT_MS: u64 = 1500;
    let outcome = guest(NVME, "io-errors --ios 400 --bs 4k")
        .append(&format!("virtio_iommu.timeout_ms={TIMEOUT_MS}"))
        .inject("map=silent:after=200")
        .run();
    let result = reads(&outcome);
    assert_all_fail_after_200_maps(result, "EIO");
    assert_one_wait(result, TIMEOUT_MS);
    assert_eq!(said(&outcome, "device does not answer"), 1);
    assert_no_complaint(&outcome);
}

#[test]
fn a_device_that_answers_too_late_is_used_again() {
    // The device is away from the 11th LINK until the driver has undone the mapping that it waited for.
    let workload = "io-errors --ios 30 --recover + nvme-io --op verify --bs 128k --depth 4 --total 4M --scatter";
    let injection = format!("link={}:after=10:until=11", held_until_behind(1));
    let outcome = guest(NVME, workload).append("virtio_iommu.timeout_ms=500").inject(&injection).run();
    let result = reads(&outcome);
    assert_eq!(result["first_failed"], eleventh(&outcome, "LINK"));
    assert_eq!(said(&outcome, "device does not answer"), 1);
    assert_eq!(said(&outcome, "device answers again"), 1);
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
    assert_eq!(outcome.summary["verified"], true);
}

/// Sixteen reads are made at once, small enough for Linux to map all of them before it starts the first. The device is
/// away from the first RELEASE of the second sixteen on (or from one a little later, if drivers have released memory of
/// their own). The others are unmapped meanwhile, and the driver cannot wait for that. All those requests reach the
/// device when it is back.
#[test]
fn what_is_unmapped_while_the_device_is_away_is_undone_later() {
    const DEPTH: u64 = 16;
    const BEHIND: u64 = 7;
    let workload = format!(
        "io-errors --ios 48 --bs 64k --depth {DEPTH} --recover \
         + nvme-io --op verify --bs 128k --depth 4 --total 4M --scatter"
    );
    let injection = format!("release={}:after={DEPTH}:until={}", held_until_behind(BEHIND), DEPTH + 1);
    let outcome = guest(NVME, &workload).append("iommu.strict=1 virtio_iommu.timeout_ms=500").inject(&injection).run();
    assert_eq!(said(&outcome, "device does not answer"), 1);
    assert_eq!(said(&outcome, "device answers again"), 1);
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
    assert_eq!((outcome.summary["verified"].as_bool(), outcome.count("faults")), (Some(true), 0));

    let after = outcome.trace.iter().skip_while(|event| event["kind"] != "injected");
    let requests: Vec<&Value> = after.filter(|event| event["kind"] == "request").take(1 + BEHIND as usize).collect();
    assert!(requests.iter().all(|request| request["type"] == "RELEASE"), "{requests:?}");
}

/// The first LINK that the device gets after it was away is refused, and its sender gets the error.
#[test]
fn the_first_link_after_the_device_was_away_is_waited_for() {
    let outcome = guest(NVME, "io-errors --ios 30 --recover")
        .append("virtio_iommu.timeout_ms=500")
        .inject(&format!("link={}:after=10:until=11", held_until_behind(1)))
        .inject("link=nomem:after=11:until=12")
        .run();
    let result = reads(&outcome);
    assert_eq!((outcome.events("injected").count(), outcome.count("requests_failed")), (2, 1));
    assert_eq!(said(&outcome, "device answers again"), 1);
    assert_said_that_it_could_not_map(&outcome, 1);
    let number = |name: &str| result[name].as_u64().unwrap();
    let failed = number("last_failed") - number("first_failed") + 1;
    let errors = if is_6_12() { json!({ "EIO": failed }) } else { json!({ "EIO": failed - 1, "ENOSPC": 1 }) };
    assert_eq!((&result["failed"], &result["errors"]), (&json!(failed), &errors));
    // The controller got no command whose data was not mapped.
    let commands = outcome.events("command").filter(|command| command["len"] == 128 << 10).count() as u64;
    assert_eq!((commands, outcome.count("faults")), (number("ios") - failed, 0));
    assert_no_complaint(&outcome);
    assert_nothing_left(&outcome);
}
