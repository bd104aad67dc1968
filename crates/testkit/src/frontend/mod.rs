//! A driver's side: a vhost-user frontend, guest memory in a memfd, and [`virtqueue`]s with [`requests`] in it.

mod requests;
pub mod split;
mod virtqueue;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use viommu::dma::{Dma, DmaContext};
use viommu::iommu::{EndpointSettings, Iommu, Reserved, Settings};
use viommu::memory::{Memory, MemoryMap};
use viommu::vhost::{Control, Server, Shutdown};
use viommu_trace::Tracer;
use viommu_wire::virtio_iommu::*;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

pub use self::requests::*;
pub use self::virtqueue::*;
use crate::{PATIENCE, memfd, wait_until};

/// Bytes of guest memory, which begins at 0.
pub const RAM: u64 = 64 << 20;
/// The address that the driver claims for its own mapping of guest address 0.
pub const USER_BASE: u64 = 0x7f00_0000_0000;
/// An endpoint with an MSI region, as x86 has it.
pub const EP: u32 = 0x20;
/// Another one.
pub const EP2: u32 = 0x28;
/// An endpoint without reserved regions.
pub const BARE: u32 = 0x30;
/// An endpoint with an MSI region and [`HOLE`].
pub const HOLED: u32 = 0x38;
/// An id that the device does not manage.
pub const NOBODY: u32 = 0x444;

pub const MSI: Reserved = Reserved { kind: ResvMemKind::Msi, start: 0xfee0_0000, end: 0xfeef_ffff };
pub const HOLE: Reserved = Reserved { kind: ResvMemKind::Reserved, start: 0x8_0000, end: 0x8_ffff };

pub const EVENT_IDX: u64 = 1 << 29;
pub const IN_ORDER: u64 = 1 << 35;
pub const INDIRECT: u64 = 1 << 28;
pub const VERSION_1: u64 = 1 << 32;
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// The daemon, in this process but behind its socket.
pub struct Device {
    pub iommu: Arc<Iommu>,
    pub control: Control,
    pub path: PathBuf,
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
    _dir: TempDir,
}

impl Device {
    pub fn new() -> Device {
        Device::with(|_| {})
    }

    /// A device whose settings `change` changes.
    pub fn with(change: impl FnOnce(&mut Settings)) -> Device {
        Device::traced(change, Tracer::default())
    }

    /// A device whose settings `change` changes, and whose events go to `tracer`.
    pub fn traced(change: impl FnOnce(&mut Settings), tracer: Tracer) -> Device {
        let reserved = |id| match id {
            BARE => vec![],
            HOLED => vec![MSI, HOLE],
            _ => vec![MSI],
        };
        let endpoints = [EP, EP2, BARE, HOLED].map(|id| EndpointSettings { id, reserved: reserved(id) });
        let mut settings = Settings { endpoints: endpoints.into(), ..Settings::default() };
        change(&mut settings);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("viommu.sock");
        let iommu = Iommu::new(settings, tracer.clone());
        let mut server = Server::bind(&path, iommu.clone(), tracer).unwrap();
        let (control, shutdown) = (server.control(), server.shutdown());
        let thread = thread::spawn(move || server.run().unwrap());
        Device { iommu, control, path, shutdown, thread: Some(thread), _dir: dir }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shutdown.trigger();
        let ended = self.thread.take().unwrap().join();
        if !thread::panicking() {
            ended.unwrap();
        }
    }
}

/// A driver with its machine: frontend, memory and queues.
pub struct Driver {
    pub frontend: Frontend,
    pub ram: GuestMemoryAtomic<GuestMemoryMmap>,
    pub file: File,
    /// The same, as devices access it.
    pub memory: Memory,
    pub queues: [Queue; 2],
    pub offered: u64,
    accepted: u64,
    next_buffer: u64,
}

impl Driver {
    /// Connects, accepts all features and starts both queues.
    pub fn new(device: &Device) -> Driver {
        Driver::accepting(device, u64::MAX)
    }

    /// Connects, accepts those of the offered features that are in `features`, and starts both queues.
    pub fn accepting(device: &Device, features: u64) -> Driver {
        Driver::started(&device.path, features)
    }

    /// The same on the socket at `path`.
    pub fn started(path: &Path, features: u64) -> Driver {
        let mut driver = Driver::connect(path);
        driver.negotiate(features);
        driver.set_memory();
        driver.start_queue(REQUESTS, 0);
        driver.start_queue(EVENTS, 0);
        driver
    }

    /// Connects and gets the features, but does nothing else.
    pub fn connect(path: &Path) -> Driver {
        let mut frontend = Frontend::connect(path, 2).unwrap();
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_ne!(offered & PROTOCOL_FEATURES, 0);
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted =
            VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(protocol.contains(wanted), "{protocol:?}");
        frontend.set_protocol_features(wanted).unwrap();
        // From now on each message is acknowledged: an error is seen at once, and a setting is in effect when it is
        // acknowledged.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        let file = memfd(RAM);
        let mapping = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), RAM as usize, Some(mapping))];
        let ram = GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
        let mut map = MemoryMap::new(Memory::default());
        map.map(0, RAM, true, Some((file.try_clone().unwrap(), 0))).unwrap();
        let memory = map.memory().clone();
        let queues = QUEUE_BASES.map(Queue::new);
        Driver { frontend, ram, file, memory, queues, offered, accepted: 0, next_buffer: BUFFERS.start }
    }

    /// Accepts those of the offered features that are in `features`.
    pub fn negotiate(&mut self, features: u64) {
        self.accepted = self.offered & (features | PROTOCOL_FEATURES);
        self.frontend.set_features(self.accepted).unwrap();
    }

    /// The guest's memory, for other devices.
    pub fn file(&self) -> File {
        self.file.try_clone().unwrap()
    }

    /// Tells the device of the memory, in two regions as a machine with more than 2 GiB has them.
    pub fn set_memory(&mut self) {
        let region = |start: u64, len: u64| VhostUserMemoryRegionInfo {
            guest_phys_addr: start,
            memory_size: len,
            userspace_addr: USER_BASE + start,
            mmap_offset: start,
            mmap_handle: self.file.as_raw_fd(),
        };
        let half = RAM / 2;
        self.frontend.set_mem_table(&[region(0, half), region(half, RAM - half)]).unwrap();
    }

    /// Starts a queue as it is in memory, at the index `base` of its available ring.
    pub fn start_queue(&mut self, index: usize, base: u16) {
        self.set_up_queue(index, base).unwrap();
        let queue = &self.queues[index];
        self.frontend.set_vring_call(index, &queue.call).unwrap();
        self.frontend.set_vring_kick(index, &queue.kick).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    /// Sends the size, index and addresses of a queue.
    pub fn set_up_queue(&mut self, index: usize, base: u16) -> Result<(), vhost::Error> {
        let queue = &self.queues[index];
        self.frontend.set_vring_num(index, SIZE)?;
        self.frontend.set_vring_base(index, base)?;
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: USER_BASE + queue.descriptors,
            used_ring_addr: USER_BASE + queue.used,
            avail_ring_addr: USER_BASE + queue.available,
            log_addr: None,
        };
        self.frontend.set_vring_addr(index, &addresses)
    }

    /// Stops both queues, as a reset and a pause do, and returns where they stopped.
    pub fn stop_queues(&mut self) -> [u16; 2] {
        [REQUESTS, EVENTS].map(|index| self.frontend.get_vring_base(index).unwrap() as u16)
    }

    /// Starts both queues where they stopped, as the end of a pause does.
    pub fn resume_queues(&mut self, bases: [u16; 2]) {
        for (index, base) in bases.into_iter().enumerate() {
            self.start_queue(index, base);
        }
    }

    /// Stops both queues and starts them empty, as a driver does that resets the device.
    pub fn reset(&mut self) {
        self.stop_queues();
        self.start_over();
    }

    /// Starts both queues empty.
    pub fn start_over(&mut self) {
        self.clear_queues();
        self.resume_queues([0; 2]);
    }

    /// Replaces both queues by new ones, which are stopped.
    pub fn clear_queues(&mut self) {
        for (index, base) in QUEUE_BASES.into_iter().enumerate() {
            self.queues[index] = Queue::new(base);
            self.write(base, &[0; 0x4000]);
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.ram.memory().write_slice(data, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.memory().read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    pub fn read_u16(&self, address: u64) -> u16 {
        self.ram.memory().load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    pub fn write_u16(&self, address: u64, value: u16) {
        self.ram.memory().store(value, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Does one request, from chain to used entry.
    pub fn transact(&mut self, parts: &[Part]) -> Used {
        let (head, writable) = self.add(REQUESTS, parts);
        self.kick(REQUESTS);
        let (used, len) = self.wait_used(REQUESTS);
        assert_eq!(used, head);
        self.collect(len, &writable)
    }

    pub fn collect(&self, len: u32, writable: &[(u64, usize)]) -> Used {
        Used { len, written: writable.iter().flat_map(|&(address, len)| self.read(address, len)).collect() }
    }

    /// Does one request in the usual form.
    pub fn request(&mut self, request: &impl IntoBytesRequest) -> u8 {
        self.transact(&[Part::R(request.bytes()), Part::W(4)]).status()
    }

    pub fn attach(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.request(&attach(domain, endpoint, 0))
    }

    pub fn attach_bypass(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.request(&attach(domain, endpoint, ATTACH_F_BYPASS))
    }

    pub fn detach(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.request(&detach(domain, endpoint))
    }

    pub fn map(&mut self, domain: u32, start: u64, end: u64, phys: u64, flags: u32) -> u8 {
        self.request(&map(domain, start, end, phys, flags))
    }

    pub fn unmap(&mut self, domain: u32, start: u64, end: u64) -> u8 {
        self.request(&unmap(domain, start, end))
    }

    /// PROBE; the properties and the status.
    pub fn probe(&mut self, endpoint: u32) -> (Vec<u8>, u8) {
        let size = self.config().probe_size.get() as usize;
        let used = self.transact(&[Part::R(probe(endpoint).bytes()), Part::W(size), Part::W(4)]);
        let status = used.status();
        (used.written[..size].to_vec(), status)
    }

    pub fn config(&mut self) -> Config {
        let (_, data) = self.frontend.get_config(0, 40, VhostUserConfigFlags::WRITABLE, &[0; 40]).unwrap();
        Config::read_from_bytes(&data).unwrap()
    }

    /// Writes the whole configuration, as QEMU does for a write of one byte.
    pub fn write_config(&mut self, config: &Config) {
        self.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, config.as_bytes()).unwrap();
    }

    pub fn write_bypass(&mut self, bypass: u8) {
        let config = Config { bypass, ..self.config() };
        self.write_config(&config);
    }

    /// An endpoint's access to this driver's memory.
    pub fn dma(&self, device: &Device, endpoint: u32) -> Dma {
        let dma = DmaContext::new(&device.iommu, endpoint, self.memory.clone(), Tracer::default());
        dma.set_bus_master(true);
        dma.open()
    }

    /// Adds buffers to the event queue, as Linux does once.
    pub fn add_event_buffers(&mut self, count: usize, len: usize) -> Vec<(u64, usize)> {
        (0..count).flat_map(|_| self.add(EVENTS, &[Part::W(len)]).1).collect()
    }

    /// Waits for the next fault, which must be in `buffer`.
    pub fn wait_fault(&mut self, buffer: (u64, usize)) -> FaultRecord {
        let (_, len) = self.wait_used(EVENTS);
        assert_eq!(len, 24);
        FaultRecord::read_from_prefix(&self.read(buffer.0, buffer.1)).unwrap().0
    }
}

/// Waits until the device has seen `kicks` kicks and no longer looks into the queue. A request may be answered before
/// its kick is seen, if the device found it when the queue was enabled or after its last batch.
pub fn wait_for_kicks(device: &Device, driver: &Driver, kicks: u64) {
    wait_until(PATIENCE, "the kick", || device.control.stats().kicks == kicks);
    driver.wait_until_idle(EVENTS);
}
