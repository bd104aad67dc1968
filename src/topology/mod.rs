//! The topology: one TOML file describes the endpoints, the VIOT and QEMU's arguments, so that these cannot disagree.
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
use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

pub use address::{Address, Bdf};
use problem::Problem;
pub use size::Size;
use slots::Slots;

use crate::devices::MODELS;
use crate::devices::model::{self, Configuration, KeyKind, Model, OwnFile};
use crate::iommu::{EndpointSettings, Limits, Reserved, Settings};
use viommu_wire::virtio_iommu::ResvMemKind;

/// The window of x86 message-signalled interrupts. An endpoint's writes there are interrupts.
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
    /// A file has an error.
    #[error("Cannot use the topology {name}: {what}")]
    Invalid {
        /// The file.
        name: String,
        /// Line and key, what was found, and what was expected.
        what: String,
    },
    /// An endpoint given as text has an error.
    #[error("Cannot use --endpoint {text}: {what}")]
    Endpoint {
        /// The text.
        text: String,
        /// The key, what was found, and what was expected.
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
    /// The most bytes of all page tables.
    pub table_memory: Size,
    /// Whether the split alloc/map protocol is offered.
    pub split: bool,
    /// Whether device models poll the request queue while they are awake, so that the driver need not kick.
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
    /// The name by which endpoints refer to it.
    pub name: Spanned<String>,
    /// Its slot and function on the root bus.
    pub address: Spanned<Address>,
}

/// The keys that every endpoint may have, whatever its model.
const COMMON_KEYS: [&str; 6] = ["name", "address", "behind", "hotplug", "msix", "ats"];

/// See [`COMMON_KEYS`].
#[derive(Clone, Debug, Deserialize)]
struct Common {
    name: Option<Spanned<String>>,
    address: Spanned<Address>,
    behind: Option<Spanned<String>>,
    #[serde(default)]
    hotplug: bool,
    msix: Option<bool>,
    #[serde(default)]
    ats: bool,
}

/// The tables that are not of endpoints.
const OTHER_TABLES: [&str; 3] = ["machine", "iommu", "root-port"];

/// See [`OTHER_TABLES`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Others {
    #[serde(default)]
    machine: Machine,
    #[serde(default)]
    iommu: IommuDevice,
    #[serde(default)]
    root_port: Vec<RootPort>,
}

/// An endpoint of the IOMMU: a PCI function that this process serves over vfio-user.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name, which its socket has too, and which is its id in QEMU.
    pub name: String,
    /// Its slot and function on its bus.
    pub address: Address,
    /// The root port that it is behind, as an index into [`Topology::root_ports`].
    pub behind: Option<usize>,
    /// Whether it is left out at the start, to be added with `device_add` later.
    pub hotplug: bool,
    /// Whether it has MSI-X in addition to MSI and its interrupt pin.
    pub msix: bool,
    /// Whether it has the capability for ATS.
    pub ats: bool,
    /// Its model.
    pub model: &'static Model,
    /// Its model's configuration.
    pub configuration: Arc<dyn Configuration>,
    /// Its bus, device and function number: the endpoint id.
    pub bdf: Bdf,
}

/// A checked topology.
#[derive(Clone, Debug)]
pub struct Topology {
    /// The virtual machine.
    pub machine: Machine,
    /// The virtio-iommu device.
    pub iommu: IommuDevice,
    /// Root ports, in the order of the file.
    pub root_ports: Vec<RootPort>,
    /// Endpoints, in the order of [`MODELS`] and then of the file.
    pub endpoints: Vec<Endpoint>,
}

impl Topology {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Topology, TopologyError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| TopologyError::Read { path: path.to_path_buf(), source })?;
        Topology::parse(&text, &path.display().to_string())
    }

    /// Checks the text of a topology. Errors call it `name`.
    pub fn parse(text: &str, name: &str) -> Result<Topology, TopologyError> {
        check(text).map_err(|problem| TopologyError::Invalid { name: name.to_string(), what: problem.in_file(text) })
    }

    /// The topology of one endpoint, given as `MODEL,KEY=VALUE,...`. The keys are those of a file.
    pub fn of_endpoint(text: &str) -> Result<Topology, TopologyError> {
        let invalid = |what| TopologyError::Endpoint { text: text.to_string(), what };
        let table = endpoint_table(text).map_err(invalid)?;
        check(&table).map_err(|problem| invalid(problem.in_option(&table)))
    }

    /// Whether the function at `address`, behind the root port with this index or on the root bus, is the first of
    /// several in its slot.
    pub fn is_first_of_many(&self, behind: Option<usize>, address: Address) -> bool {
        let on_root_bus = self.root_ports.iter().map(|port| *port.address.get_ref());
        let on_root_bus = on_root_bus.chain([*self.iommu.address.get_ref()]).map(|address| (None, address));
        let mut all = self.endpoints.iter().map(|endpoint| (endpoint.behind, endpoint.address)).chain(on_root_bus);
        let other = |(bus, other): (Option<usize>, Address)| {
            bus == behind && other.device == address.device && other.function != 0
        };
        address.function == 0 && all.any(other)
    }

    /// The IOMMU's settings, with the endpoints.
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

/// The text of a file that has only the endpoint `text`, with one key on each line.
fn endpoint_table(text: &str) -> Result<String, String> {
    let (name, keys) = text.split_once(',').unwrap_or((text, ""));
    let Some(model) = MODELS.into_iter().find(|model| model.name == name) else {
        return Err(format!(
            "{name:?} is no device model; {} was expected",
            alternatives(|model| model.name.to_string())
        ));
    };
    let mut table = format!("[[{name}]]\n");
    for part in keys.split(',').filter(|part| !part.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            return Err(format!("{part:?} was found where KEY=VALUE was expected"));
        };
        let value = option_value(model, key, value).map_err(|what| format!("key `{key}`: {what}"))?;
        table += &format!("{key} = {value}\n");
    }
    Ok(table)
}

/// The value that a file would have for a key whose value was given as text.
fn option_value(model: &Model, key: &str, value: &str) -> Result<toml::Value, String> {
    if matches!(key, "behind" | "hotplug") {
        return Err("root ports, and what is behind them, need a topology file".into());
    }
    if matches!(key, "msix" | "ats") {
        let flag = value.parse::<bool>();
        return flag
            .map_err(|_| format!("{value:?} was found where true or false was expected"))
            .map(toml::Value::from);
    }
    match model.keys.iter().find(|known| known.name == key).map(|known| known.kind) {
        Some(KeyKind::Bytes(expected)) => {
            let number = value.parse::<u32>();
            let number = number.map_err(|_| format!("{value:?} is no number of bytes; {expected} was expected"))?;
            Ok(number.into())
        }
        Some(KeyKind::Text) | None => Ok(value.into()),
    }
}

/// A text for each model, joined as alternatives.
fn alternatives(of: impl Fn(&Model) -> String) -> String {
    let all: Vec<_> = MODELS.into_iter().map(of).collect();
    match all.split_last() {
        Some((last, before)) if !before.is_empty() => format!("{} or {last}", before.join(", ")),
        _ => all.concat(),
    }
}

/// Checks the text of a topology.
fn check(text: &str) -> Result<Topology, Problem> {
    let root = DeTable::parse(text)?;
    let (span, mut root) = (root.span(), root.into_inner());
    let names = OTHER_TABLES.into_iter().chain(MODELS.into_iter().map(|model| model.name));
    check_keys(&root, names)?;
    let tables = MODELS.map(|model| (model, root.remove(model.name)));
    let Others { machine, iommu, root_port } = Others::deserialize(Deserializer::from(Spanned::new(span, root)))?;
    let mut slots = Slots::default();
    slots.take(None, &iommu.address, "iommu")?;
    for (index, port) in root_port.iter().enumerate() {
        slots.take(None, &port.address, port.name.get_ref())?;
        let before = root_port.iter().take(index);
        check_name(port.name.get_ref(), port.name.span(), before.map(|port| port.name.get_ref().as_str()))?;
    }
    let mut topology = Topology { machine, iommu, root_ports: root_port, endpoints: Vec::new() };
    for (model, tables) in tables {
        for (index, table) in tables.map_or(Ok(Vec::new()), |tables| array(model, tables))?.into_iter().enumerate() {
            topology.add(&mut slots, model, index, table)?;
        }
    }
    slots.check_first_functions()?;
    if topology.endpoints.is_empty() {
        let tables = alternatives(|model| format!("[[{}]]", model.name));
        return Err(Problem::of_all(format!("it has no endpoint; at least one {tables} table was expected")));
    }
    Ok(topology)
}

/// Refuses keys that are not in `known`.
fn check_keys(table: &DeTable<'_>, known: impl Iterator<Item = &'static str>) -> Result<(), Problem> {
    let known: Vec<_> = known.collect();
    let Some(unknown) = table.keys().find(|key| !known.contains(&key.get_ref().as_ref())) else { return Ok(()) };
    let known: Vec<_> = known.iter().map(|key| format!("`{key}`")).collect();
    let what = format!("unknown field `{}`, expected one of {}", unknown.get_ref(), known.join(", "));
    Err(Problem::at(unknown.span(), what))
}

/// The tables of a model's endpoints.
fn array<'i>(model: &Model, value: Spanned<DeValue<'i>>) -> Result<Vec<Spanned<DeTable<'i>>>, Problem> {
    let wanted = |span| Problem::at(span, format!("tables [[{}]] were expected", model.name));
    let span = value.span();
    let DeValue::Array(values) = value.into_inner() else { return Err(wanted(span)) };
    let table = |value: Spanned<DeValue<'i>>| match (value.span(), value.into_inner()) {
        (span, DeValue::Table(table)) => Ok(Spanned::new(span, table)),
        (span, _) => Err(wanted(span)),
    };
    values.into_iter().map(table).collect()
}

fn root_port(ports: &[RootPort], name: &Spanned<String>) -> Result<usize, Problem> {
    ports.iter().position(|port| port.name.get_ref() == name.get_ref()).ok_or_else(|| {
        let known: Vec<_> = ports.iter().map(|port| format!("{:?}", port.name.get_ref())).collect();
        let known = if known.is_empty() { "there is none".into() } else { format!("there are {}", known.join(", ")) };
        Problem::of("behind", name.span(), format!("no [[root-port]] is named {:?}; {known}", name.get_ref()))
    })
}

impl Topology {
    /// Adds the endpoint of a table, which is number `index` of its model.
    fn add(
        &mut self,
        slots: &mut Slots,
        model: &'static Model,
        index: usize,
        table: Spanned<DeTable<'_>>,
    ) -> Result<(), Problem> {
        let (span, mut own) = (table.span(), table.into_inner());
        check_keys(&own, COMMON_KEYS.into_iter().chain(model.keys.iter().map(|key| key.name)))?;
        let mut common = DeTable::new();
        for key in COMMON_KEYS {
            common.extend(own.remove_entry(key));
        }
        let common = Deserializer::from(Spanned::new(span.clone(), common));
        let Common { name, address, behind, hotplug, msix, ats } = Common::deserialize(common)?;
        let behind = behind.map(|port| root_port(&self.root_ports, &port)).transpose()?;
        if behind.is_none() && hotplug {
            return Err(Problem::of(
                "hotplug",
                address.span(),
                "the root bus takes no hot-added device; put the endpoint behind a root port with `behind`",
            ));
        }
        // QEMU up to 11.1 aborts when a vfio-user function with MSI-X is unplugged.
        let msix = msix.unwrap_or(!hotplug);
        let name_span = name.as_ref().map_or(0..0, Spanned::span);
        let name = name.map_or_else(|| format!("{}{index}", model.endpoint_name), Spanned::into_inner);
        let configuration = (model.configure)(model::KeyTable::new(Spanned::new(span, own)), &name)?;
        self.check_own_file(&*configuration)?;
        let endpoints = self.endpoints.iter().map(|other| other.name.as_str());
        let ports = self.root_ports.iter().map(|port| port.name.get_ref().as_str());
        check_name(&name, name_span, endpoints.chain(ports))?;
        slots.take(behind, &address, &name)?;
        let bus = behind.map_or(0, |port| bus_behind(&self.root_ports, port));
        let address = *address.get_ref();
        let bdf = Bdf { bus, address };
        self.endpoints.push(Endpoint { name, address, behind, hotplug, msix, ats, model, configuration, bdf });
        Ok(())
    }

    /// Refuses a file that another endpoint already has.
    fn check_own_file(&self, configuration: &dyn Configuration) -> Result<(), Problem> {
        let Some(OwnFile { key, span, path }) = configuration.own_file() else { return Ok(()) };
        for endpoint in &self.endpoints {
            let Some(other) = endpoint.configuration.own_file() else { continue };
            if same_file(other.path, path) {
                let is =
                    if other.path == path { String::new() } else { format!("the same file as {:?}, ", other.path) };
                let (other_key, owner) = (other.key, &endpoint.name);
                let what = format!("{path:?} is {is}the {other_key} of {owner:?} already; each endpoint needs its own");
                return Err(Problem::of(key, span, what));
            }
        }
        Ok(())
    }
}

/// Checks a name, which is an id in QEMU and part of a socket's path and of a serial number.
fn check_name<'n>(name: &str, span: Range<usize>, mut taken: impl Iterator<Item = &'n str>) -> Result<(), Problem> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic());
    if !starts_well || !name.chars().all(plain) || name.len() > 13 {
        let wanted = "a letter and then letters, digits, - and _, 13 characters at most, were expected";
        return Err(Problem::of("name", span, format!("{name:?} cannot be a name; {wanted}")));
    }
    // These are names of the other sockets of a run, and of QEMU's objects beside the endpoints.
    if matches!(name, "trace" | "qmp") || name.starts_with("viommu") {
        let what = format!("the name {name:?} is one of viommu's own: trace, qmp, and all that begin with viommu");
        return Err(Problem::of("name", span, what));
    }
    if taken.any(|other| other == name) {
        return Err(Problem::of("name", span, format!("the name {name:?} is taken")));
    }
    Ok(())
}

/// Whether two paths lead to one file. If neither file exists, whether the paths are the same.
fn same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino()));
    match (file(one), file(other)) {
        (Ok(one), Ok(other)) => one == other,
        (Err(_), Err(_)) => std::path::absolute(one).ok() == std::path::absolute(other).ok(),
        _ => false,
    }
}

/// The bus number that firmware gives to the bus behind a root port. Firmware counts them in the order of the ports'
/// addresses.
fn bus_behind(ports: &[RootPort], port: usize) -> u8 {
    let address = ports.get(port).map(|port| *port.address.get_ref());
    let before = ports.iter().filter(|other| Some(*other.address.get_ref()) < address).count();
    u8::try_from(before + 1).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests;
