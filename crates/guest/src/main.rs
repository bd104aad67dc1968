//! `viommu-guest`: the workloads that run inside a guest whose devices are behind the vIOMMU.
//!
//! Built static, it is the guest's `/init`: the kernel hands it everything after ` -- ` on its command line. It
//! mounts the kernel's file systems, loads drivers (the IOMMU's first), runs the workloads and powers off. Several
//! workloads are separated by `+`:
//!
//! ```text
//! … -- nvme-io --op verify --bs 128k --depth 8 --total 64M + nvme-cli
//! … -- trace + fs
//! ```
//!
//! Results are JSON lines, on the second serial port if there is one (see [`results`]). Started as an ordinary
//! process in a guest of one's own it runs the workloads only, and prints to its standard output.

mod agent;
mod blockdev;
mod buffers;
mod busy_end;
mod engine;
mod fs;
mod ftrace;
mod hotplug;
mod init;
mod io_errors;
mod ioat;
mod ioat_selftest;
mod iova_test;
mod kexec;
mod kmsg;
mod map_cost;
mod memory;
mod nvme_cli;
mod nvme_io;
mod pattern;
mod pci;
mod rebind;
mod reboot;
mod report;
mod results;
mod set;
mod shell;
mod size;
mod suspend;
mod sysfs;
mod unattached_dma;
mod vfio;
mod vfio_dma;

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
    /// Send the guest's trace events to the host, while the workloads after this one run.
    Trace(agent::Args),
    /// An interactive shell on the console.
    Shell,
    /// Raw I/O on an NVMe namespace, past the page cache, with io_uring.
    NvmeIo(nvme_io::Args),
    /// What mapping costs the guest in raw I/O: processor time, atomic allocations, memory held.
    MapCost(map_cost::Args),
    /// I/O into nearly all of the guest's memory.
    Memory(memory::Args),
    /// A file system with real files on an NVMe namespace.
    Fs(fs::Args),
    /// Reads that may fail: which error comes when, and what is left behind.
    IoErrors(io_errors::Args),
    /// Commands of the nvme program, each with its exit status and what it printed.
    NvmeCli,
    /// Take a driver off its function and give it back, with I/O after each time.
    Rebind(rebind::Args),
    /// Write a value into a file of sysfs, procfs or debugfs, for what comes after.
    Set(set::Args),
    /// Write, restart the guest, and find everything as it was.
    Reboot,
    /// Read on in the background, until the guest ends.
    BusyEnd,
    /// Start another kernel, which runs the workloads after this one.
    Kexec(kexec::Args),
    /// Suspend the devices and resume them, with I/O before and after.
    Suspend(suspend::Args),
    /// Wait for another NVMe controller to be plugged in, and use it; have it unplugged and plugged in again.
    HotplugWait(hotplug::Args),
    /// Let the kernel's ioatdma bind to the DMA engine; it copies memory as a self-test.
    IoatSelftest,
    /// Let the kernel series' own tests of the two-step DMA API use the DMA engine.
    IovaTest,
    /// Drive the DMA engine from a program, through VFIO: good copies, and DMA that must be refused.
    VfioDma,
    /// Start the DMA engine without a driver, attached to no domain; with `bypass` off its DMA must be refused.
    UnattachedDma,
}

impl Workload {
    /// The kernel modules that this workload needs, beside the IOMMU's and NVMe's.
    fn modules(&self) -> &'static [&'static str] {
        match self {
            Self::Trace(_) => &["virtio_console"],
            Self::VfioDma => &["vfio_pci", "vfio_iommu_type1"],
            Self::IoatSelftest | Self::IovaTest => &["ioatdma"],
            Self::Fs(_) => &["crc32c_generic", "ext4"],
            Self::Memory(_) => &["virtio_mem"],
            _ => &[],
        }
    }

    fn run(&self, results: &mut Results) -> Result<()> {
        match self {
            Self::Report => report::run(results),
            Self::Trace(args) => agent::start(args),
            Self::Shell => shell::run(),
            Self::NvmeIo(args) => nvme_io::run(args, results),
            Self::MapCost(args) => map_cost::run(args, results),
            Self::Memory(args) => memory::run(args, results),
            Self::Fs(args) => fs::run(args, results),
            Self::IoErrors(args) => io_errors::run(args, results),
            Self::NvmeCli => nvme_cli::run(results),
            Self::Rebind(args) => rebind::run(args, results),
            Self::Set(args) => set::run(args, results),
            Self::Reboot => reboot::run(results),
            Self::BusyEnd => busy_end::run(),
            Self::Kexec(args) => kexec::run(args, results),
            Self::Suspend(args) => suspend::run(args, results),
            Self::HotplugWait(args) => hotplug::run(args, results),
            Self::IoatSelftest => ioat_selftest::run(results),
            Self::IovaTest => iova_test::run(results),
            Self::VfioDma => vfio_dma::run(results),
            Self::UnattachedDma => unattached_dma::run(results),
        }
    }
}

fn main() {
    let is_init = std::process::id() == 1;
    let mut results = Results::standard_output();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(is_init, &mut results)))
        .unwrap_or_else(|_| Err(anyhow::anyhow!("A workload panicked; the console has the message")));
    let outcome = outcome.and(agent::stop(&mut results));
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
    let workloads = parse(if is_init { init::arguments() } else { std::env::args().skip(1).collect() })?;
    if is_init {
        // The IOMMU's driver first: an endpoint that binds before it would do its DMA untranslated.
        let mut modules = vec!["virtio_iommu", "nvme"];
        modules.extend(workloads.iter().flat_map(Workload::modules));
        init::load_modules(&modules)?;
        blockdev::wait_for_controllers()?;
    }
    results.emit("boot", report::machine());
    workloads.iter().try_for_each(|workload| workload.run(results))
}

/// Parses the command line: workloads with their arguments, separated by `+`. None at all means a report.
fn parse(args: Vec<String>) -> Result<Vec<Workload>> {
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
