//! An engine, its guest memory and its IOMMU.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio::*;
use viommu::devices::ioat;
use viommu::iommu::Request;
use viommu::pci::{Function, FunctionContext};
use viommu_testkit::engine::*;
use viommu_testkit::function::Served;
use viommu_testkit::memfd;
use viommu_trace::Tracer;
use viommu_wire::virtio_iommu::*;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{Immutable, IntoBytes};

pub const ENDPOINT: u32 = 0x30;
pub const RAM: u64 = 16 << 20;
/// The source and destination of long work.
pub const SOURCE: u64 = 0x100000;
pub const DESTINATION: u64 = 0x200000;
/// Where the tests have their descriptors, in guest memory.
pub const RING: u64 = 0x1000;
/// Where completions go.
pub const STATUS: u64 = 0x3000;
/// The largest transfer.
pub const LARGEST: u32 = 64 << 10;

/// The engine behind a socket, and an IOMMU that starts in bypass.
pub struct Setup {
    served: Served,
    pub ram: File,
}

impl Setup {
    pub fn new() -> Self {
        Setup::traced(Tracer::default())
    }

    pub fn traced(tracer: Tracer) -> Self {
        let make = |context: FunctionContext| -> Box<dyn Function> { ioat::make(context) };
        let served = Served::new(ENDPOINT, tracer, make, || ());
        served.iommu.set_features(u64::MAX);
        Setup { served, ram: memfd(RAM) }
    }

    pub fn engine(&self) -> Engine {
        Engine::new(self.served.client(), &self.ram, (RING, RING))
    }

    /// Does a request of the guest's IOMMU driver.
    pub fn request(&self, request: &(impl IntoBytes + Immutable)) {
        let bytes = [request.as_bytes(), &[0; 4]].concat();
        let request = Request::parse(&bytes, self.served.iommu.features()).unwrap();
        assert_eq!(self.served.iommu.execute(&request, &mut []).status, Status::Ok);
        self.served.iommu.synchronize();
    }

    pub fn attach(&self) {
        let head = Head { kind: request_type::ATTACH, ..Head::default() };
        self.request(&Attach { head, domain: 1.into(), endpoint: ENDPOINT.into(), ..Attach::default() });
    }

    pub fn map(&self, iova: u64, len: u64, gpa: u64, flags: MapFlags) {
        self.request(&Map {
            head: Head { kind: request_type::MAP, ..Head::default() },
            domain: 1.into(),
            virt_start: iova.into(),
            virt_end: (iova + len - 1).into(),
            phys_start: gpa.into(),
            flags: flags.bits().into(),
        });
    }

    pub fn unmap(&self, iova: u64, len: u64) {
        self.request(&Unmap {
            head: Head { kind: request_type::UNMAP, ..Head::default() },
            domain: 1.into(),
            virt_start: iova.into(),
            virt_end: (iova + len - 1).into(),
            reserved: [0; 4],
        });
    }

    /// Attaches the endpoint to a domain in which the first pages have their guest-physical addresses.
    pub fn attach_with_low_pages(&self) {
        self.attach();
        self.map(0, 0x10000, 0, MapFlags::READ | MapFlags::WRITE);
    }

    /// The faults for the driver: reason, whether it was a write, address.
    pub fn faults(&self) -> Vec<(u8, bool, u64)> {
        std::iter::from_fn(|| self.served.iommu.next_fault())
            .map(|fault| {
                assert_eq!(fault.endpoint.get(), ENDPOINT);
                let write = fault.flags.get() & FaultFlags::WRITE.bits() != 0;
                (fault.reason, write, fault.address.get())
            })
            .collect()
    }

    pub fn fill(&self, at: u64, len: u64, seed: u8) -> Vec<u8> {
        let data: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect();
        self.ram.write_all_at(&data, at).unwrap();
        data
    }

    pub fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.ram.read_exact_at(&mut data, at).unwrap();
        data
    }

    pub fn word(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at, 8).try_into().unwrap())
    }

    /// Makes a ring of `count` descriptors at RING; `make` returns the nth one.
    pub fn ring(&self, engine: &Engine, count: u64, make: impl Fn(u64) -> Descriptor) {
        for n in 0..count {
            let next = RING + (n + 1) % count * 64;
            engine.put(RING + n * 64, &Descriptor { next, ..make(n) });
        }
    }

    /// Work for seconds: one descriptor that is its own next one, 65,535 times.
    pub fn start_long_work(&self, engine: &mut Engine) {
        self.ring(engine, 1, |_| Descriptor {
            size: LARGEST,
            source: SOURCE,
            destination: DESTINATION,
            ..Descriptor::default()
        });
        engine.start(RING, u16::MAX);
    }
}

/// Gives the engine's only MSI-X vector an event descriptor.
pub fn interrupt(engine: &mut Engine) -> EventFd {
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    engine.client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, flags, 0, 1, &[event.as_raw_fd()]).unwrap();
    event
}

/// Waits for interrupts, and returns how many there were.
pub fn interrupts(event: &EventFd) -> u64 {
    let begun = Instant::now();
    loop {
        if let Ok(count) = event.read() {
            return count;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "No interrupt came");
        std::thread::sleep(Duration::from_millis(1));
    }
}
