//! PCI functions and their drivers, through sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::sysfs;

const BUS: &str = "/sys/bus/pci";

/// Where sysfs shows the function `bdf` (`0000:00:04.0`).
pub fn folder(bdf: &str) -> PathBuf {
    Path::new(BUS).join("devices").join(bdf)
}

/// The functions with these vendor and device ids.
pub fn with_id(vendor: u16, device: u16) -> Vec<String> {
    let is = |bdf: &str, name: &str, id: u16| sysfs::text(folder(bdf).join(name)) == Some(format!("{id:#06x}"));
    let mut found = sysfs::names(Path::new(BUS).join("devices"));
    found.retain(|bdf| is(bdf, "vendor", vendor) && is(bdf, "device", device));
    found
}

/// The driver that is bound to a function.
pub fn driver(bdf: &str) -> Option<String> {
    sysfs::link_name(folder(bdf).join("driver"))
}

/// Takes the driver off a function.
///
/// # Errors
/// The system's, with what was tried.
pub fn unbind(driver: &str, bdf: &str) -> Result<()> {
    write(&Path::new(BUS).join("drivers").join(driver).join("unbind"), bdf)
}

/// Gives a function to a driver.
///
/// # Errors
/// The system's, with what was tried; the driver's own if its probe failed.
pub fn bind(driver: &str, bdf: &str) -> Result<()> {
    write(&Path::new(BUS).join("drivers").join(driver).join("bind"), bdf)
}

/// Lets only the driver of this name bind to a function.
///
/// # Errors
/// The system's, with what was tried.
pub fn set_driver_override(bdf: &str, driver: &str) -> Result<()> {
    write(&folder(bdf).join("driver_override"), driver)
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("Cannot write \"{text}\" to {}", file.display()))
}
