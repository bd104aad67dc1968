//! Shell completions and manual pages, from the same definitions as the help texts.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

/// Print the completion script of a shell
#[derive(clap::Args)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

/// Print a shell's completion script.
pub fn completions(args: &Completions) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "viommu", &mut script);
    super::say(String::from_utf8_lossy(&script))
}

/// Write the manual pages into a folder
#[derive(clap::Args)]
pub struct Man {
    /// The folder; it is made if it does not exist
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Write viommu.1 and a page for each subcommand.
pub fn man(args: &Man) -> Result<()> {
    std::fs::create_dir_all(&args.folder)
        .and_then(|()| clap_mangen::generate_to(super::Cli::command(), &args.folder))
        .with_context(|| format!("Cannot write manual pages into {}", args.folder.display()))
}
