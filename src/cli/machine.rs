//! What happens to the machine, for a daemon whose QEMU has a QMP socket.

use std::path::Path;

use anyhow::{Context, Result};

use super::qmp::{self, MachineEvent};
use super::stop::Stop;
use crate::daemon::Daemon;

/// Tells the daemon of pauses and resets of the machine behind the QMP socket at `path`, until `stop`.
pub fn follow(path: &Path, stop: &Stop, daemon: &Daemon) -> Result<()> {
    let control = daemon.control().clone();
    let tell = move |event| match event {
        MachineEvent::Stop => control.machine_paused(),
        MachineEvent::Resume => control.machine_resumed(),
        MachineEvent::Reset => control.machine_reset(),
    };
    qmp::watch(path.to_owned(), stop.clone(), tell).context("Cannot start a thread")
}
