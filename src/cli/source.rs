//! Where a topology comes from: a file, or one endpoint on the command line.

use std::path::PathBuf;

use crate::topology::{Topology, TopologyError};

/// The options that name a topology.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct Source {
    /// The topology: a TOML file (see qemu-configs/ for ready ones)
    #[arg(long, value_name = "FILE")]
    topology: Option<PathBuf>,

    /// One endpoint without a file, for example nvme,address=04.0,image=disk.img or dma-engine,address=05.0
    #[arg(long, value_name = "MODEL,KEY=VALUE,...")]
    endpoint: Option<String>,
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
