//! The DMA engine over a real vfio-user socket, with the vfio_user crate's client in QEMU's place, and a real IOMMU.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/engine.rs"]
mod engine;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::memfd;
use engine::*;
use tempfile::TempDir;
use vfio_bindings::bindings::vfio::*;
use vfio_user::Client;
use viommu::devices::ioat::Ioat;

use viommu::iommu::{EndpointSettings, Iommu, Request, Settings};
use viommu::pci::{Bus, Function, Server, Slot};
use viommu::trace::event::{Access, DataPointer, Model, Route};
use viommu::trace::{self, Choice, Event, Options, Reader, Tracer};
use viommu::wire::trace::Kind;
use viommu::wire::virtio_iommu::*;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{Immutable, IntoBytes};

const ENDPOINT: u32 = 0x30;
const RAM: u64 = 16 << 20;
/// Where the tests have their descriptors, in guest memory.
const RING: u64 = 0x1000;
/// Where completions go.
const STATUS: u64 = 0x3000;
/// The largest transfer.
const LARGEST: u32 = 64 << 10;

/// The engine behind a socket, and an IOMMU that starts in bypass.
struct Setup {
    iommu: Arc<Iommu>,
    ram: File,
    dir: TempDir,
    shutdown: EventFd,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Setup {
    fn new() -> Self {
        Setup::with(Tracer::default())
    }

    fn with(tracer: Tracer) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let endpoints = vec![EndpointSettings { id: ENDPOINT, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, tracer.clone());
        iommu.set_features(u64::MAX);
        let shutdown = EventFd::new(0).unwrap();
        let server = Server::bind(&dir.path().join("ioat.sock")).unwrap();
        let slot = Slot::new(&iommu, ENDPOINT, tracer);
        let stop = shutdown.try_clone().unwrap();
        let make = |bus: Bus| -> Box<dyn Function> { Box::new(Ioat::new(bus)) };
        let thread = std::thread::spawn(move || server.serve(&slot, &stop, make, || ()));
        Setup { iommu, ram: memfd(RAM), dir, shutdown, thread: Some(thread) }
    }

    fn engine(&self) -> Engine {
        let client = Client::new(&self.dir.path().join("ioat.sock")).unwrap();
        Engine::new(client, &self.ram, (RING, RING))
    }

    /// Does a request of the guest's IOMMU driver.
    fn request(&self, request: &(impl IntoBytes + Immutable)) {
        let bytes = [request.as_bytes(), &[0; 4]].concat();
        let request = Request::parse(&bytes, self.iommu.features()).unwrap();
        assert_eq!(self.iommu.execute(&request, &mut []).status, Status::Ok);
        self.iommu.settle();
    }

    fn attach(&self) {
        let head = Head { kind: request_type::ATTACH, ..Head::default() };
        self.request(&Attach { head, domain: 1.into(), endpoint: ENDPOINT.into(), ..Attach::default() });
    }

    fn map(&self, iova: u64, len: u64, gpa: u64, flags: MapFlags) {
        self.request(&Map {
            head: Head { kind: request_type::MAP, ..Head::default() },
            domain: 1.into(),
            virt_start: iova.into(),
            virt_end: (iova + len - 1).into(),
            phys_start: gpa.into(),
            flags: flags.bits().into(),
        });
    }

    fn unmap(&self, iova: u64, len: u64) {
        self.request(&Unmap {
            head: Head { kind: request_type::UNMAP, ..Head::default() },
            domain: 1.into(),
            virt_start: iova.into(),
            virt_end: (iova + len - 1).into(),
            reserved: [0; 4],
        });
    }

    /// Attaches the endpoint to a domain where the first pages are where they are in guest memory.
    fn attach_with_low_pages(&self) {
        self.attach();
        self.map(0, 0x10000, 0, MapFlags::READ | MapFlags::WRITE);
    }

    /// The faults that the driver would be told: reason, whether it was a write, address.
    fn faults(&self) -> Vec<(u8, bool, u64)> {
        std::iter::from_fn(|| self.iommu.next_fault())
            .map(|fault| {
                assert_eq!(fault.endpoint.get(), ENDPOINT);
                let write = fault.flags.get() & FaultFlags::WRITE.bits() != 0;
                (fault.reason, write, fault.address.get())
            })
            .collect()
    }

    fn fill(&self, at: u64, len: u64, seed: u8) -> Vec<u8> {
        let data: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect();
        self.ram.write_all_at(&data, at).unwrap();
        data
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.ram.read_exact_at(&mut data, at).unwrap();
        data
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at, 8).try_into().unwrap())
    }

    /// A ring of `count` descriptors at RING; `make` says what the nth does.
    fn ring(&self, engine: &Engine, count: u64, make: impl Fn(u64) -> Descriptor) {
        for n in 0..count {
            let next = RING + (n + 1) % count * 64;
            engine.put(RING + n * 64, &Descriptor { next, ..make(n) });
        }
    }

    /// Work for seconds: one descriptor that is its own next one, 65,535 times.
    fn start_long_work(&self, engine: &mut Engine) {
        self.ring(engine, 1, |_| Descriptor {
            size: LARGEST,
            source: 0x100000,
            destination: 0x200000,
            ..Descriptor::default()
        });
        engine.start(RING, u16::MAX);
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        self.shutdown.write(1).unwrap();
        let result = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            result.unwrap().unwrap();
        }
    }
}

/// Gives the engine's only MSI-X vector an event descriptor.
fn interrupt(engine: &mut Engine) -> EventFd {
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    engine.client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, flags, 0, 1, &[event.as_raw_fd()]).unwrap();
    event
}

/// Waits for interrupts; how many there were.
fn interrupts(event: &EventFd) -> u64 {
    let begun = Instant::now();
    loop {
        if let Ok(count) = event.read() {
            return count;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "No interrupt came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn it_is_what_drivers_look_for() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let mut config = [0; 16];
    engine.client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut config).unwrap();
    assert_eq!(config[..4], [0x86, 0x80, 0x21, 0x20]);
    assert_eq!(config[9..12], [0x00, 0x80, 0x08]);
    assert_eq!(engine.client.region(0).unwrap().size, 0x4000);
    assert_eq!(engine.client.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).unwrap().count, 1);
    for offset in [0x148, 0x180, 0x184] {
        let mut value = [0xff; 4];
        engine.client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, offset, &mut value).unwrap();
        assert_eq!(value, [0; 4]);
    }
    assert_eq!(engine.read8(0), 1);
    assert_eq!(engine.read8(register::XFERCAP), 16);
    assert_eq!(engine.read8(register::VERSION), 0x33);
    assert_eq!(engine.read32(register::DMA_CAP), 0);
    assert_eq!(engine.status(), HALTED);
    assert_eq!(engine.read::<8>(0x3ff8), [0; 8]);
    engine.write(0x3ff8, &[0xff; 8]);
}

#[test]
fn registers_can_be_accessed_in_parts() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    engine.write(register::CHANCMP, &0x5555_5000u32.to_le_bytes());
    engine.write(register::CHANCMP + 4, &0x1234u32.to_le_bytes());
    assert_eq!(engine.read64(register::CHANCMP), 0x1234_5555_5000);
    assert_eq!(engine.read32(register::CHANCMP + 4), 0x1234);
    engine.write(register::CHANERR_MASK, &0x3_0000u32.to_le_bytes());
    engine.write(register::CHANERR_MASK, &[0x0f]);
    assert_eq!(engine.read32(register::CHANERR_MASK), 0x3_000f);
    // All of the channel's first quadword at once: control, no command, count.
    engine.write(register::CHAINADDR, &RING.to_le_bytes());
    setup.ring(&engine, 1, |_| Descriptor { control: NULL, size: 1, ..Descriptor::default() });
    engine.write(register::CHANCTRL, &[0x10, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(engine.read::<8>(register::CHANCTRL), [0x10, 0, 2, 0, 0, 0, 1, 0]);
}

#[test]
fn memory_is_copied() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    for (source, destination, len) in [
        (0x100000, 0x200000, LARGEST),
        (0x100001, 0x210003, 4097),
        (0x100fff, 0x220fff, 2),
        (0x103000, 0x230000, 1),
        (0x108000, 0x240ff0, 65535),
    ] {
        let data = setup.fill(source, len.into(), len as u8);
        setup.fill(destination + u64::from(len), 16, 0xaa);
        let behind = setup.bytes(destination + u64::from(len), 16);
        assert_eq!(engine.copy(source, destination, len), Ok(()));
        assert_eq!(setup.bytes(destination, len.into()), data);
        assert_eq!(setup.bytes(destination + u64::from(len), 16), behind);
    }
    assert!(setup.faults().is_empty());
}

#[test]
fn a_chain_gathers_and_goes_on_where_it_ended() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    // Eight pieces, taken from last to first.
    let data = setup.fill(0x100000, 8 * 0x1000, 7);
    setup.ring(&engine, 8, |n| Descriptor {
        size: 0x1000,
        source: 0x100000 + (7 - n) * 0x1000,
        destination: 0x200000 + n * 0x1000,
        ..Descriptor::default()
    });
    engine.start(RING, 3);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(engine.status(), (RING + 2 * 64) | DONE);
    assert_eq!(setup.bytes(0x203000, 0x5000), [0; 0x5000]);
    // The count is that of all descriptors since the chain began.
    engine.ready(8);
    assert_eq!(engine.wait(), Ok(()));
    let expected: Vec<u8> = data.chunks(0x1000).rev().flatten().copied().collect();
    assert_eq!(setup.bytes(0x200000, 0x8000), expected);
    // Past 65,535 it wraps.
    engine.ready(u16::MAX);
    assert_eq!(engine.wait(), Ok(()));
    setup.ring(&engine, 8, |n| Descriptor {
        size: 4,
        source: 0x300000 + n * 4,
        destination: 0x400000 + n * 4,
        ..Descriptor::default()
    });
    setup.fill(0x300000, 32, 9);
    engine.ready(2);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(setup.bytes(0x40001c, 4), setup.bytes(0x30001c, 4));
    assert_eq!(setup.bytes(0x400000, 8), setup.bytes(0x300000, 8));
    assert_eq!(setup.bytes(0x400008, 20), [0; 20]);
}

/// What Linux's `ioatdma` does when it binds: `ioat_alloc_chan_resources` and `ioat_dma_self_test`.
#[test]
fn it_does_what_the_linux_driver_expects() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let event = interrupt(&mut engine);
    engine.write(register::INTRCTRL, &[0x09]);
    engine.write(register::CHANCTRL, &0x1du16.to_le_bytes());
    engine.write(register::CHANCMP, &(STATUS as u32).to_le_bytes());
    engine.write(register::CHANCMP + 4, &0u32.to_le_bytes());
    let data = setup.fill(0x100000, 2000, 3);
    setup.ring(&engine, 4, |n| match n {
        0 => Descriptor { size: 1, control: NULL | INTERRUPT | COMPLETION, ..Descriptor::default() },
        _ => Descriptor {
            size: 2000,
            control: INTERRUPT | COMPLETION,
            source: 0x100000,
            destination: 0x200000,
            ..Descriptor::default()
        },
    });
    engine.write(register::CHAINADDR, &(RING as u32).to_le_bytes());
    engine.write(register::CHAINADDR + 4, &0u32.to_le_bytes());
    engine.ready(1);
    assert!([ACTIVE, DONE].contains(&(engine.status() & 7)));
    assert_eq!(interrupts(&event), 1);
    assert_eq!(setup.word(STATUS), RING | DONE);
    engine.write(register::CHANCTRL, &0x1du16.to_le_bytes());
    engine.ready(2);
    assert_eq!(interrupts(&event), 1);
    assert_eq!(setup.word(STATUS), (RING + 64) | DONE);
    assert_eq!(setup.bytes(0x200000, 2000), data);
    // `ioat_reset_hw`.
    engine.command(SUSPEND);
    assert_eq!(engine.status() & 7, SUSPENDED);
    engine.reset_channel();
    assert_eq!(engine.status(), HALTED);
}

#[test]
fn one_interrupt_is_sent_for_each_arming() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let event = interrupt(&mut engine);
    setup.ring(&engine, 1, |_| Descriptor { size: 1, control: NULL | INTERRUPT, ..Descriptor::default() });
    engine.start(RING, 3);
    assert_eq!(engine.wait(), Ok(()));
    assert!(event.read().is_err(), "INTRCTRL is zero");
    engine.write(register::INTRCTRL, &[0x08]);
    assert_eq!(interrupts(&event), 1);
    assert_eq!(engine.read32(register::CHANCTRL) & 1, 1);
    engine.ready(5);
    assert_eq!(engine.wait(), Ok(()));
    assert!(event.read().is_err(), "the interrupt was not armed");
    engine.write(register::CHANCTRL, &[1, 0]);
    assert_eq!(interrupts(&event), 1);
    engine.write(register::CHANCTRL, &[1, 0]);
    assert!(event.read().is_err());
}

/// `ioat_dma_do_interrupt`, the handler that serves all channels.
#[test]
fn a_common_handler_finds_the_channel() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let event = interrupt(&mut engine);
    engine.write(register::INTRCTRL, &[0x01]);
    setup.ring(&engine, 1, |_| Descriptor { size: 1, control: NULL | INTERRUPT, ..Descriptor::default() });
    engine.start(RING, 1);
    assert_eq!(interrupts(&event), 1);
    assert_eq!(engine.read8(register::INTRCTRL), 0x07);
    assert_eq!(engine.read32(register::ATTNSTATUS), 1);
    assert_eq!(engine.read32(register::ATTNSTATUS), 0);
    engine.write(register::INTRCTRL, &[0x07]);
    assert_eq!(engine.read8(register::INTRCTRL), 0x01);
}

#[test]
fn copies_go_through_the_iommu() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach();
    assert_eq!(engine.copy(0, 0, 1), Err(chanerr::CHAIN));
    assert_eq!(setup.faults(), [(FaultReason::Mapping as u8, false, RING)]);
    let (descriptor, source, destination) = (0x7000_0000_0000, 0xffff_f000, 1 << 63);
    engine.descriptor.1 = descriptor;
    setup.map(descriptor, 0x1000, RING, MapFlags::READ);
    // Two pages that do not lie one behind the other in guest memory.
    setup.map(source, 0x1000, 0x500000, MapFlags::READ);
    setup.map(source + 0x1000, 0x1000, 0x400000, MapFlags::READ);
    setup.map(destination, 0x2000, 0x600000, MapFlags::WRITE);
    let first = setup.fill(0x500000, 0x1000, 1);
    let second = setup.fill(0x400000, 0x1000, 2);
    assert_eq!(engine.copy(source, destination, 0x2000), Ok(()));
    assert_eq!(setup.bytes(0x600000, 0x2000), [first, second].concat());
    // Neither the wrong direction nor anything that is not there any more.
    assert_eq!(engine.copy(destination, destination, 8), Err(chanerr::SOURCE));
    assert_eq!(engine.copy(source, source + 8, 8), Err(chanerr::DESTINATION));
    setup.unmap(destination, 0x2000);
    assert_eq!(engine.copy(source, destination, 8), Err(chanerr::DESTINATION));
    let mapping = FaultReason::Mapping as u8;
    let expected = [(mapping, false, destination), (mapping, true, source + 8), (mapping, true, destination)];
    assert_eq!(setup.faults(), expected);
}

#[test]
fn what_lies_before_the_first_bad_address_is_copied() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    let rw = MapFlags::READ | MapFlags::WRITE;
    setup.map(0x100000, 0x3000, 0x100000, rw);
    setup.map(0x200000, 0x10000, 0x200000, rw);
    setup.map(0x300000, 0x1000, 0x300000, rw);
    let data = setup.fill(0x100000, 0x3000, 5);
    assert_eq!(engine.copy(0x100010, 0x200000, 0x8000), Err(chanerr::SOURCE));
    assert_eq!(setup.bytes(0x200000, 0x2ff0), data[0x10..]);
    assert_eq!(setup.bytes(0x202ff0, 0x1000), [0; 0x1000]);
    assert_eq!(engine.copy(0x100000, 0x300800, 0x2000), Err(chanerr::DESTINATION));
    assert_eq!(setup.bytes(0x300800, 0x800), data[..0x800]);
    assert_eq!(setup.bytes(0x301000, 0x1000), [0; 0x1000]);
    let mapping = FaultReason::Mapping as u8;
    assert_eq!(setup.faults(), [(mapping, false, 0x103000), (mapping, true, 0x301000)]);
}

#[test]
fn each_kind_of_error_halts_with_its_bit() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    let bad = 0x8000_0000u64;
    let good = Descriptor { size: 64, source: 0x8000, destination: 0x9000, next: RING, ..Descriptor::default() };
    let cases = [
        ("source", chanerr::SOURCE, Descriptor { source: bad, ..good }, 1),
        ("destination", chanerr::DESTINATION, Descriptor { destination: bad, ..good }, 1),
        ("next", chanerr::NEXT, Descriptor { next: bad, ..good }, 2),
        ("alignment of next", chanerr::NEXT_ALIGNMENT, Descriptor { next: RING + 32, ..good }, 2),
        ("operation", chanerr::CONTROL, Descriptor { control: 0x87 << 24, ..good }, 1),
        ("page break", chanerr::CONTROL, Descriptor { control: 1 << 6, ..good }, 1),
        ("no length", chanerr::LENGTH, Descriptor { size: 0, ..good }, 1),
        ("length", chanerr::LENGTH, Descriptor { size: LARGEST + 1, ..good }, 1),
        ("all ones", chanerr::LENGTH, Descriptor { size: u32::MAX, ..good }, 1),
        ("completion", chanerr::COMPLETION, Descriptor { control: COMPLETION, ..good }, 1),
    ];
    for (what, errors, descriptor, count) in cases {
        engine.put(RING, &descriptor);
        engine.write(register::CHANCMP, &bad.to_le_bytes());
        engine.start(RING, count);
        assert_eq!(engine.wait(), Err(errors), "{what}");
        let faults = setup.faults();
        let faulted = errors & (chanerr::CONTROL | chanerr::LENGTH | chanerr::NEXT_ALIGNMENT) == 0;
        let write = matches!(errors, chanerr::DESTINATION | chanerr::COMPLETION);
        let expected = [(FaultReason::Mapping as u8, write, bad)];
        assert_eq!(faults, if faulted { &expected[..] } else { &[] }, "{what}");
        // And it can go on.
        assert_eq!(engine.copy(0x8000, 0x9000, 64), Ok(()), "{what}");
    }
    for address in [RING + 8, bad, u64::MAX - 63] {
        engine.start(address, 1);
        assert_eq!(engine.wait(), Err(chanerr::CHAIN), "{address:#x}");
    }
    engine.command(0x01);
    assert_eq!(engine.wait(), Err(chanerr::COMMAND));
    // The address is translated, but there is no memory.
    setup.map(1 << 40, 0x1000, 1 << 40, MapFlags::READ | MapFlags::WRITE);
    setup.faults();
    assert_eq!(engine.copy(1 << 40, 0x9000, 64), Err(chanerr::SOURCE));
    assert_eq!(engine.copy(0x8000, 1 << 40, 64), Err(chanerr::DESTINATION));
    assert!(setup.faults().is_empty());
}

#[test]
fn without_bus_mastering_nothing_is_accessed() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    engine.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[2, 0]).unwrap();
    assert_eq!(engine.copy(0x100000, 0x200000, 64), Err(chanerr::CHAIN));
    engine.enable();
    assert_eq!(engine.copy(0x100000, 0x200000, 64), Ok(()));
}

#[test]
fn an_error_is_completed_and_interrupts_as_chanctrl_says() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    let event = interrupt(&mut engine);
    engine.write(register::INTRCTRL, &[0x08]);
    setup.ring(&engine, 2, |n| Descriptor {
        size: 64,
        control: COMPLETION,
        source: [0x8000, 0x8000_0000][n as usize],
        destination: 0x9000,
        ..Descriptor::default()
    });
    // Neither, the completion, the interrupt, and an interrupt that CHANERRMSK masks.
    for (control, mask, value, sent) in
        [(0x01, 0, RING, 0), (0x05, 0, RING | HALTED, 0), (0x11, 0, RING, 1), (0x11, chanerr::SOURCE, RING, 0)]
    {
        engine.write(register::CHANCMP, &STATUS.to_le_bytes());
        engine.write(register::CHANCTRL, &[control, 0]);
        engine.write(register::CHANERR_MASK, &mask.to_le_bytes());
        engine.start(RING, 2);
        engine.wait_while(ACTIVE);
        assert_eq!(engine.status(), RING | HALTED);
        assert_eq!(setup.word(STATUS), value);
        assert_eq!(event.read().unwrap_or(0), sent);
        // A halted channel does nothing until CHANERR is cleared.
        engine.ready(3);
        assert_eq!(engine.status(), RING | HALTED);
        assert_eq!(engine.wait(), Err(chanerr::SOURCE));
    }
}

#[test]
fn a_cleared_error_can_be_tried_again_without_a_reset() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    setup.fill(0x400000, 64, 8);
    setup.ring(&engine, 1, |_| Descriptor { size: 64, source: 0x400000, destination: 0x9000, ..Descriptor::default() });
    engine.start(RING, 1);
    assert_eq!(engine.wait_while(ACTIVE), HALTED);
    setup.map(0x400000, 0x1000, 0x400000, MapFlags::READ);
    engine.write(register::CHANERR, &u32::MAX.to_le_bytes());
    assert_eq!(engine.read32(register::CHANERR), 0);
    engine.ready(1);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(setup.bytes(0x9000, 64), setup.bytes(0x400000, 64));
}

/// What the kernel's VFIO selftests do in `memcpy_storm`, with less to copy.
#[test]
fn a_descriptor_that_is_its_own_next_runs_65535_times() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let data = setup.fill(0x100000, 256, 4);
    setup.ring(&engine, 1, |_| Descriptor {
        size: 256,
        source: 0x100000,
        destination: 0x200000,
        ..Descriptor::default()
    });
    for _ in 0..2 {
        engine.start(RING, u16::MAX);
        assert_eq!(engine.wait(), Ok(()));
        assert_eq!(setup.bytes(0x200000, 256), data);
        engine.command(SUSPEND);
        assert_eq!(engine.wait_while(DONE), SUSPENDED);
    }
}

/// Whether the engine writes: its source is changed, and the destination looked at.
fn is_copying(setup: &Setup, wait: Duration) -> bool {
    let marker = [setup.bytes(0x200000, 1)[0].wrapping_add(1)];
    setup.ram.write_all_at(&marker, 0x100000).unwrap();
    let begun = Instant::now();
    while setup.bytes(0x200000, 1) != marker {
        if begun.elapsed() > wait {
            return false;
        }
    }
    true
}

const SOON: Duration = Duration::from_secs(10);
const A_WHILE: Duration = Duration::from_millis(50);

#[test]
fn suspended_work_stops_and_goes_on() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.start_long_work(&mut engine);
    for _ in 0..5 {
        assert!(is_copying(&setup, SOON));
        engine.command(SUSPEND);
        assert_eq!(engine.wait_while(ACTIVE), SUSPENDED);
        assert!(!is_copying(&setup, A_WHILE));
        engine.command(RESUME);
    }
    assert!(is_copying(&setup, SOON));
    engine.command(SUSPEND);
    engine.wait_while(ACTIVE);
    engine.ready(u16::MAX);
    assert!(is_copying(&setup, SOON));
}

#[test]
fn a_reset_ends_work_for_good() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let resets: [fn(&mut Engine); 3] = [
        Engine::reset_channel,
        |engine| engine.client.reset().unwrap(),
        |engine| {
            // Initiate Function Level Reset, in the PCI Express capability.
            engine.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 0x78, &[0x10, 0x88]).unwrap();
        },
    ];
    for reset in resets.iter().cycle().take(12) {
        engine.enable();
        setup.start_long_work(&mut engine);
        assert!(is_copying(&setup, SOON));
        reset(&mut engine);
        // Bus mastering is off after a reset of the function; with it on, an access would be seen.
        engine.enable();
        assert!(!is_copying(&setup, A_WHILE));
        assert_eq!(engine.status(), HALTED);
    }
}

#[test]
fn no_interrupt_of_before_comes_after_a_reset() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.ring(&engine, 1, |_| Descriptor { size: 1, control: NULL | INTERRUPT, ..Descriptor::default() });
    for _ in 0..200 {
        let event = interrupt(&mut engine);
        engine.enable();
        engine.write(register::INTRCTRL, &[0x08]);
        engine.write(register::CHANCTRL, &[1, 0]);
        engine.start(RING, 100);
        engine.client.reset().unwrap();
        let _ = event.read();
        engine.write(register::INTRCTRL, &[0x08]);
        engine.write(register::CHANCTRL, &[1, 0]);
        assert!(event.read().is_err());
    }
}

#[test]
fn a_client_that_leaves_takes_its_work_with_it() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.start_long_work(&mut engine);
    assert!(is_copying(&setup, SOON));
    drop(engine);
    let mut engine = setup.engine();
    assert!(!is_copying(&setup, A_WHILE));
    assert_eq!(engine.copy(0x100000, 0x200000, 64), Ok(()));
}

#[test]
fn descriptors_accesses_and_states_are_traced() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("trace.sock");
    let (tracer, handle) = trace::start(Options { socket: Some(socket.clone()), ..Options::default() }).unwrap();
    let setup = Setup::with(tracer);
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    let kinds = vec![Kind::Command, Kind::Device, Kind::Dma, Kind::Fault];
    let mut reader = Reader::connect(&socket, &Choice { kinds, ..Choice::default() }).unwrap();
    assert_eq!(engine.copy(0x8000, 0x9000, 0x1000), Ok(()));
    assert_eq!(engine.copy(0x8000, 0x8000_0000, 8), Err(chanerr::DESTINATION));
    handle.stop();

    let access = |access, iova, len| {
        let route = Route::Mapped;
        Event::Dma { endpoint: ENDPOINT, access, route, failed: false, iova, gpa: iova, len, domain: 1, tag: 0 }
    };
    let command = |status, data, len| Event::Command {
        endpoint: ENDPOINT,
        model: Model::Ioat,
        opcode: 0,
        queue: 0,
        id: 0,
        status,
        pointer: DataPointer::Address,
        address: 0x8000,
        data,
        len,
        duration: 0,
    };
    let state = |state| Event::Device { endpoint: ENDPOINT, model: Model::Ioat, state };
    let fault = Event::Fault {
        endpoint: ENDPOINT,
        reason: FaultReason::Mapping as u8,
        access: Access::Write,
        address: 0x8000_0000,
        domain: Some(1),
        dropped: false,
    };
    let expected = [
        state(ACTIVE),
        access(Access::Read, RING, 64),
        access(Access::Read, 0x8000, 0x1000),
        access(Access::Write, 0x9000, 0x1000),
        command(0, 0x9000, 0x1000),
        access(Access::Read, RING, 64),
        access(Access::Read, 0x8000, 8),
        fault,
        command(chanerr::DESTINATION as u16, 0x8000_0000, 8),
        state(u64::from(chanerr::DESTINATION) << 32 | HALTED),
        state(HALTED),
    ];
    let events: Vec<Event> = std::iter::from_fn(|| reader.next_record().unwrap())
        .map(|record| match Event::decode(&record).unwrap() {
            // However long it took.
            Event::Command { endpoint, model, opcode, queue, id, status, pointer, address, data, len, duration } => {
                assert!(duration > 0);
                Event::Command { endpoint, model, opcode, queue, id, status, pointer, address, data, len, duration: 0 }
            }
            event => event,
        })
        .collect();
    assert_eq!(events, expected);
}
