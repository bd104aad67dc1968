//! Linux with a series in `guest-kernel-patches/`: the two-step DMA API, on our device and on devices without the
//! protocol. `scripts/prepare-guest patched` gets what these tests need. With `VIOMMU_SERIES=6.12` in the environment
//! they boot the kernel of `scripts/prepare-guest patched-6.12`. Tests in `linux_6_12` and `linux_7_3` fail on the
//! other kernel, and those in `suspend` on Linux 7.3, whose series cannot suspend yet.

mod boots;
mod domains;
mod failures;
mod linux_6_12;
mod linux_7_3;
mod power;
mod qemu;
mod suspend;

use serde_json::Value;
use viommu_testkit::guest::{Guest, Outcome};

/// I/O that shows that a guest works: small I/O, and large I/O on scattered pages.
const IO: &str =
    "nvme-io --op verify --bs 4k --depth 8 --total 1M + nvme-io --op verify --bs 128k --depth 4 --total 8M --scatter";

/// A guest with the series.
fn guest(topology: &str, workload: &str) -> Guest {
    Guest::new(topology, workload).kernel(&crate::patched_kernel())
}

/// An address in a request or a result.
fn address(event: &Value, name: &str) -> u64 {
    u64::from_str_radix(event[name].as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

/// Checks that the kernel has not complained.
fn assert_no_complaint(outcome: &Outcome) {
    outcome.results.assert_no_complaint();
}

/// The requests of a type in the trace, in their order.
fn requests_of<'a>(outcome: &'a Outcome, name: &'a str) -> impl Iterator<Item = &'a Value> {
    outcome.events("request").filter(move |request| request["type"] == name)
}

/// Those of them that belong to an operation of a driver, which has a tag. The others are for memory that drivers keep:
/// a queue of a controller takes several pages, which are LINKed if no contiguous piece of memory is large enough.
fn requests_of_io<'a>(outcome: &'a Outcome, name: &'a str) -> impl Iterator<Item = &'a Value> {
    requests_of(outcome, name).filter(|request| request["tag"].as_str().is_some_and(|tag| tag != "0x0"))
}

/// How many [`requests_of_io`] there are of each type.
fn count_of_io<const N: usize>(outcome: &Outcome, names: [&str; N]) -> [u64; N] {
    names.map(|name| requests_of_io(outcome, name).count() as u64)
}

/// Checks that every reservation for I/O was released, and that nothing is linked.
fn assert_nothing_left(outcome: &Outcome) {
    let [reserved, released] = count_of_io(outcome, ["RESERVE", "RELEASE"]);
    assert_eq!(reserved, released);
    assert_eq!((outcome.count("reservations_live"), outcome.count("linked_bytes")), (0, 0));
}
