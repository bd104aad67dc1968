//! `viommu check`: whether everything is here that a run needs.

use std::path::PathBuf;

use anyhow::{Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::daemon::open_disk;
use super::qemu;
use super::source::Source;
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
    println!("topology: ok: {} endpoint(s), IOMMU at {}", topology.endpoints.len(), topology.iommu.address.get_ref());
    let mut wrong = images(&topology);
    match qemu::version(&args.qemu) {
        Ok(version) => println!("QEMU: ok: {version} ({})", args.qemu.display()),
        Err(error) => {
            println!("QEMU: {error:#}");
            wrong += 1;
        }
    }
    match shared_memory(topology.machine.memory.0) {
        Ok(()) => println!("shared memory: ok: {} can be shared with QEMU", topology.machine.memory),
        Err(error) => {
            println!("shared memory: Cannot make a memory file of {}: {error}", topology.machine.memory);
            wrong += 1;
        }
    }
    match &args.kernel {
        None => println!("KVM: not checked; give a guest kernel with --kernel to try a short boot"),
        Some(kernel) => match qemu::probe_kvm(&args.qemu, kernel) {
            Ok(()) => println!("KVM: ok: a guest boots"),
            // A run falls back to TCG, so this stops nothing.
            Err(why) => println!("KVM: not usable, TCG will be used: {why}"),
        },
    }
    if wrong > 0 {
        bail!("{wrong} of the things above must be put right before a run");
    }
    Ok(())
}

/// Opens each image as a run would.
fn images(topology: &Topology) -> usize {
    let mut wrong = 0;
    for endpoint in &topology.endpoints {
        match open_disk(endpoint, None) {
            Ok(None) => {}
            Ok(Some(disk)) => println!("{}: ok: {}", endpoint.name, disk.config().image.display()),
            Err(error) => {
                println!("{}: {error:#}", endpoint.name);
                wrong += 1;
            }
        }
    }
    wrong
}

fn shared_memory(size: u64) -> std::io::Result<()> {
    let file = memfd_create(c"viommu-check", MFdFlags::MFD_CLOEXEC)?;
    std::fs::File::from(file).set_len(size)
}
