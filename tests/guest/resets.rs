//! QEMU ends, or resets the machine, while controllers work: they must stop before their addresses mean anything else,
//! and nothing may be logged about it.

use serde_json::json;
use viommu_testkit::guest::{Guest, Outcome, Running};

const TWO: &str =
    "[[nvme]]\naddress = \"04.0\"\nimage = \"nvme0.img\"\n[[nvme]]\naddress = \"05.0\"\nimage = \"nvme1.img\"\n";

/// I/O on the first controller that continues for some seconds. The second controller polls its shadow doorbells.
const BUSY: &str = "nvme-io --dev 0000:00:05.0 --op verify --bs 64k --total 1M + \
                    nvme-io --dev 0000:00:04.0 --op randwrite --bs 16k --depth 8 --seconds 8";

/// I/O virtual addresses begin below 4 GiB, far above the guest's memory.
const MEMORY: u64 = 512 << 20;

fn busy() -> Running {
    let guest = Guest::new(TWO, BUSY).start();
    // A line that a reset cuts off would spoil the first line of the next boot. From here on the guest prints nothing
    // for long.
    guest.wait_for_result("the beginning of the second workload", |result| {
        result["event"] == "begin" && result["op"] == "randwrite"
    });
    guest
}

fn assert_quiet(outcome: &Outcome) {
    let address = |dma: &serde_json::Value| {
        u64::from_str_radix(dma["iova"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
    };
    let wild = outcome.events("dma").find(|dma| dma["route"] == "bypass" && address(dma) >= MEMORY);
    assert_eq!(wild, None, "an access went past the IOMMU with an I/O virtual address");
    assert_eq!(outcome.count("faults"), 0);
    assert_eq!(outcome.warnings(), Vec::<&str>::new());
}

#[test]
fn quitting_qemu_ends_run() {
    let guest = busy();
    guest.qmp().execute("quit", json!({}));
    let outcome = guest.end();
    assert!(outcome.status.success(), "{}", outcome.status);
    assert_quiet(&outcome);
}

#[test]
fn a_machine_that_is_reset_under_io_comes_up_again() {
    let guest = busy();
    guest.qmp().execute("system_reset", json!({}));
    let outcome = guest.wait();
    outcome.assert_translated();
    assert_eq!(outcome.results.iter().filter(|result| result["event"] == "boot").count(), 2);
    assert_quiet(&outcome);
}
