//! The QEMU that is used: which version it is, and whether KVM runs a guest here.

use std::fmt;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::Signal;

/// The first version with the generic vhost-user device and vfio-user.
pub const NEEDED: Version = Version { major: 10, minor: 2 };

/// How long the boot probe waits for a guest kernel under KVM.
const PROBE_TIME: Duration = Duration::from_secs(10);

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Asks a QEMU for its version and refuses one that is too old.
pub fn version(qemu: &Path) -> Result<Version> {
    let output = Command::new(qemu).arg("--version").stdin(Stdio::null()).output().with_context(|| {
        format!(
            "Cannot run {}; name a QEMU of {NEEDED} or later with --qemu (scripts/get-qemu finds one)",
            qemu.display()
        )
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = parse_version(&text).with_context(|| {
        format!("{} does not say its version; \"QEMU emulator version ...\" was expected", qemu.display())
    })?;
    if found < NEEDED {
        bail!(
            "{} is QEMU {found}, but {NEEDED} or later is needed: it has no generic vhost-user device and no vfio-user. \
             Name a newer one with --qemu (scripts/get-qemu gets Debian's)",
            qemu.display()
        );
    }
    Ok(found)
}

fn parse_version(text: &str) -> Option<Version> {
    let (_, rest) = text.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some(Version { major: numbers.next()?.parse().ok()?, minor: numbers.next()?.parse().ok()? })
}

/// Has a QEMU end, as SIGTERM ends it, when this process does, however that ends.
pub fn end_with_us(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one system call and touches no memory that another thread may
    // hold locked.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGTERM).map_err(std::io::Error::from));
    }
}

/// Whether KVM runs a guest, found by booting `kernel` without a root file system until it panics for the lack of one.
///
/// That `/dev/kvm` opens proves little: on some hosts a virtual machine starts and never gets anywhere. `Err` says what
/// was seen instead of the panic.
pub fn probe_kvm(qemu: &Path, kernel: &Path) -> Result<(), String> {
    std::fs::File::open(kernel).map_err(|error| format!("the kernel {} does not open: {error}", kernel.display()))?;
    let mut command = Command::new(qemu);
    end_with_us(&mut command);
    let child = command
        .args(["-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "256M", "-nodefaults", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio", "-append", "console=ttyS0 panic=-1", "-kernel"])
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = child.map_err(|error| format!("{} does not start: {error}", qemu.display()))?;
    let console = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut console) = console {
            // What was read before an error is what the guest said.
            let _ = console.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let deadline = Instant::now() + PROBE_TIME;
    let ended = loop {
        match child.try_wait() {
            Ok(Some(_)) => break true,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
            _ => break false,
        }
    };
    if !ended {
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = reader.join().unwrap_or_default();
    if ended && text.contains("Kernel panic") {
        return Ok(());
    }
    let last = text.lines().last().unwrap_or("nothing");
    Err(format!(
        "a guest kernel did not come up under KVM within {} s; its console said last: {last}",
        PROBE_TIME.as_secs()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let debian =
            parse_version("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)\nCopyright (c) 2003-2026").unwrap();
        assert_eq!(debian, Version { major: 11, minor: 1 });
        assert!(debian > NEEDED);
        assert!(parse_version("QEMU emulator version 10.0.2").unwrap() < NEEDED);
        assert!(parse_version("busybox").is_none());
    }
}
