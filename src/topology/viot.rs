//! The ACPI table that tells the guest which endpoints the IOMMU manages (Virtual I/O Translation Table).

use acpi_tables::Aml;
use acpi_tables::viot::{PciDevice, PciRange, VIOT, VirtIoPciIommu};

use super::{Bdf, Topology};

/// The table, as `-acpitable file=` takes it.
///
/// Only our own endpoints are in it. If a device inside QEMU were in it too, the guest would give the device I/O
/// virtual addresses, but the device would access memory untranslated.
pub fn table(topology: &Topology) -> Vec<u8> {
    let mut table = VIOT::new(*b"VIOMMU", *b"VIOMMU  ", 1);
    let iommu = Bdf { bus: 0, address: *topology.iommu.address.get_ref() };
    let iommu = table.add_virtio_pci_iommu(VirtIoPciIommu::new(device(iommu)));
    for endpoint in &topology.endpoints {
        table.add_pci_range(PciRange::new(device(endpoint.bdf), device(endpoint.bdf), &iommu));
    }
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn device(bdf: Bdf) -> PciDevice {
    PciDevice::new(0, bdf.bus, bdf.address.device, bdf.address.function)
}
