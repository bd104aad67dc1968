//! Settings of the kernel that a test needs, through the files in which the kernel offers them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::results::Results;

/// Which setting, and to what.
#[derive(clap::Args)]
pub struct Args {
    /// The file, for example /sys/kernel/debug/failslab/probability.
    file: PathBuf,
    /// What is written to it.
    #[arg(allow_hyphen_values = true)]
    value: String,
}

/// The workload. Emits one `result`.
///
/// # Errors
/// The system's, with what was tried.
pub fn run(args: &Args, results: &mut Results) -> Result<()> {
    fs::write(&args.file, &args.value)
        .with_context(|| format!("Cannot write {:?} to {}", args.value, args.file.display()))?;
    results.emit("result", json!({ "workload": "set", "file": args.file, "value": args.value }));
    Ok(())
}
