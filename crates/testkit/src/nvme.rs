//! A small NVMe driver over a vfio-user socket, and a server for it to drive.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tempfile::TempDir;
use vfio_bindings::bindings::vfio::*;
use vfio_user::Client;
use viommu::devices::nvme::{Disk, Nvme, NvmeConfig};
use viommu::iommu::Iommu;
use viommu::pci::{Function, FunctionContext};
use viommu::poller::QueuePoller;
use viommu_trace::Tracer;
use vmm_sys_util::eventfd::EventFd;

use crate::function::Served;
use crate::{PATIENCE, memfd};

pub const ENDPOINT: u32 = 0x20;
pub const RAM: u64 = 64 << 20;
pub const PAGE: u64 = 4096;
/// A controller behind an IOMMU in bypass, on a socket, with an image in a temporary folder.
pub struct Setup {
    served: Served,
    _dir: TempDir,
    pub disk: Arc<Disk>,
}

impl Setup {
    pub fn new() -> Self {
        Setup::with(64 << 20, |_| {})
    }

    /// With an image of `bytes` zeros.
    pub fn with(bytes: u64, change: impl FnOnce(&mut NvmeConfig)) -> Self {
        Setup::traced(bytes, Tracer::default(), change)
    }

    /// The same, with a trace.
    pub fn traced(bytes: u64, tracer: Tracer, change: impl FnOnce(&mut NvmeConfig)) -> Self {
        Setup::polling(bytes, tracer, None, change)
    }

    /// The same, with a queue that its threads poll.
    pub fn polling(
        bytes: u64,
        tracer: Tracer,
        poller: Option<Arc<dyn QueuePoller>>,
        change: impl FnOnce(&mut NvmeConfig),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = NvmeConfig::new(dir.path().join("disk.img"), "test 1");
        change(&mut config);
        File::create(&config.image).unwrap().set_len(bytes).unwrap();
        let disk = Disk::open(config).unwrap();
        let of_controller = disk.clone();
        let make = move |mut context: FunctionContext| -> Box<dyn Function> {
            context.poller.clone_from(&poller);
            Box::new(Nvme::new(context, of_controller.clone()))
        };
        Setup { served: Served::new(ENDPOINT, tracer, make, || {}), _dir: dir, disk }
    }

    pub fn image(&self) -> PathBuf {
        self.disk.config().image.clone()
    }

    /// The IOMMU that the controller is behind.
    pub fn iommu(&self) -> &Iommu {
        &self.served.iommu
    }

    /// A driver that has not touched the controller yet.
    pub fn driver(&self) -> Driver {
        Driver::new(self.served.client(), memfd(RAM), PAGE)
    }

    /// A driver with an enabled controller and one I/O queue pair of 64 entries.
    pub fn ready(&self) -> Driver {
        let mut driver = self.driver();
        driver.enable();
        driver.create_pair(1, 64, 64);
        driver
    }
}

/// A submission queue entry.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sqe {
    pub opcode: u8,
    pub flags: u8,
    pub nsid: u32,
    pub data: [u64; 2],
    pub cdw10: u32,
    pub cdw11: u32,
    pub cdw12: u32,
    pub cdw13: u32,
}

/// A completion, with the status field without the phase tag and without Do Not Retry and More.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub cid: u16,
    pub status: u16,
    pub result: u32,
    pub sq_head: u16,
    pub sq_id: u16,
}

/// One end of a queue pair as the driver sees it.
pub struct Pair {
    pub sq: u64,
    pub sq_size: u32,
    pub tail: u32,
    pub cq: u64,
    pub cq_size: u32,
    pub head: u32,
    phase: bool,
}

pub struct Driver {
    pub client: Client,
    pub ram: File,
    pub events: Vec<EventFd>,
    pub queues: HashMap<u16, Pair>,
    /// The next unused page of guest memory.
    pub free: u64,
    cid: u16,
    /// Shadow doorbells and event indexes, once they are configured.
    pub shadow: Option<(u64, u64)>,
}

pub mod register {
    pub const CAP: u64 = 0x00;
    pub const VS: u64 = 0x08;
    pub const CC: u64 = 0x14;
    pub const CSTS: u64 = 0x1c;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ACQ: u64 = 0x30;
}

/// CC: enabled, with entries of 64 and 16 bytes and pages of 4 KiB.
pub const CC_ENABLED: u32 = 4 << 20 | 6 << 16 | 1;

impl Driver {
    /// A driver that has not touched the controller yet. It has all of `ram` as guest memory, and takes pages from
    /// `free` on.
    pub fn new(mut client: Client, ram: File, free: u64) -> Driver {
        client.dma_map(0, 0, RAM, ram.as_raw_fd()).unwrap();
        client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
        let events: Vec<EventFd> = (0..9).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        for (vector, event) in (0..).zip(&events) {
            let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
            client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, flags, vector, 1, &[event.as_raw_fd()]).unwrap();
        }
        Driver { client, ram, events, queues: HashMap::new(), free, cid: 0, shadow: None }
    }

    /// Returns unused pages of guest memory.
    pub fn pages(&mut self, count: u64) -> u64 {
        let at = self.free;
        self.free += count * PAGE;
        assert!(self.free <= RAM, "the test needs more guest memory");
        at
    }

    pub fn write_ram(&self, at: u64, data: &[u8]) {
        self.ram.write_all_at(data, at).unwrap();
    }

    pub fn read_ram(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.read_exact_at(&mut data, at).unwrap();
        data
    }

    pub fn write_words(&self, at: u64, words: &[u64]) {
        self.write_ram(at, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
    }

    pub fn read32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.client.region_read(0, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    pub fn read64(&mut self, offset: u64) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    pub fn write32(&mut self, offset: u64, value: u32) {
        self.client.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub fn csts(&mut self) -> u32 {
        self.read32(register::CSTS)
    }

    /// Waits until CSTS has these bits.
    pub fn wait_csts(&mut self, mask: u32, value: u32) {
        let begun = Instant::now();
        while self.csts() & mask != value {
            assert!(begun.elapsed() < PATIENCE, "CSTS is {:#x}", self.csts());
        }
    }

    /// Enables the controller with an admin queue of 32 entries.
    pub fn enable(&mut self) {
        let (sq, cq) = (self.pages(1), self.pages(1));
        self.write32(register::AQA, 31 << 16 | 31);
        self.client.region_write(0, register::ASQ, &sq.to_le_bytes()).unwrap();
        self.client.region_write(0, register::ACQ, &cq.to_le_bytes()).unwrap();
        self.write32(register::CC, CC_ENABLED);
        self.wait_csts(1, 1);
        self.queues.clear();
        self.shadow = None;
        self.add_pair(0, sq, 32, cq, 32);
    }

    /// A controller reset.
    pub fn disable(&mut self) {
        self.write32(register::CC, 0);
        self.wait_csts(1, 0);
    }

    pub fn add_pair(&mut self, id: u16, sq: u64, sq_size: u32, cq: u64, cq_size: u32) {
        self.write_ram(cq, &vec![0; cq_size as usize * 16]);
        self.queues.insert(id, Pair { sq, sq_size, tail: 0, cq, cq_size, head: 0, phase: true });
    }

    /// Creates an I/O queue pair whose interrupts have the vector of the same number.
    pub fn create_pair(&mut self, id: u16, sq_size: u32, cq_size: u32) {
        let sq = self.pages((u64::from(sq_size) * 64).div_ceil(PAGE));
        let cq = self.pages((u64::from(cq_size) * 16).div_ceil(PAGE));
        self.add_pair(id, sq, sq_size, cq, cq_size);
        assert_eq!(self.create_cq(id, cq_size, cq, u32::from(id) << 16 | 0b11), 0);
        assert_eq!(self.create_sq(id, sq_size, sq, u32::from(id) << 16 | 1), 0);
    }

    pub fn create_cq(&mut self, id: u16, size: u32, at: u64, cdw11: u32) -> u16 {
        let cdw10 = (size.wrapping_sub(1)) << 16 | u32::from(id);
        self.admin(Sqe { opcode: 5, data: [at, 0], cdw10, cdw11, ..Sqe::default() }).status
    }

    pub fn create_sq(&mut self, id: u16, size: u32, at: u64, cdw11: u32) -> u16 {
        let cdw10 = (size.wrapping_sub(1)) << 16 | u32::from(id);
        self.admin(Sqe { opcode: 1, data: [at, 0], cdw10, cdw11, ..Sqe::default() }).status
    }

    pub fn delete_sq(&mut self, id: u16) -> u16 {
        self.admin(Sqe { opcode: 0, cdw10: u32::from(id), ..Sqe::default() }).status
    }

    pub fn delete_cq(&mut self, id: u16) -> u16 {
        self.admin(Sqe { opcode: 4, cdw10: u32::from(id), ..Sqe::default() }).status
    }

    /// Puts an entry into a submission queue, without ringing the doorbell.
    pub fn put(&mut self, queue: u16, sqe: Sqe) -> u16 {
        self.cid = self.cid.wrapping_add(1);
        let mut bytes = [0; 64];
        bytes[0] = sqe.opcode;
        bytes[1] = sqe.flags;
        bytes[2..4].copy_from_slice(&self.cid.to_le_bytes());
        bytes[4..8].copy_from_slice(&sqe.nsid.to_le_bytes());
        bytes[24..32].copy_from_slice(&sqe.data[0].to_le_bytes());
        bytes[32..40].copy_from_slice(&sqe.data[1].to_le_bytes());
        for (at, dword) in [(40, sqe.cdw10), (44, sqe.cdw11), (48, sqe.cdw12), (52, sqe.cdw13)] {
            bytes[at..at + 4].copy_from_slice(&dword.to_le_bytes());
        }
        let pair = self.queues.get_mut(&queue).unwrap();
        self.ram.write_all_at(&bytes, pair.sq + u64::from(pair.tail) * 64).unwrap();
        pair.tail = (pair.tail + 1) % pair.sq_size;
        self.cid
    }

    /// Rings the doorbell for new entries.
    pub fn ring(&mut self, queue: u16) {
        let tail = self.queues[&queue].tail;
        self.ring_doorbell(queue, u64::from(queue) * 2, tail);
    }

    /// Writes a doorbell as Linux does: the shadow if there is one, and the register if the event index asks for it.
    /// Returns whether the register was written.
    pub fn ring_doorbell(&mut self, queue: u16, index: u64, value: u32) -> bool {
        let rung = match self.shadow.filter(|_| queue != 0) {
            None => true,
            Some((doorbells, event_indexes)) => {
                let load = |at| u32::from_le_bytes(self.read_ram(at + 4 * index, 4).try_into().unwrap());
                let old = load(doorbells);
                self.write_ram(doorbells + 4 * index, &value.to_le_bytes());
                let event = load(event_indexes) as u16;
                (value as u16).wrapping_sub(event).wrapping_sub(1) < (value as u16).wrapping_sub(old as u16)
            }
        };
        if rung {
            self.write32(0x1000 + 4 * index, value);
        }
        rung
    }

    /// The next completion, if there is one.
    pub fn reap(&mut self, queue: u16) -> Option<Done> {
        let pair = self.queues.get_mut(&queue).unwrap();
        let mut entry = [0; 16];
        self.ram.read_exact_at(&mut entry, pair.cq + u64::from(pair.head) * 16).unwrap();
        let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        if (half(14) & 1 != 0) != pair.phase {
            return None;
        }
        pair.head += 1;
        if pair.head == pair.cq_size {
            pair.head = 0;
            pair.phase = !pair.phase;
        }
        Some(Done {
            cid: half(12),
            status: half(14) >> 1 & 0x7ff,
            result: u32::from(half(0)) | u32::from(half(2)) << 16,
            sq_head: half(8),
            sq_id: half(10),
        })
    }

    /// Acknowledges the completions that were consumed.
    pub fn ring_head(&mut self, queue: u16) {
        let head = self.queues[&queue].head;
        self.ring_doorbell(queue, u64::from(queue) * 2 + 1, head);
    }

    /// Waits for a completion.
    pub fn wait(&mut self, queue: u16) -> Done {
        let begun = Instant::now();
        loop {
            if let Some(done) = self.reap(queue) {
                self.ring_head(queue);
                return done;
            }
            assert!(begun.elapsed() < PATIENCE, "no completion on queue {queue}");
            std::thread::yield_now();
        }
    }

    /// Executes one command.
    pub fn command(&mut self, queue: u16, sqe: Sqe) -> Done {
        let cid = self.put(queue, sqe);
        self.ring(queue);
        let done = self.wait(queue);
        assert_eq!((done.cid, done.sq_id), (cid, queue));
        done
    }

    pub fn admin(&mut self, sqe: Sqe) -> Done {
        self.command(0, sqe)
    }

    /// Identify: the structure, or the status.
    pub fn identify(&mut self, cns: u32, nsid: u32, cdw11: u32) -> Result<Vec<u8>, u16> {
        let page = self.pages(1);
        let sqe = Sqe { opcode: 6, nsid, data: [page, 0], cdw10: cns, cdw11, ..Sqe::default() };
        match self.admin(sqe).status {
            0 => Ok(self.read_ram(page, 4096)),
            status => Err(status),
        }
    }

    /// Get Log Page: `len` bytes from `offset` on, or the status.
    pub fn log_page(&mut self, log: u32, offset: u32, len: u32) -> Result<Vec<u8>, u16> {
        let page = self.pages(1);
        let cdw10 = (len / 4 - 1) << 16 | log;
        match self.admin(Sqe { opcode: 2, data: [page, 0], cdw10, cdw12: offset, ..Sqe::default() }).status {
            0 => Ok(self.read_ram(page, len as usize)),
            status => Err(status),
        }
    }

    pub fn set_feature(&mut self, feature: u32, value: u32) -> Done {
        self.admin(Sqe { opcode: 9, cdw10: feature, cdw11: value, ..Sqe::default() })
    }

    pub fn get_feature(&mut self, feature: u32, value: u32) -> Done {
        self.admin(Sqe { opcode: 10, cdw10: feature, cdw11: value, ..Sqe::default() })
    }
}

/// An I/O command on namespace 1.
pub fn io(opcode: u8, lba: u64, blocks: u32, data: [u64; 2]) -> Sqe {
    let (cdw10, cdw11) = (lba as u32, (lba >> 32) as u32);
    Sqe { opcode, nsid: 1, data, cdw10, cdw11, cdw12: blocks.wrapping_sub(1) & 0xffff, ..Sqe::default() }
}

/// Bytes that differ at each place.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}
