//! The same NVMe workloads on Linux without a series, and with it on a device without and with the split protocol: `make
//! compare`, for Linux 7.3, or with `VIOMMU_SERIES=6.12` for that. Prints a table, and writes a file in target/compare/ and
//! the table of this Linux in docs/results.md.
//!
//! There are three kinds of boots: some are traced, to count requests and kicks; in some the guest measures the cost of
//! mapping; and in some only throughput is measured.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::process::ExitCode;

use serde_json::{Value, json};
use viommu_testkit::guest::of_series;

mod costs;
mod counts;
mod report;
mod throughput;

#[path = "../common/mod.rs"]
mod common;

/// Rounds for throughput, at least 6. With 9, the true median lies between the second lowest and the second highest
/// value with a confidence of 96 %.
const ROUNDS: usize = 9;

/// The sizes whose requests and costs are measured.
pub const SIZES: [Size; 2] = [
    Size { name: "128k", scatter: true, pages: 32, ios: 256, depth: 8 },
    Size { name: "4k", scatter: false, pages: 1, ios: 1024, depth: 1 },
];

/// Direct reads of one size.
pub struct Size {
    /// As the workload takes it.
    pub name: &'static str,
    /// Whether its pages are scattered in memory.
    pub scatter: bool,
    /// How many physically contiguous runs a buffer then has.
    pub pages: u32,
    /// I/Os that are counted.
    pub ios: u64,
    /// I/Os in flight while they are counted.
    pub depth: u32,
}

impl Size {
    /// The options that give this size to a workload.
    pub fn options(&self) -> String {
        format!("--bs {}{}", self.name, if self.scatter { " --scatter" } else { "" })
    }
}

/// One of the things that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Variant {
    /// Its name in compare.json.
    pub name: &'static str,
    /// Its kernel, as [`of_series`] takes it.
    pub kernel: &'static str,
    /// Whether the device offers the split protocol.
    pub split: bool,
}

pub const VARIANTS: [Variant; 3] = [
    Variant { name: "unpatched", kernel: "unpatched", split: true },
    Variant { name: "patched_off", kernel: "patched", split: false },
    Variant { name: "patched_on", kernel: "patched", split: true },
];

/// When the guest gives unmapped addresses back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mode {
    /// Its name in compare.json.
    pub name: &'static str,
    /// The option for it on the kernel's command line.
    pub append: &'static str,
    /// The type of such a domain in sysfs.
    pub domain: &'static str,
}

pub const MODES: [Mode; 2] = [
    Mode { name: "strict", append: "iommu.strict=1", domain: "DMA" },
    Mode { name: "lazy", append: "iommu.strict=0", domain: "DMA-FQ" },
];

/// A variant in a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Setup {
    pub variant: Variant,
    pub mode: Mode,
}

impl Variant {
    /// Its kernel, as `scripts/prepare-guest` names it.
    pub fn kernel(self) -> String {
        of_series(self.kernel)
    }
}

impl Setup {
    /// All six.
    pub fn all() -> Vec<Setup> {
        MODES.iter().flat_map(|&mode| VARIANTS.iter().map(move |&variant| Setup { variant, mode })).collect()
    }

    /// With `polling` the device polls for requests while it is awake, which is the default; without it, it waits for
    /// kicks.
    pub fn topology(self, polling: bool) -> String {
        format!(
            "[machine]\nmemory = \"512M\"\nvcpus = 1\n[iommu]\nsplit = {}\npolling = {polling}\n[[nvme]]\n\
             address = \"04.0\"\nimage = \"disk.img\"\n",
            self.variant.split
        )
    }

    /// Checks that a guest has the mode and the buffers that were meant, and returns its kernel's release.
    pub fn check(self, results: &[Value]) -> String {
        let boot = results.iter().find(|value| value["event"] == "boot").expect("a guest says what it is");
        let functions = boot["pci"].as_array().into_iter().flatten();
        let domain = functions.filter(|function| function["driver"] == "nvme").map(|function| &function["iommu_type"]);
        assert_eq!(domain.collect::<Vec<_>>(), [self.mode.domain], "{self}: {boot}");
        let scattered = results.iter().filter(|value| value["scatter"] == true);
        for result in scattered {
            let size = SIZES.iter().find(|size| size.scatter).unwrap();
            assert_eq!(result["physical_runs_per_io"], f64::from(size.pages), "{self}: the pages are not scattered");
        }
        boot["kernel"].as_str().unwrap().to_string()
    }
}

impl std::fmt::Display for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.variant.name, self.mode.name)
    }
}

fn main() -> ExitCode {
    // `cargo bench` passes --bench. `cargo test --benches` runs the file too, and must do nothing.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let rounds =
        std::env::var("VIOMMU_COMPARE_ROUNDS").map_or(ROUNDS, |text| text.parse().expect("a number of rounds"));
    // Counted before the cores are divided: afterwards this process has fewer.
    let count = std::thread::available_parallelism().unwrap().get();
    let mut all = json!({});
    for setup in Setup::all() {
        eprintln!("counts: {setup}");
        let of = &mut all[setup.variant.name][setup.mode.name];
        *of = counts::count(setup);
        let [low, median, high] = counts::polled_kicks(setup);
        of[SIZES[0].name]["polled_kicks_per_io"] = json!(median);
        of[SIZES[0].name]["polled_kicks_range"] = json!([low, high]);
    }
    let cores = common::Cores::divide();
    for setup in Setup::all() {
        eprintln!("costs: {setup}");
        costs::measure(setup, &cores, &mut all[setup.variant.name][setup.mode.name]);
    }
    throughput::measure(rounds, &cores, &mut all);
    report::finish(&all, rounds, count)
}
