//! The smallest device model, driven from a program through VFIO: it writes a number to mapped memory, and its write to
//! an unmapped address must be refused.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::buffers::{Buffers, PAGE};
use crate::pci;
use crate::results::Results;
use crate::vfio::{Access, Bar, Function};
use crate::workload::{Needs, Workload};

/// The device's PCI ids.
const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x11e9;

/// Its registers, as offsets in BAR 0.
const ADDRESS: usize = 0x00;
const STATUS: usize = 0x08;
const DOORBELL: usize = 0x0c;

const BUSY: u32 = 1;
const DONE: u32 = 2;
const FAILED: u32 = 3;

/// The page's address for the device. Nothing else is mapped.
const MAPPED: u64 = 0x1000_0000;
/// An address that is not mapped.
const NOWHERE: u64 = 0x6000_0000;
const NUMBER: u32 = 0x1234_5678;

/// How long a write may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Make the smallest device model write a number to memory, and to an address that is not mapped.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    const NEEDS: Needs = Needs { modules: &["vfio_pci", "vfio_iommu_type1"], ..Needs::NOTHING };

    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// If there is no such device, or if a write ended in the wrong way.
    fn run(&self, results: &mut Results) -> Result<()> {
        let bdf = pci::with_id(VENDOR, DEVICE).into_iter().next();
        let bdf = bdf.with_context(|| format!("The guest has no device {VENDOR:04x}:{DEVICE:04x}"))?;
        let mut pages = Buffers::new(1, PAGE, true)?;
        let function = Function::open(&bdf)?;
        // SAFETY: references to the page are taken only while the device is not busy.
        unsafe { function.map(pages.pointer(0), MAPPED, PAGE as u64, Access::ReadWrite)? };
        let bar = function.bar0()?;
        let written = have_written(&bar, MAPPED)?;
        let refused = have_written(&bar, NOWHERE)?;
        // SAFETY: the device is not busy: `have_written` waited for that.
        let found = unsafe { pages.contents(0)[..4] == NUMBER.to_le_bytes() };
        results.emit(
            "result",
            json!({
                "workload": "null", "bdf": bdf, "status": written, "number_found": found, "refused_status": refused,
                "fault_access": "write", "fault_iova": NOWHERE,
            }),
        );
        ensure!(written == DONE && found, "The number was not written: status {written}");
        ensure!(refused == FAILED, "A write where nothing is mapped ended with status {refused}");
        Ok(())
    }
}

/// Makes the device write the number to `address`. Returns its status afterwards.
fn have_written(bar: &Bar, address: u64) -> Result<u32> {
    bar.write(ADDRESS, address)?;
    bar.write(DOORBELL, NUMBER)?;
    let begun = Instant::now();
    loop {
        let status = bar.read(STATUS)?;
        if status != BUSY {
            return Ok(status);
        }
        ensure!(begun.elapsed() < LIMIT, "The device is busy for ever");
        std::thread::yield_now();
    }
}
