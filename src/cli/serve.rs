//! `viommu serve`: the daemon, for a QEMU that somebody else starts.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::daemon::{Daemon, Options};
use super::say;
use super::source::Source;
use super::stop::Stop;
use crate::topology::Size;
use crate::topology::qemu::Paths;
use crate::vhost::Injection;

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

    /// For tests of drivers: answer requests wrongly (see CONTRIBUTING.md)
    #[arg(long, value_name = "REQUEST=ANSWER[:KEY=NUMBER]...", hide = true)]
    inject: Vec<Injection>,
}

/// Serves until a signal.
pub fn main(args: &Args) -> Result<()> {
    let topology = args.source.load()?;
    let stop = Stop::on_signals().context("Cannot wait for signals")?;
    let options = Options {
        paths: Paths { iommu: args.socket_path.clone() },
        trace_socket: args.trace_socket.clone(),
        qmp: args.qmp.clone(),
        create_images: args.create_images,
        inject: args.inject.clone(),
    };
    let daemon = Daemon::start(&topology, &options, &stop)?;
    say(format_args!("viommu: serving on {}\n", args.socket_path.display()))?;
    while !stop.wait(LONG) {}
    daemon.end();
    Ok(())
}
