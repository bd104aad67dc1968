//! How Linux describes data to the NVMe controller.

use std::collections::BTreeSet;

use viommu_testkit::guest::{Guest, Outcome};

use crate::NVME;

/// The kinds of pointers that I/O commands of at least this many bytes used.
fn pointers(outcome: &Outcome, least: u64) -> BTreeSet<String> {
    let commands = outcome.events("command").filter(|command| command["queue"] != 0);
    let of_data = commands.filter(|command| command["len"].as_u64() >= Some(least));
    of_data.map(|command| command["pointer"].as_str().unwrap().to_string()).collect()
}

/// The IOMMU makes one range of scattered pages, which is large enough for Linux to prefer an SGL; a threshold of 0 tells
/// it never to use one.
#[test]
fn sgls_and_prps_carry_the_same_data() {
    const IO: &str = "nvme-io --op verify --bs 128k --depth 4 --total 8M --scatter";
    for (threshold, pointer) in [("", "sgl"), ("nvme.sgl_threshold=0", "prp")] {
        let outcome = Guest::new(NVME, IO).append(threshold).run();
        outcome.assert_translated();
        assert_eq!(pointers(&outcome, 128 << 10), [pointer.to_string()].into(), "{threshold}");
    }
}
