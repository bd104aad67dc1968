//! The command line, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    viommu::cli::main()
}
