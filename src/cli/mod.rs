//! The command line: one file a subcommand.

mod accel;
mod args;
mod check;
mod files;
mod generate;
mod logger;
mod machine;
mod merge;
mod qemu;
mod qmp;
mod report;
mod run;
mod sandbox;
mod serve;
mod short;
mod source;
mod stop;
mod summary;
pub mod trace;
mod viot;

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{ArgAction, Parser, Subcommand};

/// A virtual IOMMU that people can see into
///
/// Serves a virtio-iommu device over vhost-user and device models over vfio-user to a QEMU on the same machine. Every
/// DMA access of the models goes through the IOMMU, and every step is on the trace socket.
#[derive(Parser)]
#[command(name = "viommu", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Say more on the standard error output; twice for all
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Args),
    Run(Box<run::Args>),
    Args(args::Args),
    Trace(trace::Args),
    Report(report::Args),
    Merge(merge::Args),
    Viot(viot::Args),
    Check(check::Args),
    Completions(generate::Completions),
    Man(generate::Man),
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    logger::start(level);
    let result = run(cli.command);
    log::logger().flush();
    match result {
        Ok(status) => status,
        Err(error) => {
            eprintln!("viommu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Report(args) => return report::main(&args),
        Command::Serve(args) => serve::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Args(args) => args::main(&args),
        Command::Trace(args) => trace::main(&args),
        Command::Merge(args) => merge::main(&args),
        Command::Viot(args) => viot::main(&args),
        Command::Check(args) => check::main(&args),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Writes to the standard output. That nobody reads it any more is no error, and ends nothing.
fn say(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("Cannot write to the standard output"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_definitions_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
