//! Virtqueues, built by hand in the driver's memory.

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::Instant;

use viommu_wire::virtio_iommu::Tail;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::FromBytes;

use super::{Driver, EVENT_IDX};
use crate::{PATIENCE, wait_until};

/// Where the queues are.
pub(super) const QUEUE_BASES: [u64; 2] = [0x1_0000, 0x2_0000];
/// Where buffers and indirect tables are. The memory before that is the test's, except for the queues.
pub(super) const BUFFERS: std::ops::Range<u64> = 16 << 20..32 << 20;
/// Entries of each queue.
pub const SIZE: u16 = 256;

/// The request queue.
pub const REQUESTS: usize = 0;
/// The event queue.
pub const EVENTS: usize = 1;

/// A part of a request: bytes that the device reads, or the number of bytes that it may write.
#[derive(Clone, Debug)]
pub enum Part {
    R(Vec<u8>),
    W(usize),
}

/// The length from the used ring, and the whole device-writable part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    pub len: u32,
    pub written: Vec<u8>,
}

impl Used {
    /// The status. It is in the last four bytes, which must be a proper tail.
    pub fn status(&self) -> u8 {
        assert_eq!(self.len as usize, self.written.len(), "the used length covers the tail");
        let (_, tail) = Tail::read_from_suffix(&self.written).unwrap();
        assert_eq!(tail.reserved, [0; 3]);
        tail.status
    }
}

/// One descriptor, as it is in memory.
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A flag of the used ring.
const NO_NOTIFY: u16 = 1;

pub const NEXT: u16 = 1;
pub const DEVICE_WRITES: u16 = 2;
pub const INDIRECT_TABLE: u16 = 4;

/// A split virtqueue.
pub struct Queue {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub next_available: u16,
    pub next_used: u16,
    next_descriptor: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Queue {
    pub(super) fn new(base: u64) -> Queue {
        Queue {
            descriptors: base,
            available: base + 0x2000,
            used: base + 0x3000,
            next_available: 0,
            next_used: 0,
            next_descriptor: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// Whether the device has read the kick.
    fn kick_is_taken(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.kick.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer is to one descriptor's entry, which lives through the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        assert_ne!(ready, -1, "{}", std::io::Error::last_os_error());
        ready == 0
    }
}

/// The driver's use of its queues.
impl Driver {
    /// Memory for a buffer. It is used again after a few thousand requests.
    pub fn allocate(&mut self, len: usize) -> u64 {
        if self.next_buffer + len as u64 > BUFFERS.end {
            self.next_buffer = BUFFERS.start;
        }
        let address = self.next_buffer;
        self.next_buffer += (len as u64).next_multiple_of(16);
        address
    }

    pub fn set_descriptor(&self, index: usize, number: u16, descriptor: Descriptor) {
        self.write(self.queues[index].descriptors + 16 * u64::from(number), &descriptor_bytes(descriptor));
    }

    /// Puts a head into the available ring.
    pub fn make_available(&mut self, index: usize, head: u16) {
        let queue = &mut self.queues[index];
        let slot = queue.available + 4 + 2 * u64::from(queue.next_available % SIZE);
        queue.next_available = queue.next_available.wrapping_add(1);
        let (address, next) = (queue.available + 2, queue.next_available);
        self.write_u16(slot, head);
        self.write_u16(address, next);
    }

    /// Adds one chain without a kick. Returns its head and the places of its device-writable parts.
    pub fn add(&mut self, index: usize, parts: &[Part]) -> (u16, Vec<(u64, usize)>) {
        let (descriptors, writable) = self.place(parts);
        let first = self.queues[index].next_descriptor;
        for (count, mut descriptor) in descriptors.iter().copied().enumerate() {
            let number = first.wrapping_add(count as u16) % SIZE;
            descriptor.next = (number + 1) % SIZE;
            self.set_descriptor(index, number, descriptor);
        }
        self.queues[index].next_descriptor = first.wrapping_add(descriptors.len() as u16) % SIZE;
        self.make_available(index, first);
        (first, writable)
    }

    /// As [`Driver::add`], with all descriptors in an indirect table.
    pub fn add_indirect(&mut self, index: usize, parts: &[Part]) -> (u16, Vec<(u64, usize)>) {
        let (mut descriptors, writable) = self.place(parts);
        for (number, descriptor) in descriptors.iter_mut().enumerate() {
            descriptor.next = number as u16 + 1;
        }
        let table: Vec<u8> = descriptors.iter().flat_map(|&descriptor| descriptor_bytes(descriptor)).collect();
        let address = self.allocate(table.len());
        self.write(address, &table);
        let head = self.queues[index].next_descriptor;
        let len = table.len() as u32;
        self.set_descriptor(index, head, Descriptor { address, len, flags: INDIRECT_TABLE, next: 0 });
        self.queues[index].next_descriptor = (head + 1) % SIZE;
        self.make_available(index, head);
        (head, writable)
    }

    /// Puts the parts of a chain into memory. Device-writable parts are filled with bytes that no device writes.
    fn place(&mut self, parts: &[Part]) -> (Vec<Descriptor>, Vec<(u64, usize)>) {
        let mut writable = Vec::new();
        let mut descriptors = Vec::new();
        for (count, part) in parts.iter().enumerate() {
            let (data, flags) = match part {
                Part::R(data) => (data.clone(), 0),
                Part::W(len) => (vec![0xa5; *len], DEVICE_WRITES),
            };
            let address = self.allocate(data.len());
            self.write(address, &data);
            if flags == DEVICE_WRITES {
                writable.push((address, data.len()));
            }
            let flags = flags | if count + 1 < parts.len() { NEXT } else { 0 };
            descriptors.push(Descriptor { address, len: data.len() as u32, flags, next: 0 });
        }
        (descriptors, writable)
    }

    pub fn kick(&self, index: usize) {
        self.queues[index].kick.write(1).unwrap();
    }

    /// Waits until the device has done everything that it was woken for, with the help of a running queue. The device
    /// takes a kick of that queue only after all that it took before. That may wake it once more, and if several things
    /// wake it at once the kick may come first, so this kicks three times. A kick of an empty queue does not count.
    pub fn wait_until_idle(&self, index: usize) {
        for _ in 0..3 {
            self.kick(index);
            wait_until(PATIENCE, "a kick is taken", || self.queues[index].kick_is_taken());
        }
    }

    /// Whether the device asks for a kick of the queue after one chain was added.
    pub fn is_kick_wanted(&self, index: usize) -> bool {
        fence(Ordering::SeqCst);
        let queue = &self.queues[index];
        if self.accepted & EVENT_IDX == 0 {
            return self.read_u16(queue.used) & NO_NOTIFY == 0;
        }
        let event = self.read_u16(queue.used + 4 + 8 * u64::from(SIZE));
        event == queue.next_available.wrapping_sub(1)
    }

    /// Whether all used entries were taken.
    pub fn used_is_empty(&self, index: usize) -> bool {
        self.read_u16(self.queues[index].used + 2) == self.queues[index].next_used
    }

    /// Waits for the next used entry: head and length.
    pub fn wait_used(&mut self, index: usize) -> (u16, u32) {
        let begin = Instant::now();
        while self.used_is_empty(index) {
            assert!(begin.elapsed() < PATIENCE, "the device does not answer");
            thread::yield_now();
        }
        let queue = &mut self.queues[index];
        let entry = queue.used + 4 + 8 * u64::from(queue.next_used % SIZE);
        queue.next_used = queue.next_used.wrapping_add(1);
        let entry: [u32; 2] = FromBytes::read_from_bytes(&self.read(entry, 8)).unwrap();
        (entry[0] as u16, entry[1])
    }
}

pub fn descriptor_bytes(descriptor: Descriptor) -> Vec<u8> {
    let mut bytes = descriptor.address.to_le_bytes().to_vec();
    bytes.extend(descriptor.len.to_le_bytes());
    bytes.extend(descriptor.flags.to_le_bytes());
    bytes.extend(descriptor.next.to_le_bytes());
    bytes
}
