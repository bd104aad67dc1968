//! Queues in the host's memory (section 4.1).

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use super::shared::{Doorbells, InvalidDoorbell, Shadow, SharedController};
use super::spec::{Cqe, Sqe, Status};
use crate::devices::kit::ThreadContext;
use crate::devices::kit::ring::{CommandRing, CompletionRing};
use crate::dma::{Dma, DmaError};
use crate::sync::lock;

/// Ends a queue's thread: the queue or the controller goes away, or the queue cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended;

/// A submission queue, as its thread sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SubmissionQueue {
    id: u16,
    /// The ring, with the tail as it was last read.
    ring: CommandRing,
    /// The address and value of the event index that was written last.
    armed: Option<(u64, u32)>,
}

impl SubmissionQueue {
    /// A new, empty queue.
    pub fn new(id: u16, ring: CommandRing) -> Self {
        SubmissionQueue { id, ring, armed: None }
    }

    /// The queue identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The number of entries.
    pub fn size(&self) -> u32 {
        self.ring.size()
    }

    /// Whether such a queue is possible, with an identifier of at most `id_max`.
    pub fn is_possible(&self, id_max: u16) -> bool {
        self.id <= id_max && self.ring.is_possible()
    }

    /// The head pointer: the index of the next entry to fetch.
    pub fn head(&self) -> u16 {
        self.ring.head() as u16
    }

    /// Polls for new entries. Returns whether there are any.
    pub fn poll(&mut self, dma: &mut Dma, shared: &SharedController) -> Result<bool, DmaError> {
        let Some(doorbells) = shared.doorbells.get(usize::from(self.id)) else { return Ok(false) };
        let known = self.ring.tail();
        let tail = match shared.shadow.tail(self.id) {
            Some(shadow) => dma.poll(shadow.doorbell, known)?,
            None => doorbells.tail.value(),
        };
        if !self.ring.set_tail(tail) {
            shared.invalid_doorbell(InvalidDoorbell::Value);
        }
        Ok(self.ring.head() != self.ring.tail())
    }

    /// Asks the host to write the doorbell register for new entries. Returns false if there already are some.
    pub fn prepare_wait(&mut self, dma: &mut Dma, shared: &SharedController) -> Result<bool, DmaError> {
        if let Some(shadow) = shared.shadow.tail(self.id)
            && self.armed != Some((shadow.event_index, self.ring.tail()))
        {
            arm(dma, shadow, self.ring.tail())?;
            self.armed = Some((shadow.event_index, self.ring.tail()));
        }
        Ok(!self.poll(dma, shared)?)
    }

    /// Fetches at most `max` of the new entries that [`SubmissionQueue::poll`] found.
    pub fn fetch(&mut self, dma: &mut Dma, max: usize, entries: &mut Vec<Sqe>) -> Result<(), DmaError> {
        entries.clear();
        if let Some(span) = self.ring.next(max) {
            entries.resize(span.entries, Sqe::default());
            dma.read(span.address, entries.as_mut_bytes())?;
            self.ring.consume(span.entries);
        }
        Ok(())
    }
}

/// Sets an event index, so that the host writes the doorbell register when it goes past `value`. If the host wrote the
/// shadow before it could see that, the next read finds it.
fn arm(dma: &mut Dma, shadow: Shadow, value: u32) -> Result<(), DmaError> {
    dma.write(shadow.event_index, &value.to_le_bytes())?;
    fence(Ordering::SeqCst);
    Ok(())
}

/// The completion of a command.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Completion {
    pub cid: u16,
    pub status: Status,
    pub result: u32,
}

/// A completion queue. All its submission queues share it.
pub(super) struct CompletionQueue {
    id: u16,
    size: u32,
    vector: Option<u16>,
    /// The ring, with the head as it was last read.
    ring: Mutex<CompletionRing>,
    /// A copy of the tail that is read without the lock, which may be held for long, during a write to guest memory.
    tail: AtomicU32,
}

/// A completion queue's state, in a form to save.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedCompletionQueue {
    pub id: u16,
    pub ring: CompletionRing,
    vector: Option<u16>,
    /// The value of its head doorbell.
    pub doorbell: u32,
}

impl SavedCompletionQueue {
    /// Whether such a queue is possible, with an identifier and a vector of at most `id_max`.
    pub fn is_possible(&self, id_max: u16) -> bool {
        let vector = self.vector.is_none_or(|vector| vector <= id_max);
        self.id <= id_max && vector && self.ring.is_possible() && self.doorbell < self.ring.size()
    }
}

impl CompletionQueue {
    /// A completion queue with this ring.
    pub fn new(id: u16, ring: CompletionRing, vector: Option<u16>) -> Self {
        let tail = AtomicU32::new(ring.tail());
        CompletionQueue { id, size: ring.size(), vector, ring: Mutex::new(ring), tail }
    }

    /// The queue identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Posts completions of the submission queue `sq` (identifier, head), with one interrupt for all that fit. While
    /// the queue is full, releases the queue that the thread polls and waits for the host. Completions that could not
    /// be posted before an interruption stay in `done`.
    pub fn post(
        &self,
        thread: &mut ThreadContext,
        shared: &SharedController,
        sq: (u16, u16),
        done: &mut Vec<Completion>,
    ) -> Result<(), Ended> {
        while !done.is_empty() {
            let posted = self.post_some(&mut thread.dma, shared, sq, done).map_err(|_| {
                shared.fatal();
                Ended
            })?;
            done.drain(..posted);
            if posted > 0 {
                self.interrupt(shared);
            } else {
                // The host, which has to consume entries, may be waiting for an answer of the IOMMU.
                thread.poll.release();
                self.wait(thread, shared)?;
            }
        }
        Ok(())
    }

    /// The state to save.
    pub fn save(&self, shared: &SharedController) -> SavedCompletionQueue {
        SavedCompletionQueue {
            id: self.id,
            ring: lock(&self.ring).clone(),
            vector: self.vector,
            doorbell: self.doorbells(shared).map_or(0, |doorbells| doorbells.head.value()),
        }
    }

    /// A completion queue in a saved state, without its doorbell.
    pub fn load(saved: &SavedCompletionQueue) -> Self {
        CompletionQueue::new(saved.id, saved.ring.clone(), saved.vector)
    }

    fn interrupt(&self, shared: &SharedController) {
        if let Some(vector) = self.vector {
            shared.context.interrupts.trigger(vector);
        }
    }

    /// Notes that the host has unmasked these vectors, a bit each. The queue interrupts if its vector is among them and
    /// it has entries that the host has not acknowledged (section 7.5.1). An entry that is posted at the same time is
    /// either seen here, or its interrupt comes after the change of the mask.
    pub fn unmasked(&self, dma: &mut Dma, shared: &SharedController, vectors: u32) -> Result<(), DmaError> {
        if vectors & self.vector_bit() != 0 && self.host_head(dma, shared)? != self.tail.load(Ordering::SeqCst) {
            self.interrupt(shared);
        }
        Ok(())
    }

    /// The bit of its vector, if there are entries that the host has not acknowledged in the register. With the
    /// interrupt pin there are no shadow doorbells.
    pub fn reason(&self, shared: &SharedController) -> u32 {
        let head = self.doorbells(shared).map_or(0, |doorbells| doorbells.head.value());
        if head != self.tail.load(Ordering::SeqCst) { self.vector_bit() } else { 0 }
    }

    fn vector_bit(&self) -> u32 {
        self.vector.and_then(|vector| 1u32.checked_shl(u32::from(vector))).unwrap_or(0)
    }

    /// Posts the completions that fit without wrapping. Returns their number.
    fn post_some(
        &self,
        dma: &mut Dma,
        shared: &SharedController,
        (sq_id, sq_head): (u16, u16),
        done: &[Completion],
    ) -> Result<usize, DmaError> {
        let mut ring = lock(&self.ring);
        if ring.free() < done.len() {
            ring.set_head(self.host_head(dma, shared)?);
        }
        let Some(span) = ring.next(done.len()) else { return Ok(0) };
        let entry = |completion: &Completion| Cqe {
            result: U32::new(completion.result),
            reserved: U32::ZERO,
            sq_head: U16::new(sq_head),
            sq_id: U16::new(sq_id),
            cid: U16::new(completion.cid),
            status: U16::new(completion.status.0 << 1 | u16::from(span.phase)),
        };
        let entries: Vec<Cqe> = done[..span.entries].iter().map(entry).collect();
        // The phase tag, which makes an entry valid, is in the same aligned 8 bytes as everything else that an I/O
        // driver reads. So a host that polls sees a whole entry or none.
        dma.write(span.address, entries.as_bytes())?;
        ring.post(span.entries);
        self.tail.store(ring.tail(), Ordering::SeqCst);
        Ok(span.entries)
    }

    fn doorbells<'a>(&self, shared: &'a SharedController) -> Option<&'a Doorbells> {
        shared.doorbells.get(usize::from(self.id))
    }

    /// The head: the index of the next entry that the host consumes.
    fn host_head(&self, dma: &mut Dma, shared: &SharedController) -> Result<u32, DmaError> {
        let known = self.doorbells(shared).map_or(0, |doorbells| doorbells.head.value());
        let Some(shadow) = shared.shadow.head(self.id) else { return Ok(known) };
        let head = dma.poll(shadow.doorbell, known)?;
        if head < self.size {
            return Ok(head);
        }
        shared.invalid_doorbell(InvalidDoorbell::Value);
        Ok(known)
    }

    /// Waits until the host has consumed entries of a full queue.
    fn wait(&self, thread: &mut ThreadContext, shared: &SharedController) -> Result<(), Ended> {
        let Some(doorbells) = self.doorbells(shared) else { return Err(Ended) };
        doorbells.head.subscribe();
        let result = self.wait_subscribed(thread, shared);
        doorbells.head.unsubscribe();
        result
    }

    fn wait_subscribed(&self, thread: &mut ThreadContext, shared: &SharedController) -> Result<(), Ended> {
        let fatal = |_| {
            shared.fatal();
            Ended
        };
        let full_at = lock(&self.ring).head();
        let mut armed = None;
        loop {
            // The host may set other shadow doorbells while the thread waits.
            let shadow = shared.shadow.head(self.id).filter(|shadow| armed != Some(shadow.event_index));
            if let Some(shadow) = shadow {
                arm(&mut thread.dma, shadow, full_at).map_err(fatal)?;
                armed = Some(shadow.event_index);
            }
            if self.host_head(&mut thread.dma, shared).map_err(fatal)? != full_at {
                return Ok(());
            }
            if thread.interruption().is_some() || shared.is_fatal() {
                return Err(Ended);
            }
            std::thread::park();
        }
    }
}
