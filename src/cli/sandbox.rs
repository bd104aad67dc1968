//! The sandbox of a daemon, as its options need it.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::path::{Path, PathBuf};

use clap::ArgAction;
use clap::builder::FalseyValueParser;

use crate::daemon::Options;
use crate::sandbox::{self, Policy};

/// The option that leaves it out.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Sandbox {
    /// Keep all rights of a process: do not enter the sandbox (see docs/threat-model.md)
    ///
    /// Without this, once everything is open, the daemon opens no file, starts no program and makes no system call but
    /// those that it needs. For debuggers and sanitizers; please report whatever else needs it.
    #[arg(long, env = "VIOMMU_NO_SANDBOX", hide_env_values = true, action = ArgAction::SetTrue,
          value_parser = FalseyValueParser::new())]
    no_sandbox: bool,
}

impl Sandbox {
    /// Enters it, unless it is left out. `qmp` is the socket that the daemon will connect to, `child` the process that it
    /// will end.
    pub fn enter(self, options: &Options, qmp: Option<&Path>, child: Option<u32>) {
        if self.no_sandbox {
            log::info!("There is no sandbox (--no-sandbox)");
            return;
        }
        let sockets = options.trace_socket.iter().chain([&options.paths.iommu]);
        let folders = sockets.map(|socket| folder(socket)).collect();
        let connects_in = qmp.map(folder);
        read_symbols();
        sandbox::enter(&Policy { folders, connects_in, child });
    }
}

/// Makes a backtrace if those of panics are asked for: names of functions are read from the program's file with the
/// first one, and kept.
fn read_symbols() {
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        drop(backtrace.to_string());
    }
}

/// The folder that a path is in.
fn folder(path: &Path) -> PathBuf {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}
