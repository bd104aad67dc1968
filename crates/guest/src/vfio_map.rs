//! Memory of a program, mapped for the DMA engine through VFIO's type 1 IOMMU or through iommufd: what filling a domain
//! costs is in the device's trace.

use anyhow::{Context, Result};
use serde_json::json;
use viommu_wire::size;

use crate::buffers::{Buffers, PAGE};
use crate::iommufd::AddressSpace;
use crate::results::Results;
use crate::vfio::{Access, Function};
use crate::workload::{Needs, Workload};
use crate::{ioat, pci};

/// The memory's first address for the device. Drivers' own mappings are below.
const IOVA: u64 = 0x1_0000_0000;
/// More than a guest that was just booted has free in pieces of less than a few MiB.
const PIECES: usize = 128 << 20;

/// Map memory of a program for the DMA engine, through VFIO.
#[derive(clap::Args)]
pub struct Args {
    /// Bytes to map.
    #[arg(long, default_value = "64M", value_parser = size::parse)]
    size: u64,
    /// Use memory whose pages are scattered.
    #[arg(long)]
    scatter: bool,
    /// Use memory that consists of physically contiguous runs of this many bytes.
    #[arg(long, conflicts_with = "scatter", value_parser = size::parse)]
    run: Option<u64>,
    /// Map through iommufd.
    #[arg(long)]
    iommufd: bool,
    /// Attach the function afterwards only: the IOMMU then gets all mappings at once, and may refuse them.
    #[arg(long, requires = "iommufd")]
    filled: bool,
}

impl Workload for Args {
    const NEEDS: Needs = Needs { modules: &["vfio_pci", "vfio_iommu_type1"], optional: &["iommufd"], ..Needs::NOTHING };

    /// The workload. Emits one `result`: the number of physically contiguous runs that the memory consists of, and whether
    /// the function could be attached.
    ///
    /// # Errors
    /// If there is no engine, or not so much memory, or VFIO does not map it.
    fn run(&self, results: &mut Results) -> Result<()> {
        let bdf = pci::with_id(ioat::VENDOR, ioat::DEVICE).into_iter().next();
        let bdf =
            bdf.with_context(|| format!("The guest has no DMA engine {:04x}:{:04x}", ioat::VENDOR, ioat::DEVICE))?;
        // What a boot leaves free in small pieces is taken first, and kept.
        let _pieces = self.run.map(|_| Buffers::of_runs(PIECES, PAGE)).transpose()?;
        let memory = match self.run {
            Some(run) => Buffers::of_runs(self.size as usize, run as usize)?,
            None => Buffers::new(1, self.size as usize, self.scatter)?,
        };
        let mut attached = true;
        // SAFETY: nobody refers to the memory, and the engine is not started.
        unsafe {
            if self.filled {
                let space = AddressSpace::of(&bdf)?;
                space.map(memory.pointer(0), IOVA, self.size)?;
                attached = space.attach_filled().is_ok();
            } else if self.iommufd {
                let space = AddressSpace::of(&bdf)?;
                space.attach()?;
                space.map(memory.pointer(0), IOVA, self.size)?;
            } else {
                Function::open(&bdf)?.map(memory.pointer(0), IOVA, self.size, Access::ReadWrite)?;
            }
        }
        results.emit(
            "result",
            json!({
                "workload": "vfio-map", "bdf": bdf, "iova": format!("{IOVA:#x}"), "bytes": self.size,
                "runs": memory.physical_runs(), "attached": attached,
            }),
        );
        Ok(())
    }
}
