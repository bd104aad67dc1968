//! NVMe controllers and their namespaces, found through sysfs.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sysfs;

/// PCI class code of an NVM Express I/O controller (NVMe over PCIe Transport, 3.8.1: 01h, 08h, 02h).
const NVME_CLASS: &str = "0x010802";
/// How long a controller may take from its driver's loading to its namespace. Emulation is slow.
const PROBE_LIMIT: Duration = Duration::from_secs(300);

/// A namespace's block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// `nvme0n1`
    pub name: String,
    /// The controller's PCI function, `0000:00:04.0`.
    pub bdf: String,
}

impl Namespace {
    /// Its node in `/dev`.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }
}

/// All namespaces of PCIe controllers, in the order of their functions: the kernel gives names in the order in which
/// controllers come up, which differs from boot to boot.
pub fn namespaces() -> Vec<Namespace> {
    let mut found = Vec::new();
    for controller in sysfs::names("/sys/class/nvme") {
        let folder = Path::new("/sys/class/nvme").join(&controller);
        let Some(bdf) = sysfs::link_name(folder.join("device")) else { continue };
        // A namespace with its own block device: not the hidden path device of a multi-path one.
        let own = sysfs::names(&folder).into_iter().filter(|name| {
            name.starts_with(&controller) && Path::new("/sys/block").join(name).exists() && !is_hidden(name)
        });
        found.extend(own.map(|name| Namespace { name, bdf: bdf.clone() }));
    }
    found.sort_by(|one, other| (&one.bdf, &one.name).cmp(&(&other.bdf, &other.name)));
    found
}

fn is_hidden(name: &str) -> bool {
    sysfs::text(format!("/sys/block/{name}/hidden")).as_deref() == Some("1")
}

/// Waits until every NVMe function has a namespace.
///
/// # Errors
/// The functions that have none when the time is up.
pub fn wait_for_controllers() -> Result<()> {
    let functions: Vec<String> = sysfs::names("/sys/bus/pci/devices")
        .into_iter()
        .filter(|bdf| sysfs::text(format!("/sys/bus/pci/devices/{bdf}/class")).as_deref() == Some(NVME_CLASS))
        .collect();
    for bdf in functions {
        wait_for_namespace(&bdf, PROBE_LIMIT)?;
    }
    Ok(())
}

/// Waits until the NVMe function `bdf` has a namespace that can be opened.
///
/// # Errors
/// If it has none when the time is up. The error has the state of its driver.
pub fn wait_for_namespace(bdf: &str, limit: Duration) -> Result<Namespace> {
    let end = Instant::now() + limit;
    loop {
        let found = namespaces().into_iter().find(|namespace| namespace.bdf == bdf && namespace.node().exists());
        if let Some(namespace) = found {
            return Ok(namespace);
        }
        if Instant::now() >= end {
            let driver = sysfs::link_name(format!("/sys/bus/pci/devices/{bdf}/driver"));
            bail!(
                "No namespace of the NVMe controller {bdf} after {limit:?}; its driver is {}",
                driver.as_deref().unwrap_or("none")
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The device that a workload uses: the one that is named, by its node or by its controller's function
/// (`0000:00:04.0`), or the first function's if none is named.
///
/// # Errors
/// If there is none.
pub fn choose(named: Option<&Path>) -> Result<PathBuf> {
    let mut namespaces = namespaces().into_iter();
    match named {
        None => Ok(namespaces.next().context("The guest has no NVMe namespace")?.node()),
        Some(named) => {
            let of_function = namespaces.find(|namespace| Path::new(&namespace.bdf) == named);
            Ok(of_function.map_or_else(|| named.to_owned(), |namespace| namespace.node()))
        }
    }
}

/// A block device that is opened past the page cache.
pub struct Device {
    /// Opened with `O_DIRECT`.
    pub file: File,
    /// Its size in bytes.
    pub bytes: u64,
}

impl Device {
    /// Opens a device (or, for trying things out, a file) for direct reads and writes.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
        let mut file = file.with_context(|| format!("Cannot open {} for direct I/O", path.display()))?;
        // The length in a block device's metadata is 0; seeking finds the size.
        let bytes = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
        ensure!(bytes > 0, "{} is empty", path.display());
        Ok(Self { file, bytes })
    }
}
