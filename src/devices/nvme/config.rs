//! A controller's keys in a topology.

use std::error::Error;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Deserialize;
use toml::Spanned;

use super::Nvme;
use super::disk::{Disk, NvmeConfig, OpenError, is_block_size, is_serial};
use crate::devices::kit::Lifecycle;
use crate::devices::model::{Configuration, Device, DeviceStats, Key, KeyError, KeyKind, KeyTable, Model, OwnFile};
use crate::pci::FunctionContext;

/// The model.
pub const MODEL: Model = Model {
    name: "nvme",
    endpoint_name: "nvme",
    example: "image=disk.img",
    keys: &[
        Key { name: "image", kind: KeyKind::Text },
        Key { name: "block-size", kind: KeyKind::Bytes("512 or 4096") },
        Key { name: "serial", kind: KeyKind::Text },
    ],
    configure: |table, name| Ok(Arc::new(Controller::read(table, name)?)),
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Keys {
    image: Spanned<PathBuf>,
    block_size: Option<Spanned<u32>>,
    serial: Option<Spanned<String>>,
}

/// A controller's configuration in a topology.
#[derive(Debug)]
struct Controller {
    config: NvmeConfig,
    image_span: Range<usize>,
}

impl Controller {
    fn read(table: KeyTable<'_>, name: &str) -> Result<Self, KeyError> {
        let keys: Keys = table.read()?;
        let mut config = NvmeConfig::new(keys.image.get_ref(), format!("viommu-{name}"));
        if let Some(block_size) = keys.block_size {
            config.block_size = *block_size.get_ref();
            if !is_block_size(config.block_size) {
                let what = format!("{} is not supported; 512 or 4096 was expected", config.block_size);
                return Err(KeyError::new("block-size", block_size.span(), what));
            }
        }
        if let Some(serial) = keys.serial {
            if !is_serial(serial.get_ref()) {
                let serial_number = serial.get_ref();
                let what = format!(
                    "{serial_number:?} cannot be a serial number; 1 to 20 printable ASCII characters were expected"
                );
                return Err(KeyError::new("serial", serial.span(), what));
            }
            config.serial = serial.into_inner();
        }
        Ok(Controller { config, image_span: keys.image.span() })
    }
}

impl Configuration for Controller {
    fn own_file(&self) -> Option<OwnFile<'_>> {
        Some(OwnFile { key: "image", span: self.image_span.clone(), path: &self.config.image })
    }

    fn open(&self, create: Option<u64>) -> Result<Arc<dyn Device>, Box<dyn Error + Send + Sync>> {
        if let Some(bytes) = create {
            create_image(&self.config.image, bytes)?;
        }
        Ok(Arc::new(Opened(Disk::open(self.config.clone())?)))
    }
}

/// Makes an image of zeros, unless there is one.
fn create_image(path: &Path, bytes: u64) -> Result<(), OpenError> {
    let created = match File::create_new(path) {
        Ok(file) => file.set_len(bytes),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    created.map_err(|source| OpenError::Create { path: path.to_owned(), source })
}

/// An open disk, on which controllers are made.
struct Opened(Arc<Disk>);

impl Device for Opened {
    fn make(&self, context: FunctionContext) -> Box<dyn Lifecycle> {
        Box::new(Nvme::new(context, self.0.clone()))
    }

    fn file(&self) -> Option<&Path> {
        Some(&self.0.config().image)
    }

    fn stats(&self) -> DeviceStats {
        let counters = &self.0.counters;
        DeviceStats {
            io_count: counters.io_count.load(Ordering::Relaxed),
            io_bytes: counters.bytes_read.load(Ordering::Relaxed) + counters.bytes_written.load(Ordering::Relaxed),
        }
    }
}
