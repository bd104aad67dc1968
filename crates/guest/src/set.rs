//! Settings of the kernel that a test needs, through the kernel's files.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::results::Results;
use crate::workload::Workload;

/// Write a value into a file of sysfs, procfs or debugfs, for the workloads that follow.
#[derive(clap::Args)]
pub struct Args {
    /// The file, for example /sys/kernel/debug/failslab/probability.
    file: PathBuf,
    /// The value to write.
    #[arg(allow_hyphen_values = true)]
    value: String,
    /// The kernel is to refuse it
    #[arg(long)]
    refused: bool,
}

impl Workload for Args {
    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// The system's, with what was tried; or that the kernel did not refuse the value although it should.
    fn run(&self, results: &mut Results) -> Result<()> {
        let written = fs::write(&self.file, &self.value);
        let error = match written {
            Ok(()) if self.refused => bail!("Writing {:?} to {} was not refused", self.value, self.file.display()),
            Err(error) if self.refused => Some(error.to_string()),
            result => {
                result.with_context(|| format!("Cannot write {:?} to {}", self.value, self.file.display()))?;
                None
            }
        };
        results.emit("result", json!({ "workload": "set", "file": self.file, "value": self.value, "error": error }));
        Ok(())
    }
}
