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
//! Results are JSON lines, on the second serial port if there is one (see [`results`]). Started as an ordinary process
//! in a guest of your own, it only runs the workloads, and prints to its standard output. `viommu-guest initramfs`
//! prints what all workloads need in the initramfs, for `scripts/mkinitramfs`.

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
mod iommufd;
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
mod suspend;
mod sysfs;
mod unattached_dma;
mod vfio;
mod vfio_dma;
mod vfio_map;
mod workload;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde_json::json;

use results::Results;
use workload::{Needs, Workload};

#[derive(Parser)]
#[command(name = "viommu-guest", about = "Workloads for a guest behind the vIOMMU; separate several with +")]
struct CommandLine {
    #[command(subcommand)]
    workload: Any,
}

/// The workloads: each one's name (`NvmeIo` is `nvme-io` on the command line), and its module.
macro_rules! workloads {
    ($($name:ident($module:ident),)*) => {
        #[derive(Subcommand)]
        enum Any {
            $($name($module::Args),)*
        }

        impl Any {
            fn needs(&self) -> Needs {
                match self {
                    $(Any::$name(_) => $module::Args::NEEDS,)*
                }
            }

            fn run(&self, results: &mut Results) -> Result<()> {
                match self {
                    $(Any::$name(workload) => workload.run(results),)*
                }
            }
        }

        /// What each of them needs.
        const NEEDS: &[Needs] = &[$($module::Args::NEEDS,)*];
    };
}

workloads! {
    Report(report),
    Trace(agent),
    Shell(shell),
    NvmeIo(nvme_io),
    MapCost(map_cost),
    Memory(memory),
    Fs(fs),
    IoErrors(io_errors),
    NvmeCli(nvme_cli),
    Rebind(rebind),
    Set(set),
    Reboot(reboot),
    BusyEnd(busy_end),
    Kexec(kexec),
    Suspend(suspend),
    HotplugWait(hotplug),
    IoatSelftest(ioat_selftest),
    IovaTest(iova_test),
    VfioDma(vfio_dma),
    VfioMap(vfio_map),
    UnattachedDma(unattached_dma),
    Null(null),
}

fn main() {
    if std::env::args().skip(1).eq(["initramfs"]) {
        return workload::print(NEEDS);
    }
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
        let needs: Vec<Needs> = workloads.iter().map(Any::needs).collect();
        init::load_modules(&workload::modules(&needs))?;
        blockdev::wait_for_controllers()?;
    }
    results.emit("boot", report::machine());
    workloads.iter().try_for_each(|workload| workload.run(results))
}

/// Parses the command line: workloads with their arguments, separated by `+`. None at all means a report.
fn parse(args: Vec<String>) -> Result<Vec<Any>> {
    if args.is_empty() {
        return Ok(vec![Any::Report(report::Args {})]);
    }
    args.split(|arg| arg == "+")
        .map(|words| {
            let line = std::iter::once("viommu-guest").chain(words.iter().map(String::as_str));
            let parsed = CommandLine::try_parse_from(line);
            parsed.map(|line| line.workload).with_context(|| format!("Cannot run the workload \"{}\"", words.join(" ")))
        })
        .collect()
}
