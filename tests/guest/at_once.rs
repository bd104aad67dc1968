//! Several guests at once, which share nothing.

use viommu_testkit::guest::{Folder, Guest, InProcess, Running};

use crate::{BUSY, NVME};

/// The same topology twice, so that all names are the same: once served by `viommu run` and once by this process.
#[test]
fn two_guests_do_their_io_at_the_same_time() {
    let folder = Folder::new();
    let daemon = InProcess::start(&folder, NVME);
    let workload = format!("{BUSY} + nvme-io --op verify --bs 64k --total 1M");
    let guests = [Guest::new(NVME, &workload), daemon.guest(&workload)].map(Guest::start);
    for guest in &guests {
        guest.wait_for_result("the beginning of the I/O", |result| result["event"] == "begin");
    }
    for guest in &guests {
        guest.mark_disk();
    }
    let [outcome, other] = guests.map(Running::wait);
    outcome.assert_translated();
    assert!(other.results_of("nvme-io").any(|result| result["verified"] == true));
    let counts = daemon.end();
    assert!(counts.io_count > 0 && counts.dma_read_bytes > 0, "{counts:?}");
    assert_eq!((counts.iommu.faults, counts.unknown_requests, counts.malformed_requests), (0, 0, 0));
}
