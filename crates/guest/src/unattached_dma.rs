//! DMA of a function that is attached to no domain: the DMA engine without a driver, programmed through sysfs.
//!
//! The virtio-iommu driver attaches an endpoint when a driver binds to it. Before that its DMA bypasses the IOMMU or,
//! with `bypass` off, must fault at its first fetch, that of the descriptor.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::results::Results;
use crate::vfio::{Bar, MEMORY_AND_BUS_MASTER, PCI_COMMAND};
use crate::workload::Workload;
use crate::{ioat, pci};

/// The descriptor's address, as the engine gets it.
const DESCRIPTOR: u64 = 0x5000_0000;

/// Start the DMA engine without a driver, attached to no domain; with `bypass` off its DMA must be refused.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// If there is no engine, if it is in an IOMMU group already, or if it did not stop with a chain address error.
    fn run(&self, results: &mut Results) -> Result<()> {
        let bdf = pci::with_id(ioat::VENDOR, ioat::DEVICE).into_iter().next();
        let bdf =
            bdf.with_context(|| format!("The guest has no DMA engine {:04x}:{:04x}", ioat::VENDOR, ioat::DEVICE))?;
        let folder = pci::folder(&bdf);
        ensure!(!folder.join("iommu_group").exists(), "{bdf} is in an IOMMU group, so it is attached to a domain");
        let open = |name: &str| {
            let path = folder.join(name);
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("Cannot open {}", path.display()))
        };
        open("config")?.write_all_at(&MEMORY_AND_BUS_MASTER.to_le_bytes(), PCI_COMMAND).context("Cannot enable DMA")?;
        let registers = open("resource0")?;
        let bar = Bar::map(&registers, 0, registers.metadata()?.len() as usize)?;
        // No completion is asked for: the descriptor is all that the engine accesses.
        let outcome = ioat::run_chain(&bar, DESCRIPTOR, 1, 0)?;
        results.emit(
            "result",
            json!({
                "workload": "unattached-dma", "bdf": bdf, "chansts": outcome.status, "chanerr": outcome.error,
                "expected_chanerr": ioat::ERROR_CHAIN, "fault_access": "read", "fault_iova": DESCRIPTOR,
            }),
        );
        ensure!(
            outcome.is_halted() && outcome.error == ioat::ERROR_CHAIN,
            "The engine of {bdf} did not halt with errors {:#x}: status {:#x}, errors {:#x}",
            ioat::ERROR_CHAIN,
            outcome.status,
            outcome.error
        );
        Ok(())
    }
}
