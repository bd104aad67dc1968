//! A file system with real files on a namespace behind the IOMMU.

use viommu_testkit::guest::Guest;

use crate::NVME;

fn files_are_as_they_were_written(kernel: &str) {
    let outcome = Guest::new(NVME, "fs").kernel(kernel).run();
    outcome.assert_translated();
    let result = outcome.results_of("fs").next().expect("a result");
    let bytes = result["bytes"].as_u64().unwrap();
    assert!(bytes > 32 << 20 && result["files"].as_u64().unwrap() > 150, "{result}");
    // Written once, and read from the device twice: after the caches were dropped, and after a remount.
    assert!(outcome.count("dma_read_bytes") >= bytes, "{}", outcome.summary);
    assert!(outcome.count("dma_write_bytes") >= 2 * bytes, "{}", outcome.summary);
}

#[test]
fn real_files() {
    files_are_as_they_were_written("stock");
}

mod patched {
    #[test]
    fn real_files() {
        super::files_are_as_they_were_written(&crate::patched_kernel());
    }
}
