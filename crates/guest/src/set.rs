//! Settings of the kernel that a test needs, through the files in which the kernel offers them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
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
    /// The kernel is to refuse it
    #[arg(long)]
    refused: bool,
}

/// The workload. Emits one `result`.
///
/// # Errors
/// The system's, with what was tried; or if it was to be refused and was not.
pub fn run(args: &Args, results: &mut Results) -> Result<()> {
    let written = fs::write(&args.file, &args.value);
    let error = match written {
        Ok(()) if args.refused => bail!("Writing {:?} to {} was not refused", args.value, args.file.display()),
        Err(error) if args.refused => Some(error.to_string()),
        result => {
            result.with_context(|| format!("Cannot write {:?} to {}", args.value, args.file.display()))?;
            None
        }
    };
    results.emit("result", json!({ "workload": "set", "file": args.file, "value": args.value, "error": error }));
    Ok(())
}
