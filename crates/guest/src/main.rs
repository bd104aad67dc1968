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
mod null;
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

/// The workloads: what each is called on the command line with its arguments, which kernel modules it needs beside those of
/// the IOMMU and NVMe, and what runs it.
macro_rules! workloads {
    ($results:ident: $($(#[$doc:meta])* $name:ident $(($args:ident: $type:ty))? needs $modules:tt runs $run:expr;)*) => {
        #[derive(Subcommand)]
        enum Workload {
            $($(#[$doc])* $name $(($type))?,)*
        }

        impl Workload {
            fn modules(&self) -> &'static [&'static str] {
                match self {
                    $(Self::$name { .. } => &$modules,)*
                }
            }

            fn run(&self, $results: &mut Results) -> Result<()> {
                match self {
                    $(Self::$name $(($args))? => $run,)*
                }
            }
        }
    };
}

workloads! { results:
    /// Say what IOMMU, PCI and NVMe devices the guest sees; every run starts with this.
    Report needs [] runs report::run(results);
    /// Send the guest's trace events to the host, while the workloads after this one run.
    Trace(args: agent::Args) needs ["virtio_console"] runs agent::start(args);
    /// An interactive shell on the console.
    Shell needs [] runs shell::run();
    /// Raw I/O on an NVMe namespace, past the page cache, with io_uring.
    NvmeIo(args: nvme_io::Args) needs [] runs nvme_io::run(args, results);
    /// What mapping costs the guest in raw I/O: processor time, atomic allocations, memory held.
    MapCost(args: map_cost::Args) needs [] runs map_cost::run(args, results);
    /// I/O into nearly all of the guest's memory.
    Memory(args: memory::Args) needs ["virtio_mem"] runs memory::run(args, results);
    /// A file system with real files on an NVMe namespace.
    Fs(args: fs::Args) needs ["crc32c_generic", "ext4"] runs fs::run(args, results);
    /// Reads that may fail: which error comes when, and what is left behind.
    IoErrors(args: io_errors::Args) needs [] runs io_errors::run(args, results);
    /// Commands of the nvme program, each with its exit status and what it printed.
    NvmeCli needs [] runs nvme_cli::run(results);
    /// Take a driver off its function and give it back, with I/O after each time.
    Rebind(args: rebind::Args) needs [] runs rebind::run(args, results);
    /// Write a value into a file of sysfs, procfs or debugfs, for what comes after.
    Set(args: set::Args) needs [] runs set::run(args, results);
    /// Write, restart the guest, and find everything as it was.
    Reboot needs [] runs reboot::run(results);
    /// Read on in the background, until the guest ends.
    BusyEnd needs [] runs busy_end::run();
    /// Start another kernel, which runs the workloads after this one.
    Kexec(args: kexec::Args) needs [] runs kexec::run(args, results);
    /// Suspend the devices and resume them, with I/O before and after.
    Suspend(args: suspend::Args) needs [] runs suspend::run(args, results);
    /// Wait for another NVMe controller to be plugged in, and use it; have it unplugged and plugged in again.
    HotplugWait(args: hotplug::Args) needs [] runs hotplug::run(args, results);
    /// Let the kernel's ioatdma bind to the DMA engine; it copies memory as a self-test.
    IoatSelftest needs ["ioatdma"] runs ioat_selftest::run(results);
    /// Let the kernel series' own tests of the two-step DMA API use the DMA engine.
    IovaTest needs ["ioatdma"] runs iova_test::run(results);
    /// Drive the DMA engine from a program, through VFIO: good copies, and DMA that must be refused.
    VfioDma needs ["vfio_pci", "vfio_iommu_type1"] runs vfio_dma::run(results);
    /// Have the smallest device write to memory, through VFIO: where it may, and where it must be refused.
    Null needs ["vfio_pci", "vfio_iommu_type1"] runs null::run(results);
    /// Start the DMA engine without a driver, attached to no domain; with `bypass` off its DMA must be refused.
    UnattachedDma needs [] runs unattached_dma::run(results);
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
