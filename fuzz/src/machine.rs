//! A small machine for a device model: memory, an IOMMU, and a driver's mappings in it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use viommu::dma::DmaContext;
use viommu::iommu::{EndpointSettings, Iommu, Request, Settings};
use viommu::memory::{Memory, MemoryMap};
use viommu::pci::{FunctionContext, Interrupts};
use viommu_trace::Tracer;
use viommu_wire::virtio_iommu::{Attach, Head, Map, MapFlags, Unmap, request_type};
use zerocopy::IntoBytes;

use crate::{Input, memfd};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Pages of guest memory. All except the last two are mapped, each at its own address, and the two before those for
/// reading only.
pub const PAGES: u64 = 32;
const READ_ONLY: u64 = PAGES - 4;
const UNMAPPED: u64 = PAGES - 2;

const ENDPOINT: u32 = 0x20;
const DOMAIN: u32 = 1;
/// The contents of memory that no device may write.
const GUARD: u8 = 0xa5;

/// Memory from address 0 on, and an endpoint that may use a part of it.
pub struct Machine {
    iommu: Arc<Iommu>,
    ram: File,
    _map: MemoryMap,
    pub context: FunctionContext,
}

impl Machine {
    #[allow(clippy::new_without_default, reason = "one is not like the other: it is a machine")]
    pub fn new() -> Self {
        let endpoints = vec![EndpointSettings { id: ENDPOINT, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
        iommu.set_features(u64::MAX);
        let ram = memfd(PAGES * PAGE);
        let mut map = MemoryMap::new(Memory::default());
        map.map(0, PAGES * PAGE, true, Some((ram.try_clone().unwrap(), 0))).unwrap();
        let dma = DmaContext::new(&iommu, ENDPOINT, map.memory().clone(), Tracer::default());
        dma.set_bus_master(true);
        let context =
            FunctionContext { dma, interrupts: Interrupts::default(), tracer: Tracer::default(), poller: None };
        let machine = Machine { iommu, ram, _map: map, context };
        let head = Head { kind: request_type::ATTACH, reserved: [0; 3] };
        let (domain, endpoint) = (DOMAIN.into(), ENDPOINT.into());
        machine.request(Attach { head, domain, endpoint, ..Attach::default() }.as_bytes());
        machine.map(0, READ_ONLY, MapFlags::READ | MapFlags::WRITE);
        machine.map(READ_ONLY, UNMAPPED, MapFlags::READ);
        machine.fill(READ_ONLY);
        machine
    }

    fn request(&self, bytes: &[u8]) {
        let request = Request::parse(bytes, self.iommu.features()).unwrap();
        self.iommu.execute(&request, &mut []);
        self.iommu.synchronize();
    }

    fn map(&self, first: u64, end: u64, flags: MapFlags) {
        let head = Head { kind: request_type::MAP, reserved: [0; 3] };
        let (virt_start, virt_end) = ((first * PAGE).into(), (end * PAGE - 1).into());
        let flags = flags.bits().into();
        self.request(
            Map { head, domain: DOMAIN.into(), virt_start, virt_end, phys_start: virt_start, flags }.as_bytes(),
        );
    }

    /// Removes all mappings. When this returns, nothing is written any more.
    pub fn unmap_all(&self) {
        let head = Head { kind: request_type::UNMAP, reserved: [0; 3] };
        let virt_end = u64::MAX.into();
        self.request(Unmap { head, domain: DOMAIN.into(), virt_end, ..Unmap::default() }.as_bytes());
        self.fill(0);
    }

    /// Fills the pages from `first` on.
    fn fill(&self, first: u64) {
        let bytes = vec![GUARD; ((PAGES - first) * PAGE) as usize];
        self.ram.write_all_at(&bytes, first * PAGE).unwrap();
    }

    /// Checks that nothing was written to the pages from `first` on.
    fn check_from(&self, first: u64) {
        let mut bytes = vec![0; ((PAGES - first) * PAGE) as usize];
        self.ram.read_exact_at(&mut bytes, first * PAGE).unwrap();
        let wrong = bytes.iter().position(|byte| *byte != GUARD);
        assert_eq!(wrong.map(|at| first * PAGE + at as u64), None, "written without a mapping");
    }

    /// Checks that memory that the device may not write is unchanged.
    pub fn check_guards(&self) {
        self.check_from(READ_ONLY);
    }

    /// Checks that nothing was written since [`Machine::unmap_all`].
    pub fn check_unmapped(&self) {
        self.check_from(0);
    }

    /// A write of the driver. Bytes outside of the memory that the device may write are left out.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        if at.checked_add(bytes.len() as u64).is_some_and(|end| end <= READ_ONLY * PAGE) {
            self.ram.write_all_at(bytes, at).unwrap();
        }
    }

    /// An address: mostly one in an existing page, sometimes any.
    pub fn address(input: &mut Input) -> Option<u64> {
        let page = input.u8()?;
        if page == 0xff {
            return input.u64();
        }
        let offset = input.u8()?;
        // Mostly aligned.
        let offset = if offset & 1 == 0 { u64::from(offset & 0xe0) << 4 } else { u64::from(offset) << 4 };
        Some(u64::from(page) % PAGES * PAGE + (offset & (PAGE - 1)))
    }
}
