//! The interactive shell.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::results::Results;
use crate::workload::{Needs, Workload};

/// An interactive shell on the console.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    const NEEDS: Needs = Needs { programs: &["busybox"], ..Needs::NOTHING };

    /// Runs a shell on the console until it ends.
    ///
    /// # Errors
    /// If the initramfs has none.
    fn run(&self, _results: &mut Results) -> Result<()> {
        let mut shell = Command::new("/bin/busybox");
        // `cttyhack` finds the console's real device and makes it the controlling terminal, so that ^C works.
        shell.args(["cttyhack", "sh", "-l"]).env("PATH", "/bin:/usr/sbin").env("HOME", "/").env("PS1", "guest# ");
        println!("Type \"busybox\" for the programs, \"exit\" to power off.");
        // SAFETY: setsid is async-signal-safe, and the closure touches nothing of the parent's memory.
        unsafe { shell.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
        shell.status().context("Cannot start /bin/busybox, the guest's shell")?;
        Ok(())
    }
}
