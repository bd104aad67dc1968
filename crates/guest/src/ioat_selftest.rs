//! The kernel's own driver of the DMA engine. When it binds, it copies 2000 bytes and compares them. In a run with
//! `vfio-dma` this must come first, since `vfio-dma` keeps the engine.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::results::Results;
use crate::workload::{Needs, Workload};
use crate::{ioat, kmsg, pci, sysfs};

/// Let the kernel's ioatdma bind to the DMA engine; it copies memory as a self-test.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    const NEEDS: Needs = Needs { modules: &["ioatdma"], ..Needs::NOTHING };

    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// If there is no engine, if `ioatdma` did not bind, or if it registered no channel (it does not when its self-test
    /// fails).
    fn run(&self, results: &mut Results) -> Result<()> {
        let engines = pci::with_id(ioat::VENDOR, ioat::DEVICE);
        let drivers: Vec<_> = engines.iter().map(|bdf| pci::driver(bdf)).collect();
        let channels = sysfs::names("/sys/class/dma");
        let log: Vec<String> = kmsg::read_log().into_iter().filter(|line| line.contains("ioatdma")).collect();
        results.emit(
            "result",
            json!({ "workload": "ioat-selftest", "engines": engines, "drivers": drivers, "channels": channels, "log": log }),
        );
        ensure!(!engines.is_empty(), "The guest has no DMA engine {:04x}:{:04x}", ioat::VENDOR, ioat::DEVICE);
        ensure!(
            drivers.iter().all(|driver| driver.as_deref() == Some("ioatdma")),
            "ioatdma did not bind to every engine: {engines:?} have {drivers:?}; its messages: {log:?}"
        );
        ensure!(
            channels.len() >= engines.len(),
            "ioatdma registered {} channels for {} engines; its messages: {log:?}",
            channels.len(),
            engines.len()
        );
        Ok(())
    }
}
