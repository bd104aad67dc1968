//! Where a topology comes from: a file, or one endpoint on the command line.

use std::path::PathBuf;

use crate::devices::{MODELS, Model};
use crate::topology::{Topology, TopologyError};

/// The options that name a topology.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct Source {
    /// The topology: a TOML file (see qemu-configs/ for ready ones)
    #[arg(long, value_name = "FILE")]
    topology: Option<PathBuf>,

    #[arg(long, value_name = "MODEL,KEY=VALUE,...", help = endpoint_help())]
    endpoint: Option<String>,
}

/// What `--endpoint` is, with an example of each model.
fn endpoint_help() -> String {
    let example = |(model, slot): (&Model, u32)| {
        let keys = model.example.split(',').filter(|key| !key.is_empty());
        let words = [model.name.to_string(), format!("address={slot:02x}.0")].into_iter();
        words.chain(keys.map(String::from)).collect::<Vec<_>>().join(",")
    };
    let examples: Vec<_> = MODELS.into_iter().zip(4..).map(example).collect();
    format!("One endpoint without a file, for example {}", examples.join(" or "))
}

impl Source {
    /// Reads and checks it.
    pub fn load(&self) -> Result<Topology, TopologyError> {
        match (&self.topology, &self.endpoint) {
            (Some(path), _) => Topology::load(path),
            (None, endpoint) => Topology::of_endpoint(endpoint.as_deref().unwrap_or_default()),
        }
    }
}
