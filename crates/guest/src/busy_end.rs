//! The guest ends while I/O is in flight: at shutdown Linux resets the virtio-iommu before the functions behind it are
//! quiet.

use std::convert::Infallible;
use std::os::unix::fs::FileExt;

use anyhow::Result;

use crate::blockdev::{self, Device};
use crate::buffers::{Buffers, PAGE};
use crate::results::Results;
use crate::workload::Workload;

/// Keep reading in the background, until the guest ends.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    /// The workload. Reads continue after it returns, until one fails or the guest is off.
    ///
    /// # Errors
    /// There is no NVMe namespace.
    fn run(&self, _results: &mut Results) -> Result<()> {
        let path = blockdev::choose(None)?;
        let device = Device::open(&path)?;
        std::thread::spawn(move || {
            let Err(error) = read_on(&device);
            eprintln!("viommu-guest: The reads ended: {error:#}");
        });
        Ok(())
    }
}

/// Reads the same page repeatedly.
fn read_on(device: &Device) -> Result<Infallible> {
    let mut buffers = Buffers::new(1, PAGE, false)?;
    // SAFETY: these buffers are used by the calls below alone, one after the other.
    let page = unsafe { buffers.contents(0) };
    loop {
        device.file.read_exact_at(page, 0)?;
    }
}
