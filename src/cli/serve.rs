//! `viommu serve`: the daemon, for a QEMU that somebody else starts.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::sandbox::Sandbox;
use super::source::Source;
use super::stop::{Caught, Stop};
use super::{machine, say};
use crate::daemon::{Bound, Daemon, Options, open_devices};
use crate::topology::Size;
use crate::topology::qemu::Paths;
use crate::vhost::Injection;
use viommu_trace::now_ns;

/// How long one sleep lasts while there is nothing to do but wait for a signal.
const LONG: Duration = Duration::from_secs(3600);

/// Serve the IOMMU and the endpoints of a topology until SIGINT or SIGTERM
///
/// The sockets of the endpoints (NAME.sock) and the VIOT (viot.bin) are put beside the IOMMU's socket; `viommu args`
/// prints the QEMU arguments that use them. When a QEMU ends, the next one can connect.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,

    /// The vhost-user socket of the IOMMU
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,

    /// Serve the trace on this socket
    #[arg(long, value_name = "PATH")]
    trace_socket: Option<PathBuf>,

    /// Follow QEMU's STOP, RESUME and RESET events on this QMP socket; without it a reset is recognised by its effects
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,

    /// Make images that do not exist, of this size
    #[arg(long, value_name = "SIZE")]
    create_images: Option<Size>,

    #[command(flatten)]
    sandbox: Sandbox,

    /// For tests of drivers: answer requests wrongly (see CONTRIBUTING.md)
    #[arg(long, value_name = "REQUEST=ANSWER[:KEY=NUMBER]...", hide = true)]
    inject: Vec<Injection>,

    /// For benchmarks: record events in every other time slice of this length (see CONTRIBUTING.md)
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..), requires = "trace_socket", hide = true)]
    trace_slices: Option<u64>,
}

/// Serves until a signal.
pub fn main(args: &Args) -> Result<()> {
    let topology = args.source.load()?;
    let options = Options {
        paths: Paths { iommu: args.socket_path.clone() },
        trace_socket: args.trace_socket.clone(),
        inject: args.inject.clone(),
    };
    // A file system may keep whoever opens a file waiting; until here a signal ends the process as it ends any other.
    let devices = open_devices(&topology, args.create_images)?;
    let signals = Caught::new().context("Cannot wait for signals")?;
    let bound = Bound::new(&topology, &options, devices)?;
    args.sandbox.enter(&options, args.qmp.as_deref(), None);
    let stop = signals.watch().context("Cannot wait for signals")?;
    let daemon = bound.start()?;
    if let Some(qmp) = &args.qmp {
        machine::follow(qmp, &stop, &daemon)?;
    }
    say(format_args!("viommu: serving on {}\n", args.socket_path.display()))?;
    let slices = match args.trace_slices {
        Some(ms) => trace_in_slices(&daemon, Duration::from_millis(ms), &stop),
        None => {
            while !stop.wait(LONG) {}
            String::new()
        }
    };
    daemon.end();
    say(slices)
}

/// The beginning of a time slice that is not measured: clients and their thread are still busy with the slice before.
const SETTLE: Duration = Duration::from_millis(60);

/// Until the end, records the events of every other time slice. Returns what was done in each after [`SETTLE`], a line each.
///
/// What tracing costs is less than two runs differ, so it has to be switched within one.
fn trace_in_slices(daemon: &Daemon, slice: Duration, stop: &Stop) -> String {
    let mut lines = String::new();
    let mut traced = true;
    while !stop.wait(SETTLE) {
        let (begun, before) = (now_ns(), daemon.io_count());
        let ended = stop.wait(slice);
        let (now, count) = (now_ns(), daemon.io_count());
        let line = json!({ "begin": begun, "end": now, "traced": traced, "io_count": count - before });
        lines += &format!("{line}\n");
        if ended {
            break;
        }
        traced = !traced;
        daemon.record(traced);
    }
    lines
}
