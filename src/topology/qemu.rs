//! QEMU's arguments for a topology.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Address, Endpoint, Topology};
use crate::vhost::{QUEUE_SIZE, QUEUES};
use viommu_wire::virtio_iommu::{Config, DEVICE_ID};

/// The paths of a topology's sockets and table.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The vhost-user socket of the virtio-iommu device.
    pub iommu: PathBuf,
}

impl Paths {
    /// The vfio-user socket of an endpoint. It is named after the endpoint and lies beside the vhost-user socket.
    pub fn endpoint(&self, endpoint: &Endpoint) -> PathBuf {
        self.iommu.with_file_name(format!("{}.sock", endpoint.name))
    }

    /// The VIOT, which lies beside the vhost-user socket.
    pub fn viot(&self) -> PathBuf {
        self.iommu.with_file_name("viot.bin")
    }
}

/// The arguments that make the machine and its memory. A user's own QEMU command line needs these or similar ones,
/// since the memory must be shared with this process.
pub fn machine(topology: &Topology) -> Vec<String> {
    let memory = topology.machine.memory;
    [
        "-machine",
        "q35,memory-backend=viommu-memory",
        "-m",
        &memory.to_string(),
        "-object",
        &format!("memory-backend-memfd,id=viommu-memory,size={memory},share=on"),
        "-smp",
        &topology.machine.vcpus.to_string(),
    ]
    .map(String::from)
    .to_vec()
}

/// The arguments that add the IOMMU, its table, root ports and endpoints.
pub fn devices(topology: &Topology, paths: &Paths) -> Vec<String> {
    let mut args = vec![
        "-acpitable".into(),
        format!("file={}", comma_safe(&paths.viot())),
        "-chardev".into(),
        format!("socket,id=viommu,path={}", comma_safe(&paths.iommu)),
        "-device".into(),
        format!(
            "vhost-user-test-device-pci,chardev=viommu,virtio-id={DEVICE_ID},num_vqs={QUEUES},vq_size={QUEUE_SIZE},\
             config_size={},addr={}{}",
            size_of::<Config>(),
            topology.iommu.address.get_ref(),
            multifunction(topology, *topology.iommu.address.get_ref()),
        ),
    ];
    for (index, port) in topology.root_ports.iter().enumerate() {
        args.push("-device".into());
        args.push(format!(
            "pcie-root-port,id={},addr={},chassis={},slot={}{}",
            port.name.get_ref(),
            port.address.get_ref(),
            index + 1,
            index + 1,
            multifunction(topology, *port.address.get_ref()),
        ));
    }
    for endpoint in topology.endpoints.iter().filter(|endpoint| !endpoint.hotplug) {
        args.push("-device".into());
        args.push(device(topology, endpoint, paths).to_string());
    }
    args
}

/// The option that a device on the root bus needs in addition if it is the first of several functions in its slot.
/// Without it QEMU accepts no other function there, and a guest does not look for one.
fn multifunction(topology: &Topology, address: Address) -> &'static str {
    if topology.is_first_of_many(None, address) { ",multifunction=on" } else { "" }
}

/// The port for the trace of the guest's own events, and the file behind it. These arguments must come after all other
/// devices, since QEMU chooses a free slot for the port.
pub fn guest_trace(file: &Path) -> [String; 6] {
    [
        "-device".into(),
        "virtio-serial-pci,id=viommu-serial".into(),
        "-chardev".into(),
        format!("file,id=viommu-guest-trace,path={}", comma_safe(file)),
        "-device".into(),
        "virtserialport,bus=viommu-serial.0,chardev=viommu-guest-trace,name=viommu.guest-trace".into(),
    ]
}

/// The JSON for one endpoint that `-device` takes, and QMP's `device_add` as its arguments.
pub fn device(topology: &Topology, endpoint: &Endpoint, paths: &Paths) -> serde_json::Value {
    let bus = endpoint.behind.and_then(|port| topology.root_ports.get(port)).map(|port| port.name.get_ref().as_str());
    let mut device = json!({
        "driver": "vfio-user-pci",
        "id": endpoint.name,
        "bus": bus.unwrap_or("pcie.0"),
        "addr": endpoint.address.to_string(),
        "socket": { "type": "unix", "path": paths.endpoint(endpoint) },
    });
    if topology.is_first_of_many(endpoint.behind, endpoint.address) {
        device["multifunction"] = true.into();
    }
    device
}

/// Doubles the commas in a path, since QEMU's option parser takes a doubled comma for a comma.
pub fn comma_safe(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
