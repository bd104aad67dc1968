//! `viommu merge`: the device's events and the guest's in one trace.

use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::merge::{self, MergeError};

/// Merge a trace and the guest's own trace into one, on one clock
///
/// Prints JSON lines in the order of time. The guest's clock is tied to the host's by events that must be in one order;
/// each event of the guest says how far its time may be off. Both traces are read into memory.
#[derive(clap::Args)]
pub struct Args {
    /// The trace, as `viommu run --trace-file` or `viommu trace --format json` wrote it
    #[arg(value_name = "TRACE")]
    trace: PathBuf,

    /// The guest's, as `viommu run --guest-trace` wrote it
    #[arg(value_name = "GUEST_TRACE")]
    guest_trace: PathBuf,
}

/// Prints the merged trace to the standard output, and what it is made of to the standard error output.
pub fn main(args: &Args) -> Result<()> {
    let (host, guest) = (read(&args.trace)?, read(&args.guest_trace)?);
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    let report = match merge::merge(&host, &guest, &mut out) {
        // Whoever read our output has seen enough.
        Err(MergeError::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
        result => result?,
    };
    let error = report.error.map_or_else(
        || "times of the guest may be off by an unknown amount".into(),
        |error| format!("times of the guest are right to {}.{:03} us", error / 1000, error % 1000),
    );
    eprintln!(
        "viommu merge: {} events of the device, {} of the guest, tied by {} pairs; {error}",
        report.host, report.guest, report.pairs
    );
    if report.breaks > 0 {
        eprintln!(
            "viommu merge: the guest's clock was tied anew {} times; the lines of kind clock say where",
            report.breaks
        );
    }
    if report.skipped > 0 {
        log::warn!("{} lines were left out: they are no events of such a trace", report.skipped);
    }
    if report.untied > 0 {
        log::warn!("{} events of the guest were left out: nothing ties their time to the device's", report.untied);
    }
    Ok(())
}

/// The text of a trace. What a guest wrote need not be UTF-8.
fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("Cannot read the trace {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
