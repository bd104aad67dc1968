//! The smallest model, over a real vfio-user socket that a whole daemon serves.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use tempfile::TempDir;
use vfio_bindings::bindings::vfio::*;
use vfio_user::Client;
use viommu::daemon::{Bound, Daemon, Options, open_devices};
use viommu::topology::Topology;
use viommu::topology::qemu::Paths;
use viommu_testkit::{PATIENCE, memfd, wait_until};
use vmm_sys_util::eventfd::EventFd;

const ADDRESS: u64 = 0x00;
const STATUS: u64 = 0x08;
const DOORBELL: u64 = 0x0c;
const IDLE: u32 = 0;
const BUSY: u32 = 1;
const DONE: u32 = 2;
const FAILED: u32 = 3;
const RAM: u64 = 1 << 20;

/// The device behind a daemon's IOMMU, which begins in bypass, and a driver.
struct Setup {
    daemon: Option<Daemon>,
    client: Option<Client>,
    ram: File,
    interrupt: EventFd,
    _dir: TempDir,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let topology = Topology::of_endpoint("null,address=04.0").unwrap();
        let paths = Paths { iommu: dir.path().join("viommu.sock") };
        let socket = paths.endpoint(&topology.endpoints[0]);
        let options = Options { paths, trace_socket: None, inject: Vec::new() };
        let devices = open_devices(&topology, None).unwrap();
        let daemon = Bound::new(&topology, &options, devices).unwrap().start().unwrap();
        let (mut client, ram, interrupt) = (Client::new(&socket).unwrap(), memfd(RAM), EventFd::new(0).unwrap());
        client.dma_map(0, 0, RAM, ram.as_raw_fd()).unwrap();
        let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, set, 0, 1, &[interrupt.as_raw_fd()]).unwrap();
        Setup { daemon: Some(daemon), client: Some(client), ram, interrupt, _dir: dir }
    }

    fn client(&mut self) -> &mut Client {
        self.client.as_mut().unwrap()
    }

    fn enable(&mut self) {
        self.client().region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.client().region_read(0, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.client().region_write(0, offset, data).unwrap();
    }

    /// Makes the device write `number` to `address`. Returns STATUS after the interrupt.
    fn have_written(&mut self, address: u64, number: u32) -> u32 {
        self.write(ADDRESS, &address.to_le_bytes());
        self.write(DOORBELL, &number.to_le_bytes());
        self.wait_for_interrupt();
        self.read(STATUS)
    }

    /// Waits for one interrupt. The sender has made the descriptor non-blocking.
    fn wait_for_interrupt(&self) {
        let mut count = None;
        wait_until(PATIENCE, "the interrupt", || {
            count = self.interrupt.read().ok();
            count.is_some()
        });
        assert_eq!(count, Some(1));
    }

    fn memory(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.ram.read_exact_at(&mut data, address).unwrap();
        u32::from_le_bytes(data)
    }
}

#[test]
fn a_number_is_written_and_the_interrupt_sent() {
    let mut setup = Setup::new();
    setup.enable();
    for (address, number) in [(0x1000, 0x1234_5678), (0x2ffe, u32::MAX)] {
        assert_eq!(setup.have_written(address, number), DONE);
        assert_eq!(setup.memory(address), number);
        setup.write(STATUS, &[1]);
        assert_eq!(setup.read(STATUS), IDLE);
    }
    drop(setup.client.take());
    let counts = setup.daemon.take().unwrap().end();
    assert_eq!((counts.dma_bypass_bytes, counts.dma_read_bytes), (8, 0));
}

#[test]
fn a_write_without_memory_or_bus_mastering_fails() {
    let mut setup = Setup::new();
    assert_eq!(setup.have_written(0x1000, 7), FAILED, "bus mastering is off");
    setup.enable();
    assert_eq!(setup.have_written(RAM, 7), FAILED, "there is no memory");
    assert_eq!(setup.memory(0x1000), 0);
    assert_eq!(setup.have_written(0x1000, 7), DONE);
    assert_eq!(setup.memory(0x1000), 7);
}

#[test]
fn registers_are_accessed_in_any_width_and_a_reset_sets_them_back() {
    let mut setup = Setup::new();
    setup.enable();
    for (at, byte) in (0..).zip([0x11, 0x22, 0x33, 0x44]) {
        setup.write(ADDRESS + at, &[byte]);
    }
    assert_eq!((setup.read(ADDRESS), setup.read(ADDRESS + 2)), (0x4433_2211, 0x4433));
    assert_eq!(setup.have_written(0x1000, 9), DONE);
    assert_eq!((setup.read(DOORBELL), setup.read(0x10), setup.read(0xffc)), (0, 0, 0));
    setup.write(STATUS, &[0, 1, 0, 0]);
    assert_eq!(setup.read(STATUS), DONE, "only bit 0 acknowledges");
    setup.client().reset().unwrap();
    assert_eq!((setup.read(ADDRESS), setup.read(STATUS)), (0, IDLE));
}

#[test]
fn the_pin_is_asserted_until_it_is_acknowledged() {
    let mut setup = Setup::new();
    setup.enable();
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let event = setup.interrupt.as_raw_fd();
    setup.client().set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[event]).unwrap();
    assert_eq!(setup.have_written(0x1000, 1), DONE);
    let unmask = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
    setup.client().set_irqs(VFIO_PCI_INTX_IRQ_INDEX, unmask, 0, 1, &[]).unwrap();
    // It is still asserted.
    setup.wait_for_interrupt();
    setup.write(STATUS, &[1]);
    setup.client().set_irqs(VFIO_PCI_INTX_IRQ_INDEX, unmask, 0, 1, &[]).unwrap();
    setup.write(ADDRESS, &RAM.to_le_bytes());
    setup.write(DOORBELL, &[1, 0, 0, 0]);
    wait_until(PATIENCE, "the end of the write", || setup.read(STATUS) != BUSY);
    // It is sent once, and not for the completion that was acknowledged.
    setup.wait_for_interrupt();
}
