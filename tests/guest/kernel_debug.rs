//! The workloads on a kernel with checks: KASAN, lockdep and DMA_API_DEBUG, and allocations that fail on request.
//! `scripts/check-kernel-debug` builds it and runs these tests, which an ordinary run leaves out.

use std::time::{Duration, Instant};

use viommu_testkit::guest::{Folder, Guest};

use crate::{is_6_12, of_series};

/// Each console must have these, or the kernel checks less than it should.
const CHECKERS: [&str; 3] =
    ["DMA-API: debugging enabled", "Lock dependency validator:", "KernelAddressSanitizer initialized"];

/// No console may have these.
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

/// Lines that look like complaints and are none.
const HARMLESS: [&str; 2] = ["DMA-API: preallocated", "DMA-API: debugging enabled"];

const NVME: &str = "[machine]\nmemory = \"1G\"\nvcpus = 2\n[[nvme]]\naddress = \"04.0\"\nimage = \"nvme0.img\"\n";
const ENGINE: &str = "[[dma-engine]]\naddress = \"05.0\"\n";
const NULL: &str = "[[null]]\naddress = \"06.0\"\nats = true\n";
const NO_SPLIT: &str = "[iommu]\nsplit = false\n";

const IO: &str =
    "nvme-io --op verify --bs 4k --depth 8 --total 1M + nvme-io --op verify --bs 128k --depth 4 --total 8M --scatter";
const REBIND: &str = "rebind nvme 0000:00:04.0 --times 3";

/// The workloads that make allocations fail: this percentage of those that cannot wait, of all tasks or only of those
/// that ask for it.
fn failing(probability: u32, only_asked: bool) -> String {
    const FAIL: &str = "/sys/kernel/debug/failslab";
    let filter = if only_asked { format!("set {FAIL}/task-filter Y + ") } else { String::new() };
    format!("set {FAIL}/verbose 0 + set {FAIL}/times -1 + {filter}set {FAIL}/probability {probability}")
}

/// The workloads for the series' own tests, with a function that has no driver.
fn tests() -> String {
    let failing = failing(100, true);
    let unbind = "set /sys/bus/pci/drivers/nvme/unbind 0000:00:04.0";
    format!("ioat-selftest + {unbind} + {failing} + iova-test + iova-test --reset")
}

/// Whether a line of the console is a complaint from the kernel, or a failed KUnit case.
fn is_complaint(line: &str) -> bool {
    let before_comment = line.split('#').next().unwrap_or_default();
    let failed = before_comment.match_indices("not ok ").any(|(at, what)| {
        let is_word = before_comment[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        !is_word && before_comment[at + what.len()..].starts_with(|c: char| c.is_ascii_digit())
    });
    let complains = COMPLAINTS.iter().any(|complaint| line.contains(complaint));
    (complains || failed) && !HARMLESS.iter().any(|harmless| line.contains(harmless))
}

/// Whether a test was skipped, which is a failure unless the device or Linux 7.3 cannot do what it needs.
fn is_skipped(line: &str) -> bool {
    line.contains("# SKIP")
        && !line.contains("not sparse on this IOMMU")
        && (is_6_12() || !line.contains("links what it is told"))
}

/// Boots, and returns everything that went wrong. The boot's files are in `target/kernel-debug/NAME/`.
fn boot(name: &str, topology: &str, append: &str, workload: &str) -> Vec<String> {
    let begun = Instant::now();
    // Page tables of five levels are switched off: while Linux identifies the processor, KASAN assumes four for a
    // moment, and reports accesses of an interrupt as wild. That happens on a slow machine.
    let guest = Guest::new(topology, workload)
        .folder(&Folder::kept(format!("target/kernel-debug/{name}")))
        .kernel(&of_series("debug"))
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

/// Boots, and checks that nothing went wrong.
fn content(name: &str, topology: &str, append: &str, workload: &str) {
    let wrong = boot(name, topology, append, workload);
    assert!(wrong.is_empty(), "{wrong:#?}; the console is in target/kernel-debug/{name}/guest.log");
}

/// A complaint must be found, or the other tests prove nothing.
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
    content("tests_strict", &[NVME, ENGINE, NULL].concat(), "iommu.strict=1 swiotlb=force", &tests());
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn tests_lazy() {
    content("tests_lazy", &[NVME, ENGINE, NULL].concat(), "iommu.strict=0 swiotlb=force", &tests());
}

#[test]
#[ignore = "scripts/check-kernel-debug runs it"]
fn tests_base() {
    content("tests_base", &[NVME, ENGINE, NULL, NO_SPLIT].concat(), "iommu.strict=1 swiotlb=force", &tests());
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
