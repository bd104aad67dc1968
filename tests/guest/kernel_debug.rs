//! The workloads on a kernel that watches itself: KASAN, lockdep and DMA_API_DEBUG, and allocations that fail when told to.
//! `scripts/check-kernel-debug` builds it and runs these, which the other guest tests leave out.

use std::time::{Duration, Instant};

use viommu_testkit::guest::{Folder, Guest};

/// What each console must say, or the kernel checks less than it should.
const CHECKERS: [&str; 3] =
    ["DMA-API: debugging enabled", "Lock dependency validator:", "KernelAddressSanitizer initialized"];

/// What no console may say.
const COMPLAINTS: [&str; 19] = [
    "WARNING:",
    "BUG:",
    "UBSAN:",
    "DMA-API:",
    "Oops",
    "Call Trace",
    "Kernel panic",
    "general protection",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "INFO: task",
    "INFO: possible",
    "INFO: rcu",
    "INFO: trying",
    "rcu: INFO",
    "suspicious RCU",
    "soft lockup",
    "page allocation failure",
];

/// What looks like it but is no complaint.
const HARMLESS: [&str; 2] = ["DMA-API: preallocated", "DMA-API: debugging enabled"];

const NVME: &str = "[machine]\nmemory = \"1G\"\nvcpus = 2\n[[nvme]]\naddress = \"04.0\"\nimage = \"nvme0.img\"\n";
const ENGINE: &str = "[[dma-engine]]\naddress = \"05.0\"\n";
const NO_SPLIT: &str = "[iommu]\nsplit = false\n";

const IO: &str =
    "nvme-io --op verify --bs 4k --depth 8 --total 1M + nvme-io --op verify --bs 128k --depth 4 --total 8M --scatter";
const REBIND: &str = "rebind nvme 0000:00:04.0 --times 3";

/// Has allocations fail: so many in a hundred of those that cannot wait, of everybody or only of tasks that ask for it.
fn failing(probability: u32, only_asked: bool) -> String {
    const FAIL: &str = "/sys/kernel/debug/failslab";
    let filter = if only_asked { format!("set {FAIL}/task-filter Y + ") } else { String::new() };
    format!("set {FAIL}/verbose 0 + set {FAIL}/times -1 + {filter}set {FAIL}/probability {probability}")
}

/// The series' own tests: with a function that has no driver, too.
fn tests() -> String {
    let failing = failing(100, true);
    format!("ioat-selftest + set /sys/bus/pci/drivers/nvme/unbind 0000:00:04.0 + {failing} + iova-test")
}

/// Whether a line of the console is a complaint of the kernel's, or a KUnit case that failed.
fn is_complaint(line: &str) -> bool {
    let before_comment = line.split('#').next().unwrap_or_default();
    let failed = before_comment.match_indices("not ok ").any(|(at, what)| {
        let is_word = before_comment[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        !is_word && before_comment[at + what.len()..].starts_with(|c: char| c.is_ascii_digit())
    });
    let complains = COMPLAINTS.iter().any(|complaint| line.contains(complaint));
    (complains || failed) && !HARMLESS.iter().any(|harmless| line.contains(harmless))
}

/// A test that could not run is a failure, but for what the device cannot do.
fn is_skipped(line: &str) -> bool {
    line.contains("# SKIP") && !line.contains("not sparse on this IOMMU")
}

/// Boots; what is wrong. What the boot leaves is in `target/kernel-debug/NAME/`.
fn boot(name: &str, topology: &str, append: &str, workload: &str) -> Vec<String> {
    let begun = Instant::now();
    // Five levels of page tables are switched off: while Linux identifies the processor, KASAN takes four for granted for a
    // moment, and calls what an interrupt touches then wild. A slow machine meets that.
    let guest = Guest::new(topology, workload)
        .folder(&Folder::kept(format!("target/kernel-debug/{name}")))
        .kernel("debug")
        .append(&format!("no5lvl {append}"))
        .limit(Duration::from_secs(900));
    let outcome = guest.start().end();
    let mut wrong = Vec::new();
    if !outcome.status.success() {
        wrong.push(outcome.log.lines().last().unwrap_or("viommu run failed").to_owned());
    }
    for checker in CHECKERS.iter().filter(|checker| !outcome.console.contains(**checker)) {
        wrong.push(format!("the console has no {checker:?}"));
    }
    let lines = outcome.console.lines();
    wrong.extend(lines.filter(|line| is_complaint(line) || is_skipped(line)).map(String::from));
    let suite = outcome.console.lines().find_map(|line| line.split_once("# dma_iova: ")).map_or("", |(_, said)| said);
    println!("{name}: {} s {}", begun.elapsed().as_secs(), suite.trim());
    wrong
}

/// Boots each, of which all must be content.
fn content(name: &str, topology: &str, append: &str, workload: &str) {
    let wrong = boot(name, topology, append, workload);
    assert!(wrong.is_empty(), "{wrong:#?}; the console is in target/kernel-debug/{name}/guest.log");
}

/// A complaint that is there must be found, or the silence of the others says nothing.
#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn a_complaint_is_found() {
    let wrong = boot("planted", NVME, "", "set /dev/kmsg WARNING:planted");
    assert!(wrong.iter().any(|line| line.contains("WARNING:planted")), "{wrong:?}");
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn strict() {
    content("strict", NVME, "iommu.strict=1", &format!("{IO} + {REBIND}"));
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn lazy() {
    content("lazy", NVME, "iommu.strict=0", &format!("{IO} + {REBIND}"));
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn oneshot() {
    content("oneshot", NVME, "iommu.strict=1 dma_iommu.oneshot=1", IO);
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn base() {
    content("base", &[NVME, NO_SPLIT].concat(), "iommu.strict=1", &format!("{IO} + {REBIND}"));
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn passthrough() {
    content("passthrough", NVME, "iommu.passthrough=1", IO);
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn failing_some() {
    content("failing_some", NVME, "iommu.strict=0", &format!("{} + {IO}", failing(5, false)));
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn failing_some_base() {
    let topology = [NVME, NO_SPLIT].concat();
    content("failing_some_base", &topology, "iommu.strict=1", &format!("{} + {IO}", failing(5, false)));
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn tests_strict() {
    content("tests_strict", &[NVME, ENGINE].concat(), "iommu.strict=1 swiotlb=force", &tests());
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn tests_lazy() {
    content("tests_lazy", &[NVME, ENGINE].concat(), "iommu.strict=0 swiotlb=force", &tests());
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn tests_base() {
    content("tests_base", &[NVME, ENGINE, NO_SPLIT].concat(), "iommu.strict=1 swiotlb=force", &tests());
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn vfio() {
    content("vfio", &[NVME, ENGINE].concat(), "", "vfio-dma");
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn reboot() {
    content("reboot", NVME, "", "reboot");
}
