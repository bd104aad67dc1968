//! A PCI function over a real vfio-user socket, with the vfio_user crate's client in QEMU's place.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vfio_bindings::bindings::vfio::*;
use vfio_user::Client;
use viommu::pci::{FunctionServer, Slot};
use viommu_socket::SocketError;
use viommu_testkit::PATIENCE;
use viommu_testkit::function::Served;
use viommu_testkit::memfd;
use viommu_testkit::toy::*;
use viommu_testkit::vfio::{self, RawClient};
use viommu_trace::Tracer;
use vmm_sys_util::eventfd::EventFd;

const ENDPOINT: u32 = 0x20;
const RAM: u64 = 1 << 20;
const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;

/// The device on a socket, and how often its client reset it.
struct Setup {
    served: Served,
    resets: Arc<AtomicU32>,
}

impl Setup {
    fn new() -> Self {
        Setup::in_slot(|slot| slot)
    }

    fn in_slot(slot: impl FnOnce(Slot) -> Slot) -> Self {
        let resets = Arc::new(AtomicU32::new(0));
        let count = resets.clone();
        let on_reset = move || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        Setup { served: Served::in_slot(ENDPOINT, Tracer::default(), slot, Toy::make, on_reset), resets }
    }

    fn path(&self) -> PathBuf {
        self.served.path()
    }

    fn client(&self) -> Client {
        self.served.client()
    }
}

fn read(client: &mut Client, region: u32, offset: u64) -> u64 {
    let mut data = [0; 8];
    client.region_read(region, offset, &mut data).unwrap();
    u64::from_le_bytes(data)
}

fn read32(client: &mut Client, region: u32, offset: u64) -> u32 {
    let mut data = [0; 4];
    client.region_read(region, offset, &mut data).unwrap();
    u32::from_le_bytes(data)
}

fn write(client: &mut Client, offset: u64, value: u64) {
    client.region_write(0, offset, &value.to_le_bytes()).unwrap();
}

/// Sets Memory Space and Bus Master Enable.
fn enable(client: &mut Client) {
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
}

/// Makes the device read 8 bytes at `address`.
fn dma_read(client: &mut Client, address: u64) -> u64 {
    write(client, ADDRESS, address);
    write(client, DO_READ, 0);
    read(client, 0, RESULT)
}

/// Whether the device could write `value` at `address`.
fn dma_write(client: &mut Client, address: u64, value: u64) -> bool {
    write(client, ADDRESS, address);
    write(client, RESULT, value);
    write(client, DO_WRITE, 0);
    read(client, 0, RESULT) == 0
}

#[test]
fn regions_and_identity_are_what_qemu_expects() {
    let setup = Setup::new();
    let mut client = setup.client();
    let sizes: Vec<u64> = (0..9).map(|index| client.region(index).unwrap().size).collect();
    assert_eq!(sizes, [0x2000, 0, 0x1000, 0, 0, 0, 0, 4096, 0]);
    let counts: Vec<u32> = (0..5).map(|index| client.get_irq_info(index).unwrap().count).collect();
    assert_eq!(counts, [1, 4, 3, 1, 0]);
    let pin = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
    assert_eq!(client.get_irq_info(0).unwrap().flags, pin);
    assert_eq!(read32(&mut client, CONFIG, 0), 0x1234_1b36);
    assert_eq!(read32(&mut client, CONFIG, 8), 0x0880_0001);
    client.region_write(CONFIG, 0x10, &[0xff; 8]).unwrap();
    assert_eq!(read(&mut client, CONFIG, 0x10), 0xffff_ffff_ffff_e004);
    assert_eq!(read32(&mut client, CONFIG, 0x180), 0);
}

#[test]
fn a_slot_without_msix_has_msi_and_a_pin() {
    let setup = Setup::in_slot(Slot::without_msix);
    let mut client = setup.client();
    let sizes: Vec<u64> = (0..9).map(|index| client.region(index).unwrap().size).collect();
    assert_eq!(sizes, [0x2000, 0, 0, 0, 0, 0, 0, 4096, 0]);
    let counts: Vec<u32> = (0..5).map(|index| client.get_irq_info(index).unwrap().count).collect();
    assert_eq!(counts, [1, 4, 0, 1, 0]);
    let mut at = u64::from(read32(&mut client, CONFIG, 0x34) as u8);
    while at != 0 {
        let header = read32(&mut client, CONFIG, at);
        assert_ne!(header as u8, 0x11, "it has the capability");
        at = u64::from(header >> 8 & 0xff);
    }
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    client.set_irqs(VFIO_PCI_MSI_IRQ_INDEX, set, 0, 1, &[event.as_raw_fd()]).unwrap();
    write(&mut client, DO_INTERRUPT, 2);
    assert_eq!(event.read().unwrap(), 1, "all are the one that is enabled");
}

#[test]
fn a_slot_with_ats_says_so_and_goes_on_when_it_is_enabled() {
    let setup = Setup::in_slot(Slot::with_ats);
    let mut client = setup.client();
    assert_eq!(read32(&mut client, CONFIG, 0x100), 0x0001_000f);
    enable(&mut client);
    let ram = memfd(RAM);
    client.dma_map(0, 0x4000_0000, RAM, ram.as_raw_fd()).unwrap();
    client.region_write(CONFIG, 0x106, &[0, 0x80]).unwrap();
    assert_eq!(read32(&mut client, CONFIG, 0x104), 0x8000_0020);
    assert!(dma_write(&mut client, 0x4000_0000, 42));
    assert_eq!(dma_read(&mut client, 0x4000_0000), 42);
}

#[test]
fn memory_is_reached_only_while_mapped_and_with_bus_mastering() {
    let setup = Setup::new();
    let mut client = setup.client();
    let mut ram = memfd(RAM);
    ram.write_all(&0x1122_3344_5566_7788u64.to_le_bytes()).unwrap();
    client.dma_map(0, 0x4000_0000, RAM, ram.as_raw_fd()).unwrap();
    assert_eq!(dma_read(&mut client, 0x4000_0000), u64::MAX, "bus mastering is off");
    enable(&mut client);
    assert_eq!(dma_read(&mut client, 0x4000_0000), 0x1122_3344_5566_7788);
    assert!(dma_write(&mut client, 0x4000_0000 + RAM - 8, 42));
    assert_eq!(dma_read(&mut client, 0x4000_0000 + RAM - 8), 42);
    assert_eq!(dma_read(&mut client, 0x4000_0000 + RAM - 4), u64::MAX, "half of it is outside");
    client.dma_unmap(0x4000_0000, RAM).unwrap();
    assert_eq!(dma_read(&mut client, 0x4000_0000), u64::MAX);
    // As firmware does for shadowing: the same region is mapped repeatedly.
    for _ in 0..100 {
        client.dma_map(0, 0, RAM, ram.as_raw_fd()).unwrap();
        assert_eq!(dma_read(&mut client, RAM - 8), 42);
        client.dma_unmap(0, RAM).unwrap();
    }
}

#[test]
fn read_only_memory_refuses_writes() {
    let setup = Setup::new();
    // The crate's client cannot ask for a read-only region.
    let mut raw = RawClient::connect(&setup.path());
    let ram = memfd(RAM);
    raw.dma_map(vfio::READ, 0, 0x1000, RAM, &[ram.as_raw_fd()]).unwrap();
    raw.dma_map(vfio::READ | vfio::WRITE, 0, 0x20_0000, RAM, &[ram.as_raw_fd()]).unwrap();
    raw.dma_map(vfio::READ, 0, 0x40_0000, RAM, &[]).unwrap();
    raw.region_write(CONFIG, 4, &[6, 0]).unwrap();
    let mut dma_write = |address: u64| {
        for (register, value) in [(ADDRESS, address), (RESULT, 7), (DO_WRITE, 0)] {
            raw.region_write(0, register, &value.to_le_bytes()).unwrap();
        }
        raw.region_read(0, RESULT, 8).unwrap() == [0; 8]
    };
    assert!(!dma_write(0x1000));
    assert!(dma_write(0x20_0000));
    assert!(!dma_write(0x1000 + RAM - 4), "the second half would be writable if it were there");
    assert!(!dma_write(0x40_0000), "there is no memory");
}

#[test]
fn interrupts_reach_their_descriptors() {
    let setup = Setup::new();
    let mut client = setup.client();
    let events: Vec<EventFd> = (0..3).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    write(&mut client, DO_INTERRUPT, 1);
    // One by one, as QEMU does; then one without a descriptor, which removes the old one.
    for (vector, event) in events.iter().enumerate() {
        client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, set, vector as u32, 1, &[event.as_raw_fd()]).unwrap();
    }
    write(&mut client, DO_INTERRUPT, 1);
    assert_eq!(events[1].read().unwrap(), 1);
    assert!(events[0].read().is_err() && events[2].read().is_err());
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, set, 1, 1, &[]).unwrap();
    write(&mut client, DO_INTERRUPT, 1);
    assert!(events[1].read().is_err());
    write(&mut client, DO_INTERRUPT, 2);
    assert_eq!(events[2].read().unwrap(), 1);
    let action = |action| VFIO_IRQ_SET_DATA_NONE | action;
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, action(VFIO_IRQ_SET_ACTION_MASK), 2, 1, &[]).unwrap();
    write(&mut client, DO_INTERRUPT, 2);
    assert!(events[2].read().is_err());
    // The pending bits are in the second half of the BAR that the capability names.
    assert_eq!(read(&mut client, 2, 0x800), 1 << 2);
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, action(VFIO_IRQ_SET_ACTION_UNMASK), 2, 1, &[]).unwrap();
    assert_eq!(events[2].read().unwrap(), 1);
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, action(VFIO_IRQ_SET_ACTION_TRIGGER), 0, 0, &[]).unwrap();
    write(&mut client, DO_INTERRUPT, 0);
    assert!(events[0].read().is_err());
    // Vectors that do not exist.
    write(&mut client, DO_INTERRUPT, 9999);
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, set, u32::MAX, 1, &[]).unwrap();
    client.set_irqs(VFIO_PCI_REQ_IRQ_INDEX, set, 0, 1, &[]).unwrap();
    assert_eq!(read32(&mut client, CONFIG, 0), 0x1234_1b36);
}

#[test]
fn a_reset_is_the_drivers_or_the_machines() {
    let setup = Setup::new();
    let mut client = setup.client();
    enable(&mut client);
    write(&mut client, ADDRESS, 0xabcd);
    let express = (0..48).map(|i| 0x40 + 4 * i).find(|at| read32(&mut client, CONFIG, *at) as u8 == 0x10).unwrap();
    client.region_write(CONFIG, express + 8, &0x8000u16.to_le_bytes()).unwrap();
    assert_eq!(read(&mut client, 0, ADDRESS), 0);
    assert_eq!(read32(&mut client, CONFIG, 4) & 0xffff, 0, "bus mastering is off after a reset");
    assert_eq!(setup.resets.load(Ordering::SeqCst), 0, "the driver's reset is not the machine's");
    write(&mut client, ADDRESS, 0xabcd);
    client.reset().unwrap();
    assert_eq!(read(&mut client, 0, ADDRESS), 0);
    assert_eq!(setup.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn the_next_client_finds_a_new_function_and_none_of_the_memory() {
    let setup = Setup::new();
    let ram = memfd(RAM);
    for _ in 0..3 {
        let mut client = setup.client();
        assert_eq!(read(&mut client, 0, ADDRESS), 0);
        assert_eq!(read32(&mut client, CONFIG, 4) & 0xffff, 0);
        enable(&mut client);
        assert_eq!(dma_read(&mut client, 0), u64::MAX);
        client.dma_map(0, 0, RAM, ram.as_raw_fd()).unwrap();
        assert_eq!(dma_read(&mut client, 0), 0);
        // It disconnects without a message.
    }
}

#[test]
fn a_model_that_panics_is_dead_until_it_is_reset() {
    let setup = Setup::new();
    let mut client = setup.client();
    write(&mut client, DO_PANIC, 0);
    assert_eq!(read(&mut client, 0, ADDRESS), u64::MAX);
    assert_eq!(read32(&mut client, CONFIG, 0), 0x1234_1b36);
    client.reset().unwrap();
    write(&mut client, ADDRESS, 5);
    assert_eq!(read(&mut client, 0, ADDRESS), 5);
}

#[test]
fn garbage_ends_at_most_its_own_connection() {
    let setup = Setup::new();
    let message = |command: u16, size: u32, body: &[u8]| {
        let mut bytes = vec![1, 0];
        bytes.extend(command.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes
    };
    let region_access = |region: u32, offset: u64, count: u32| {
        [&offset.to_le_bytes()[..], &region.to_le_bytes(), &count.to_le_bytes()].concat()
    };
    let garbage: Vec<Vec<u8>> = vec![
        vec![0xff; 3],
        vec![0xff; 4096],
        message(1, 0, &[0; 4]),
        message(1, 24, &[0, 0, 1, 0, b'{', b'{', b'{', b'{']),
        message(1, 22, &[0, 0, 1, 0, 0, 0]),
        message(99, 16, &[]),
        message(2, 48, &[0xff; 32]),
        message(3, 40, &[0xff; 24]),
        message(5, 48, &[0xff; 32]),
        message(7, 32, &[0xff; 16]),
        message(8, 36, &[0xff; 20]),
        message(9, 32, &region_access(0, u64::MAX, 8)),
        message(9, 32, &region_access(0, 0, 1 << 30)),
        message(9, 32, &region_access(CONFIG, u64::MAX, 8)),
        // As long as a reply can be; that much memory must not become resident, see below.
        message(9, 32, &region_access(CONFIG, 0, 0xffff_ffb0)),
        message(9, 32, &region_access(77, 0, 8)),
        message(10, 40, &[region_access(0, u64::MAX - 3, 8), vec![0; 8]].concat()),
        message(10, 40, &[region_access(CONFIG, u64::MAX - 3, 8), vec![0; 8]].concat()),
        message(10, 40, &[region_access(8, 0, 8), vec![0; 8]].concat()),
    ];
    for bytes in &garbage {
        let mut stream = UnixStream::connect(setup.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        // That a message is incomplete is known once the client cannot send more.
        stream.shutdown(Shutdown::Write).unwrap();
        let answer = stream.read(&mut [0; 64]).map_err(|error| error.kind());
        assert_ne!(answer, Err(ErrorKind::WouldBlock), "nothing comes of {bytes:x?}");
        drop(stream);
        let mut client = setup.client();
        assert_eq!(read32(&mut client, CONFIG, 0), 0x1234_1b36, "after {bytes:x?}");
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    let peak: u64 = peak.unwrap();
    assert!(peak < 1 << 20, "{peak} KiB were resident");
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.sock");
    let first = FunctionServer::bind(&path).unwrap();
    assert!(matches!(FunctionServer::bind(&path), Err(SocketError::InUse(_))));
    drop(first);
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(FunctionServer::bind(&path).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(FunctionServer::bind(&path), Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}
