//! Descriptor chains: from the available ring to bytes, and back to the used ring.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::kicks::Available;

/// The most bytes of a chain. It is far more than the largest request has, and few enough to clear for every request.
const CHAIN_BYTES_MAX: u64 = 64 << 10;

/// The next entry of the available ring.
pub(super) enum Popped<'m> {
    /// A chain.
    Chain(DescriptorChain<&'m GuestMemoryMmap>),
    /// There is none.
    Empty,
    /// No valid ring: the index is ahead by more than the ring's size, or the ring is not in memory.
    Broken,
}

/// Takes the next chain.
pub(super) fn pop<'m>(queue: &mut Queue, memory: &'m GuestMemoryMmap) -> Popped<'m> {
    match available(queue, memory) {
        Some(0) => return Popped::Empty,
        Some(_) => {}
        None => return Popped::Broken,
    }
    match queue.iter(memory).ok().and_then(|mut chains| chains.next()) {
        Some(chain) => Popped::Chain(chain),
        None => Popped::Broken,
    }
}

/// How many chains are available; `None` if the index cannot be read or is impossible.
pub(super) fn available(queue: &Queue, memory: &GuestMemoryMmap) -> Option<u16> {
    let index = queue.avail_idx(memory, Ordering::Acquire).ok()?;
    let count = (index - Wrapping(queue.next_avail())).0;
    (count <= queue.size()).then_some(count)
}

/// A queue and the memory it lies in.
pub(super) struct Taken<'a> {
    pub queue: &'a mut Queue,
    pub memory: &'a GuestMemoryMmap,
}

impl Available for Taken<'_> {
    fn has_more(&self) -> bool {
        available(self.queue, self.memory) != Some(0)
    }

    fn ask(&mut self) -> Option<bool> {
        self.queue.enable_notification(self.memory).ok()
    }

    /// A failed write is ignored here: the next thread that serves the queue finds it.
    fn decline(&mut self) {
        if !self.queue.event_idx_enabled() {
            let _ = self.queue.disable_notification(self.memory);
            return;
        }
        // The driver kicks when its index passes avail_event, which follows the used ring's elements (section 2.7.8).
        // The driver has already passed the value set here, and passes it again only after 2^16 more requests.
        let event = self.queue.next_avail().wrapping_sub(1);
        let address = self.queue.used_ring().checked_add(4 + 8 * u64::from(self.queue.size()));
        if let Some(address) = address {
            let _ = self.memory.store(event.to_le(), GuestAddress(address), Ordering::Relaxed);
        }
    }
}

/// Whether the driver wants to know of the used entries since the last call.
pub(super) fn needs_notification(queue: &mut Queue, memory: &GuestMemoryMmap) -> bool {
    if !queue.event_idx_enabled() {
        // The crate only knows EVENT_IDX.
        std::sync::atomic::fence(Ordering::SeqCst);
        let flags: u16 = memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed).unwrap_or(0);
        return u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0;
    }
    queue.needs_notification(memory).unwrap_or(true)
}

/// A part of a chain that is contiguous in guest memory.
#[derive(Clone, Copy)]
struct Segment {
    address: GuestAddress,
    len: usize,
}

/// One chain's buffers. They are reused, so that a request costs no allocation.
#[derive(Default)]
pub(super) struct ChainBuffers {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

/// A chain that no driver may make (sections 2.7.4.2, 2.7.5.2 and 2.7.5.3.1). It loops, is longer than the queue or
/// than this device accepts, has a device-writable part before a device-readable one, or leads out of memory.
#[derive(Debug)]
pub(super) struct BadChain;

impl ChainBuffers {
    /// Takes a chain's descriptors. The queue's size bounds the cost, whatever they say.
    pub(super) fn fill(&mut self, chain: DescriptorChain<&GuestMemoryMmap>, size: u16) -> Result<(), BadChain> {
        self.readable.clear();
        self.writable.clear();
        let mut bytes = 0;
        // The iterator just ends where it cannot go on.
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            bytes += u64::from(descriptor.len());
            if count >= usize::from(size) || bytes > CHAIN_BYTES_MAX {
                return Err(BadChain);
            }
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() as usize };
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.is_empty() {
                self.readable.push(segment);
            } else {
                return Err(BadChain);
            }
            complete = !descriptor.has_next();
        }
        complete.then_some(()).ok_or(BadChain)
    }

    /// Bytes of the device-readable part.
    pub(super) fn readable(&self) -> usize {
        self.readable.iter().map(|segment| segment.len).sum()
    }

    /// Bytes of the device-writable part.
    pub(super) fn writable(&self) -> usize {
        self.writable.iter().map(|segment| segment.len).sum()
    }

    /// Reads the first bytes of the device-readable part, as many as exist and fit. Returns how many.
    pub(super) fn read(&self, memory: &GuestMemoryMmap, data: &mut [u8]) -> Result<usize, BadChain> {
        let mut done = 0;
        for segment in &self.readable {
            let len = segment.len.min(data.len() - done);
            memory.read_slice(&mut data[done..done + len], segment.address).map_err(|_| BadChain)?;
            done += len;
        }
        Ok(done)
    }

    /// Whether all of the device-writable part is memory.
    pub(super) fn check_writable(&self, memory: &GuestMemoryMmap) -> Result<(), BadChain> {
        let good = |segment: &Segment| {
            segment.len == 0 || memory.check_range(segment.address, segment.len, Permissions::Write)
        };
        self.writable.iter().all(good).then_some(()).ok_or(BadChain)
    }

    /// Writes the first `data.len()` bytes of the device-writable part, which must have that many.
    pub(super) fn write(&self, memory: &GuestMemoryMmap, data: &[u8]) -> Result<(), BadChain> {
        let mut rest = data;
        for segment in &self.writable {
            let (part, after) = rest.split_at(segment.len.min(rest.len()));
            memory.write_slice(part, segment.address).map_err(|_| BadChain)?;
            rest = after;
        }
        rest.is_empty().then_some(()).ok_or(BadChain)
    }
}
