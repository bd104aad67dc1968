//! `viommu viot`: the ACPI table of a topology.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::source::Source;
use crate::topology::viot;

/// Write the ACPI table (VIOT) of a topology, for QEMU's -acpitable file=
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,

    /// The file to write [default: the standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes the table.
pub fn main(args: &Args) -> Result<()> {
    let table = viot::table(&args.source.load()?);
    match &args.output {
        Some(path) => {
            std::fs::write(path, table).with_context(|| format!("Cannot write the VIOT to {}", path.display()))
        }
        None if std::io::stdout().is_terminal() => bail!("The VIOT is binary; name a file for it with --output"),
        None => std::io::stdout().write_all(&table).context("Cannot write the VIOT to the standard output"),
    }
}
