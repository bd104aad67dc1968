//! `viommu args`: QEMU's arguments for a topology.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::say;
use super::source::Source;
use crate::topology::qemu::{self, Paths};

/// Print the QEMU arguments of a topology that `viommu serve` serves
///
/// For a QEMU line of one's own, or for `vng --qemu-opts`. The guest's memory must be shared with viommu; --machine
/// prints arguments that make it so.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,

    /// The vhost-user socket, as given to `viommu serve`
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,

    /// Print the arguments for the machine, its shared memory and its processors, too
    #[arg(long)]
    machine: bool,

    /// Print instead what QMP's device_add takes to hot-add this endpoint
    #[arg(long, value_name = "NAME", conflicts_with = "machine")]
    hotplug: Option<String>,
}

/// Prints them, quoted for a shell.
pub fn main(args: &Args) -> Result<()> {
    let topology = args.source.load()?;
    let paths = Paths { iommu: args.socket_path.clone() };
    if let Some(name) = &args.hotplug {
        let endpoint = topology.endpoints.iter().find(|endpoint| endpoint.name == *name).with_context(|| {
            let names: Vec<_> = topology.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
            format!("No endpoint is named {name:?}; the topology has {}", names.join(", "))
        })?;
        return say(format_args!("{}\n", qemu::device(&topology, endpoint, &paths)));
    }
    let mut words = if args.machine { qemu::machine(&topology) } else { Vec::new() };
    words.extend(qemu::devices(&topology, &paths));
    let words: Vec<_> = words.iter().map(|word| quote(word)).collect();
    say(format_args!("{}\n", words.join(" ")))
}

/// A word as a POSIX shell reads it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        assert_eq!(quote("-device"), "-device");
        assert_eq!(quote("{\"a\":1}"), "'{\"a\":1}'");
        assert_eq!(quote("it's"), "'it'\\''s'");
        assert_eq!(quote(""), "''");
    }
}
