//! One TOML file from which endpoints, the VIOT and QEMU's arguments are made, so that they cannot disagree.
//!
//! `docs/topology.md` describes the file for its users.

pub mod address;
mod problem;
pub mod qemu;
pub mod size;
mod slots;
pub mod viot;

use std::num::NonZeroU8;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

pub use address::{Address, Bdf};
use problem::Problem;
pub use size::Size;
use slots::Slots;

use crate::iommu::{EndpointSettings, Limits, Reserved, Settings};
use viommu_wire::virtio_iommu::ResvMemKind;

/// The window of x86 message-signalled interrupts: an endpoint's writes there are interrupts.
const X86_MSI: Reserved = Reserved { kind: ResvMemKind::Msi, start: 0xfee0_0000, end: 0xfeef_ffff };

/// Why a topology cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// The file cannot be read.
    #[error("Cannot read the topology {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not what was expected.
    #[error("Cannot use the topology {name}: {what}")]
    Invalid {
        /// The file.
        name: String,
        /// Line and key, what was found and what was expected.
        what: String,
    },
    /// An endpoint given as text is not what was expected.
    #[error("Cannot use --endpoint {text}: {what}")]
    Endpoint {
        /// The text.
        text: String,
        /// The key, what was found and what was expected.
        what: String,
    },
}

/// The virtual machine that `viommu run` and `viommu args` describe.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Machine {
    /// Guest memory.
    pub memory: Size,
    /// Virtual processors.
    pub vcpus: NonZeroU8,
}

impl Default for Machine {
    fn default() -> Self {
        Machine { memory: Size(512 << 20), vcpus: NonZeroU8::MIN }
    }
}

/// The virtio-iommu device.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct IommuDevice {
    /// Its slot and function on the root bus.
    pub address: Spanned<Address>,
    /// `bypass` at power-on.
    pub bypass: bool,
    /// Bytes that the page tables may take.
    pub table_memory: Size,
    /// Whether the split alloc/map protocol is offered.
    pub split: bool,
    /// Whether device models poll the request queue while they are awake, and the driver need not kick.
    pub polling: bool,
}

impl Default for IommuDevice {
    fn default() -> Self {
        IommuDevice {
            address: Spanned::new(0..0, Address { device: 3, function: 0 }),
            bypass: true,
            table_memory: Size(Limits::default().table_bytes),
            split: true,
            polling: true,
        }
    }
}

/// A PCI Express root port on the root bus.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootPort {
    /// The name that endpoints refer to.
    pub name: Spanned<String>,
    /// Its slot and function on the root bus.
    pub address: Spanned<Address>,
}

/// What every endpoint has.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NvmeEntry {
    name: Option<Spanned<String>>,
    address: Spanned<Address>,
    behind: Option<Spanned<String>>,
    #[serde(default)]
    hotplug: bool,
    msix: Option<bool>,
    image: Spanned<PathBuf>,
    #[serde(default = "default_block_size", rename = "block-size")]
    block_size: Spanned<u32>,
    serial: Option<Spanned<String>>,
}

fn default_block_size() -> Spanned<u32> {
    Spanned::new(0..0, 512)
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DmaEngineEntry {
    name: Option<Spanned<String>>,
    address: Spanned<Address>,
    msix: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    machine: Machine,
    #[serde(default)]
    iommu: IommuDevice,
    #[serde(default)]
    root_port: Vec<RootPort>,
    #[serde(default)]
    nvme: Vec<NvmeEntry>,
    #[serde(default)]
    dma_engine: Vec<DmaEngineEntry>,
}

/// Which device model serves an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    /// An NVMe controller with one namespace.
    Nvme {
        /// The raw file behind the namespace, relative to the working directory.
        image: PathBuf,
        /// Bytes of a logical block: 512 or 4096.
        block_size: u32,
        /// The controller's serial number.
        serial: String,
    },
    /// A DMA engine, compatible with I/OAT.
    DmaEngine,
}

/// An endpoint of the IOMMU: a PCI function that this process serves over vfio-user.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name: that of its socket, and its id in QEMU.
    pub name: String,
    /// Its slot and function on its bus.
    pub address: Address,
    /// The root port before it, as an index into [`Topology::root_ports`].
    pub behind: Option<usize>,
    /// Whether it is left out at start, to be added with `device_add`.
    pub hotplug: bool,
    /// Whether it has MSI-X, beside MSI and its interrupt pin.
    pub msix: bool,
    /// What it is.
    pub model: Model,
    /// Its bus, device and function number: the endpoint id.
    pub bdf: Bdf,
}

/// A whole topology, checked.
#[derive(Clone, Debug)]
pub struct Topology {
    /// The virtual machine.
    pub machine: Machine,
    /// The virtio-iommu device.
    pub iommu: IommuDevice,
    /// Root ports, in the order of the file.
    pub root_ports: Vec<RootPort>,
    /// Endpoints: NVMe controllers, then DMA engines.
    pub endpoints: Vec<Endpoint>,
}

impl Topology {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Topology, TopologyError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| TopologyError::Read { path: path.to_path_buf(), source })?;
        Topology::parse(&text, &path.display().to_string())
    }

    /// Checks the text of a topology; `name` is what errors call it.
    pub fn parse(text: &str, name: &str) -> Result<Topology, TopologyError> {
        check(text).map_err(|problem| TopologyError::Invalid { name: name.to_string(), what: problem.in_file(text) })
    }

    /// The topology of one endpoint, given as `MODEL,KEY=VALUE,...`: the keys are those of a file.
    pub fn of_endpoint(text: &str) -> Result<Topology, TopologyError> {
        let invalid = |what| TopologyError::Endpoint { text: text.to_string(), what };
        let table = endpoint_table(text).map_err(invalid)?;
        check(&table).map_err(|problem| invalid(problem.in_option(&table)))
    }

    /// Whether other functions share the slot of the one at `address`, behind the root port of this index or on the root
    /// bus, of which it is the first.
    pub fn is_first_of_many(&self, behind: Option<usize>, address: Address) -> bool {
        let on_root_bus = self.root_ports.iter().map(|port| *port.address.get_ref());
        let on_root_bus = on_root_bus.chain([*self.iommu.address.get_ref()]).map(|address| (None, address));
        let mut all = self.endpoints.iter().map(|endpoint| (endpoint.behind, endpoint.address)).chain(on_root_bus);
        let other = |(bus, other): (Option<usize>, Address)| {
            bus == behind && other.device == address.device && other.function != 0
        };
        address.function == 0 && all.any(other)
    }

    /// What the IOMMU must know of the endpoints.
    pub fn settings(&self) -> Settings {
        Settings {
            boot_bypass: self.iommu.bypass,
            split: self.iommu.split,
            endpoints: self
                .endpoints
                .iter()
                .map(|endpoint| EndpointSettings { id: endpoint.bdf.id(), reserved: vec![X86_MSI] })
                .collect(),
            limits: Limits { table_bytes: self.iommu.table_memory.0, ..Limits::default() },
            ..Settings::default()
        }
    }
}

/// The file that has the endpoint `text` and nothing else, with a key a line.
fn endpoint_table(text: &str) -> Result<String, String> {
    let (model, keys) = text.split_once(',').unwrap_or((text, ""));
    if !matches!(model, "nvme" | "dma-engine") {
        return Err(format!("{model:?} is no device model; nvme or dma-engine was expected"));
    }
    let mut table = format!("[[{model}]]\n");
    for part in keys.split(',').filter(|part| !part.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            return Err(format!("{part:?} was found where KEY=VALUE was expected"));
        };
        let value = match key {
            "behind" | "hotplug" => {
                return Err(format!("key `{key}`: root ports, and what is behind them, need a topology file"));
            }
            "block-size" => value
                .parse::<u32>()
                .map(toml::Value::from)
                .map_err(|_| format!("key `{key}`: {value:?} is no number of bytes; 512 or 4096 was expected"))?,
            "msix" => value
                .parse::<bool>()
                .map(toml::Value::from)
                .map_err(|_| format!("key `{key}`: {value:?} was found where true or false was expected"))?,
            _ => toml::Value::from(value),
        };
        table += &format!("{key} = {value}\n");
    }
    Ok(table)
}

/// Checks the text of a topology.
fn check(text: &str) -> Result<Topology, Problem> {
    check_file(toml::from_str(text)?)
}

/// Checks what the types of [`File`] do not express.
fn check_file(file: File) -> Result<Topology, Problem> {
    let mut slots = Slots::default();
    slots.take(None, &file.iommu.address, "iommu")?;
    for (index, port) in file.root_port.iter().enumerate() {
        slots.take(None, &port.address, port.name.get_ref())?;
        let before = file.root_port.iter().take(index);
        check_name(port.name.get_ref(), port.name.span(), before.map(|port| port.name.get_ref().as_str()))?;
    }
    let mut topology =
        Topology { machine: file.machine, iommu: file.iommu, root_ports: file.root_port, endpoints: Vec::new() };
    for (index, entry) in file.nvme.into_iter().enumerate() {
        let name = entry.name.as_ref().map_or_else(|| format!("nvme{index}"), |name| name.get_ref().clone());
        let block_size = *entry.block_size.get_ref();
        if !matches!(block_size, 512 | 4096) {
            return Err(Problem::of(
                "block-size",
                entry.block_size.span(),
                format!("{block_size} is not supported; 512 or 4096 was expected"),
            ));
        }
        let behind = match &entry.behind {
            None => None,
            Some(port) => Some(root_port(&topology.root_ports, port)?),
        };
        if behind.is_none() && entry.hotplug {
            return Err(Problem::of(
                "hotplug",
                entry.address.span(),
                "the root bus takes no hot-added device; put the endpoint behind a root port with `behind`",
            ));
        }
        let serial = match entry.serial {
            Some(serial) => check_serial(serial)?,
            None => format!("viommu-{name}"),
        };
        let image = check_image(&topology, entry.image)?;
        let model = Model::Nvme { image, block_size, serial };
        // QEMU up to 11.1 aborts when a vfio-user function with MSI-X is unplugged.
        let msix = entry.msix.unwrap_or(!entry.hotplug);
        let name_span = entry.name.map(|name| name.span());
        let found = Found { name, name_span, behind, hotplug: entry.hotplug, msix, model };
        add(&mut topology, &mut slots, found, &entry.address)?;
    }
    for (index, entry) in file.dma_engine.into_iter().enumerate() {
        let name = entry.name.as_ref().map_or_else(|| format!("dma{index}"), |name| name.get_ref().clone());
        let name_span = entry.name.map(|name| name.span());
        let msix = entry.msix.unwrap_or(true);
        let found = Found { name, name_span, behind: None, hotplug: false, msix, model: Model::DmaEngine };
        add(&mut topology, &mut slots, found, &entry.address)?;
    }
    slots.check_first_functions()?;
    if topology.endpoints.is_empty() {
        return Err(Problem::of_all("it has no endpoint; at least one [[nvme]] or [[dma-engine]] table was expected"));
    }
    Ok(topology)
}

fn root_port(ports: &[RootPort], name: &Spanned<String>) -> Result<usize, Problem> {
    ports.iter().position(|port| port.name.get_ref() == name.get_ref()).ok_or_else(|| {
        let known: Vec<_> = ports.iter().map(|port| format!("{:?}", port.name.get_ref())).collect();
        let known = if known.is_empty() { "there is none".into() } else { format!("there are {}", known.join(", ")) };
        Problem::of("behind", name.span(), format!("no [[root-port]] is named {:?}; {known}", name.get_ref()))
    })
}

fn add(topology: &mut Topology, slots: &mut Slots, found: Found, address: &Spanned<Address>) -> Result<(), Problem> {
    let Found { name, name_span, behind, hotplug, msix, model } = found;
    let endpoints = topology.endpoints.iter().map(|other| other.name.as_str());
    let ports = topology.root_ports.iter().map(|port| port.name.get_ref().as_str());
    check_name(&name, name_span.unwrap_or(0..0), endpoints.chain(ports))?;
    slots.take(behind, address, &name)?;
    let bus = behind.map_or(0, |port| bus_behind(&topology.root_ports, port));
    let bdf = Bdf { bus, address: *address.get_ref() };
    topology.endpoints.push(Endpoint { name, address: *address.get_ref(), behind, hotplug, msix, model, bdf });
    Ok(())
}

/// A name is an id in QEMU, part of a socket's path and of a serial number.
fn check_name<'n>(name: &str, span: Range<usize>, mut taken: impl Iterator<Item = &'n str>) -> Result<(), Problem> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic());
    if !starts_well || !name.chars().all(plain) || name.len() > 13 {
        let wanted = "a letter and then letters, digits, - and _, 13 characters at most, were expected";
        return Err(Problem::of("name", span, format!("{name:?} cannot be a name; {wanted}")));
    }
    // The other sockets of a run, and what QEMU is given beside the endpoints.
    if matches!(name, "trace" | "qmp") || name.starts_with("viommu") {
        let what = format!("the name {name:?} is one of viommu's own: trace, qmp, and all that begin with viommu");
        return Err(Problem::of("name", span, what));
    }
    if taken.any(|other| other == name) {
        return Err(Problem::of("name", span, format!("the name {name:?} is taken")));
    }
    Ok(())
}

/// The Identify Controller data structure has 20 bytes of ASCII for it (NVMe base specification).
fn check_serial(serial: Spanned<String>) -> Result<String, Problem> {
    let printable = |c: u8| c.is_ascii_graphic() || c == b' ';
    if (1..=20).contains(&serial.get_ref().len()) && serial.get_ref().bytes().all(printable) {
        return Ok(serial.into_inner());
    }
    let what =
        format!("{:?} cannot be a serial number; 1 to 20 printable ASCII characters were expected", serial.get_ref());
    Err(Problem::of("serial", serial.span(), what))
}

fn check_image(topology: &Topology, image: Spanned<PathBuf>) -> Result<PathBuf, Problem> {
    for endpoint in &topology.endpoints {
        let Model::Nvme { image: other, .. } = &endpoint.model else { continue };
        if same_file(other, image.get_ref()) {
            let is = if other == image.get_ref() { String::new() } else { format!("the same file as {other:?}, ") };
            let (image_name, owner) = (image.get_ref(), &endpoint.name);
            let what = format!("{image_name:?} is {is}the image of {owner:?} already; each endpoint needs its own");
            return Err(Problem::of("image", image.span(), what));
        }
    }
    Ok(image.into_inner())
}

/// Whether two paths lead to one file; of files that do not exist, only whether the paths are the same.
fn same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino()));
    match (file(one), file(other)) {
        (Ok(one), Ok(other)) => one == other,
        (Err(_), Err(_)) => std::path::absolute(one).ok() == std::path::absolute(other).ok(),
        _ => false,
    }
}

struct Found {
    name: String,
    name_span: Option<Range<usize>>,
    behind: Option<usize>,
    hotplug: bool,
    msix: bool,
    model: Model,
}

/// The bus number that firmware gives to the bus behind a root port: it counts them in the order of their addresses.
fn bus_behind(ports: &[RootPort], port: usize) -> u8 {
    let address = ports.get(port).map(|port| *port.address.get_ref());
    let before = ports.iter().filter(|other| Some(*other.address.get_ref()) < address).count();
    u8::try_from(before + 1).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests;
