//! `viommu check`: whether everything is here that a run needs.

use std::path::PathBuf;

use anyhow::{Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::source::Source;
use super::{qemu, say};
use crate::daemon::open_device;
use crate::topology::Topology;

/// Check a topology, QEMU, KVM and shared memory, and say what is wrong
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,

    /// The QEMU to check
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,

    /// A guest kernel, to see by a short boot whether KVM runs it
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
}

/// Prints a line for each thing checked; fails if one of them stops a run.
pub fn main(args: &Args) -> Result<()> {
    let topology = args.source.load()?;
    say(format_args!(
        "topology: ok: {} endpoint(s), IOMMU at {}\n",
        topology.endpoints.len(),
        topology.iommu.address.get_ref()
    ))?;
    let mut wrong = devices(&topology)?;
    match qemu::version(&args.qemu) {
        Ok(version) => say(format_args!("QEMU: ok: {version} ({})\n", args.qemu.display()))?,
        Err(error) => {
            say(format_args!("QEMU: {error:#}\n"))?;
            wrong += 1;
        }
    }
    match shared_memory(topology.machine.memory.0) {
        Ok(()) => say(format_args!("shared memory: ok: {} can be shared with QEMU\n", topology.machine.memory))?,
        Err(error) => {
            say(format_args!("shared memory: Cannot make a memory file of {}: {error}\n", topology.machine.memory))?;
            wrong += 1;
        }
    }
    match &args.kernel {
        None => say(format_args!("KVM: not checked; give a guest kernel with --kernel to try a short boot\n"))?,
        Some(kernel) => match qemu::probe_kvm(&args.qemu, kernel) {
            Ok(()) => say(format_args!("KVM: ok: a guest boots\n"))?,
            // A run falls back to TCG, so this stops nothing.
            Err(why) => say(format_args!("KVM: not usable, TCG will be used: {why}\n"))?,
        },
    }
    if wrong > 0 {
        bail!("{wrong} of the things above must be put right before a run");
    }
    Ok(())
}

/// Opens what each endpoint needs, as a run would.
fn devices(topology: &Topology) -> Result<usize> {
    let mut wrong = 0;
    for endpoint in &topology.endpoints {
        match open_device(endpoint, None) {
            Ok(device) => {
                if let Some(file) = device.file() {
                    say(format_args!("{}: ok: {}\n", endpoint.name, file.display()))?;
                }
            }
            Err(error) => {
                say(format_args!("{}: {error:#}\n", endpoint.name))?;
                wrong += 1;
            }
        }
    }
    Ok(wrong)
}

fn shared_memory(size: u64) -> std::io::Result<()> {
    let file = memfd_create(c"viommu-check", MFdFlags::MFD_CLOEXEC)?;
    std::fs::File::from(file).set_len(size)
}
