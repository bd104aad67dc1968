//! Where a topology comes from: a file, or one endpoint on the command line.

use std::fmt::Write;
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
            (None, endpoint) => from_option(endpoint.as_deref().unwrap_or_default()),
        }
    }
}

/// The topology with the one endpoint that the text describes, by way of the file format: so both take the same keys.
fn from_option(text: &str) -> Result<Topology, TopologyError> {
    let mut parts = text.split(',');
    let model = parts.next().unwrap_or_default();
    let mut table = format!("[[{model}]]\n");
    for part in parts {
        let Some((key, value)) = part.split_once('=') else {
            let what = format!("{part:?} was found where KEY=VALUE was expected");
            return Err(TopologyError::Invalid { name: "--endpoint".into(), what });
        };
        let value = toml::Value::from(value);
        let bare = matches!(key, "block-size" | "hotplug");
        let value = if bare { value.as_str().unwrap_or_default().into() } else { value.to_string() };
        let _ = writeln!(table, "{key} = {value}");
    }
    Topology::parse(&table, "--endpoint")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_a_one_endpoint_file() {
        let topology = from_option("nvme,address=04.0,image=a \"b\".img,block-size=4096").unwrap();
        assert_eq!(topology.endpoints.len(), 1);
        assert_eq!(topology.endpoints[0].bdf.id(), 0x20);
        assert!(from_option("dma-engine,address=05.0").is_ok());
        let error = from_option("nvme,address").unwrap_err().to_string();
        assert!(error.contains("KEY=VALUE"), "{error}");
        let error = from_option("floppy,address=04.0").unwrap_err().to_string();
        assert!(error.contains("unknown field `floppy`"), "{error}");
    }
}
