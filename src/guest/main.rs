//! `viommu-guest`: the workloads that run inside a guest whose devices are behind the vIOMMU.
//!
//! Built static, it is the guest's `/init`: the kernel hands it everything after ` -- ` on its command line. It
//! mounts the kernel's file systems, loads drivers (the IOMMU's first), runs the workloads and powers off. Several
//! workloads are separated by `+`:
//!
//! ```text
//! … -- nvme-io --op verify --bs 128k --depth 8 --total 64M + nvme-cli
//! ```
//!
//! Results are JSON lines, on the second serial port if there is one (see [`results`]). Started as an ordinary
//! process in a guest of one's own it runs the workloads only, and prints to its standard output.

mod blockdev;
mod buffers;
mod engine;
mod init;
mod kmsg;
mod nvme_io;
mod pattern;
mod report;
mod results;
mod shell;
mod size;
mod sysfs;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde_json::json;

use results::Results;

#[derive(Parser)]
#[command(name = "viommu-guest", about = "Workloads for a guest behind the vIOMMU; separate several with +")]
struct CommandLine {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Subcommand)]
enum Workload {
    /// Say what IOMMU, PCI and NVMe devices the guest sees; every run starts with this.
    Report,
    /// An interactive shell on the console.
    Shell,
    /// Raw I/O on an NVMe namespace, past the page cache, with io_uring.
    NvmeIo(nvme_io::Args),
}

impl Workload {
    /// The kernel modules that this workload needs, beside the IOMMU's.
    fn modules(&self) -> &'static [&'static str] {
        match self {
            Self::Report | Self::Shell | Self::NvmeIo(_) => &["nvme"],
        }
    }

    fn run(&self, results: &mut Results) -> Result<()> {
        match self {
            Self::Report => report::run(results),
            Self::Shell => shell::run(),
            Self::NvmeIo(args) => nvme_io::run(args, results),
        }
    }
}

fn main() {
    let is_init = std::process::id() == 1;
    let mut results = Results::standard_output();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(is_init, &mut results)))
        .unwrap_or_else(|_| Err(anyhow::anyhow!("A workload panicked; the console has the message")));
    if let Err(error) = &outcome {
        eprintln!("viommu-guest: error: {error:#}");
        results.emit("error", json!({ "message": format!("{error:#}") }));
    }
    results.emit("kernel-log", kmsg::report());
    results.emit("end", json!({ "ok": outcome.is_ok() }));
    if is_init {
        init::power_off(&mut results);
    }
    std::process::exit(i32::from(outcome.is_err()));
}

fn run(is_init: bool, results: &mut Results) -> Result<()> {
    if is_init {
        init::mount_file_systems()?;
        *results = Results::guest_port();
    }
    let workloads = parse(std::env::args().skip(1))?;
    if is_init {
        let mut modules = vec!["virtio_iommu"];
        modules.extend(workloads.iter().flat_map(Workload::modules));
        init::load_modules(&modules)?;
        blockdev::wait_for_controllers()?;
    }
    results.emit("boot", report::machine());
    workloads.iter().try_for_each(|workload| workload.run(results))
}

/// Parses the command line: workloads with their arguments, separated by `+`. None at all means a report.
fn parse(args: impl Iterator<Item = String>) -> Result<Vec<Workload>> {
    let args: Vec<String> = args.collect();
    if args.is_empty() {
        return Ok(vec![Workload::Report]);
    }
    args.split(|arg| arg == "+")
        .map(|words| {
            let line = std::iter::once("viommu-guest").chain(words.iter().map(String::as_str));
            let parsed = CommandLine::try_parse_from(line);
            parsed.map(|line| line.workload).with_context(|| format!("Cannot run the workload \"{}\"", words.join(" ")))
        })
        .collect()
}
