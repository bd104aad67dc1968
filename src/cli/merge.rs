//! `viommu merge`: the device's events and the guest's in one trace.

use std::fs::File;
use std::io::{self, BufWriter, Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use viommu_report::merge::{self, MergeError};
use viommu_trace::TraceFile;

/// Merge a trace and the guest's own trace into one, on one clock
///
/// Prints JSON lines in the order of time. The guest's clock is tied to the host's by events that must be in one order;
/// each event of the guest says how far its time may be off. Files are read twice; what comes through a pipe is kept in
/// memory.
#[derive(clap::Args)]
pub struct Args {
    /// The trace, as `viommu run --trace-file` or `viommu trace --format json` or `binary` wrote it
    #[arg(value_name = "TRACE")]
    trace: PathBuf,

    /// The guest's, as `viommu run --guest-trace` wrote it
    #[arg(value_name = "GUEST_TRACE")]
    guest_trace: PathBuf,
}

/// Prints the merged trace to the standard output, and what it is made of to the standard error output.
pub fn main(args: &Args) -> Result<()> {
    let (mut host, mut guest) = (open(&args.trace)?, open(&args.guest_trace)?);
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    let report = match merge::merge(&mut host, &mut guest, &mut out) {
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
    for (path, tally) in [(&args.trace, host.tally()), (&args.guest_trace, guest.tally())] {
        if let Some((at, why)) = &tally.first {
            log::warn!("{}: what begins at byte {at} cannot be read: {why}", path.display());
        }
    }
    if report.untied > 0 {
        log::warn!("{} events of the guest were left out: nothing ties their time to the device's", report.untied);
    }
    Ok(())
}

/// What a trace is read from, any number of times.
trait Input: Read + Seek {}

impl<T: Read + Seek> Input for T {}

fn open(path: &Path) -> Result<TraceFile<Box<dyn Input>>> {
    let input = open_input(path)?;
    TraceFile::new(input).with_context(|| format!("Cannot read the trace {}", path.display()))
}

fn open_input(path: &Path) -> Result<Box<dyn Input>> {
    let failed = || format!("Cannot read the trace {}", path.display());
    let mut file = File::open(path).with_context(failed)?;
    if file.metadata().with_context(failed)?.is_file() {
        return Ok(Box::new(file));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).with_context(failed)?;
    Ok(Box::new(Cursor::new(bytes)))
}
