//! A driver that is unbound and bound again: its mappings must go with it, and its function must work again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::results::Results;
use crate::workload::Workload;
use crate::{blockdev, nvme_io, pci};

/// How long a driver may take to bring its device up.
const LIMIT: Duration = Duration::from_secs(300);
/// How much is written and read back after each time.
const BYTES: u64 = 4 << 20;

/// Take a driver off its function and give it back, with I/O after each time.
#[derive(clap::Args)]
pub struct Args {
    /// The driver's name, for example nvme or ioatdma.
    driver: String,
    /// The function, for example 0000:00:04.0.
    bdf: String,
    /// How often.
    #[arg(long, default_value_t = 1)]
    times: u32,
}

impl Workload for Args {
    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// What failed, and in which repetition.
    fn run(&self, results: &mut Results) -> Result<()> {
        for time in 1..=self.times {
            once(self, time).with_context(|| format!("Rebinding {} to {}, time {time}", self.bdf, self.driver))?;
        }
        let is_nvme = self.driver == "nvme";
        results.emit(
            "result",
            json!({
                "workload": "rebind", "driver": self.driver, "bdf": self.bdf, "times": self.times,
                "verified": is_nvme.then_some(true), "bytes_each": is_nvme.then_some(BYTES),
            }),
        );
        Ok(())
    }
}

fn once(args: &Args, time: u32) -> Result<()> {
    pci::unbind(&args.driver, &args.bdf)?;
    ensure!(pci::driver(&args.bdf).is_none(), "The function still has a driver after unbind");
    pci::bind(&args.driver, &args.bdf)?;
    let bound = pci::driver(&args.bdf);
    ensure!(bound.as_deref() == Some(&args.driver), "After bind the function's driver is {bound:?}");
    if args.driver == "nvme" {
        let namespace = blockdev::wait_for_namespace(&args.bdf, LIMIT)?;
        nvme_io::exercise(&namespace.node(), BYTES, time.into())?;
    }
    Ok(())
}
