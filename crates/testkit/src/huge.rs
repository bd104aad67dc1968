//! Huge pages, for tests that need some.

use std::fs;
use std::path::{Path, PathBuf};

/// Pages of `size` KiB, reserved for a test and released after it.
pub struct HugePages {
    path: PathBuf,
    before: u64,
}

impl HugePages {
    /// Makes sure that `wanted` pages are free. `None` if there are not as many and the user allows that.
    pub fn reserve(size: u64, wanted: u64) -> Option<HugePages> {
        let folder = Path::new("/sys/kernel/mm/hugepages").join(format!("hugepages-{size}kB"));
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok().and_then(|text| text.trim().parse().ok());
        let path = folder.join("nr_hugepages");
        let pages = HugePages { before: read("nr_hugepages").unwrap_or(0), path };
        let free = || read("free_hugepages").unwrap_or(0_u64);
        for _ in 0..5 {
            if free() >= wanted {
                return Some(pages);
            }
            // Only root may do this. The page cache gives way, and the remaining memory is compacted.
            let _ = fs::write("/proc/sys/vm/drop_caches", "3");
            let _ = fs::write("/proc/sys/vm/compact_memory", "1");
            let _ = fs::write(&pages.path, (read("nr_hugepages").unwrap_or(0) + wanted - free()).to_string());
        }
        let (free, path) = (free(), pages.path.display().to_string());
        assert!(
            free >= wanted || std::env::var_os("VIOMMU_NO_HUGE").is_some_and(|value| value == "1"),
            "{wanted} free huge pages of {size} KiB were expected and {free} found: as root, write their number to {path} \
             (soon after boot, while memory is in one piece), or set VIOMMU_NO_HUGE=1 to do without this test"
        );
        if free < wanted {
            println!("left out, as VIOMMU_NO_HUGE says: {wanted} huge pages of {size} KiB cannot be had");
        }
        (free >= wanted).then_some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, self.before.to_string());
    }
}
