//! Queues in the host's memory (section 4.1).

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use super::shared::{Doorbells, InvalidDoorbell, Shadow, Shared};
use super::spec::{CQE, Cqe, SQE, Sqe, Status};
use crate::devices::kit::ThreadContext;
use crate::dma::{Dma, DmaError};
use crate::sync::lock;

/// The most entries of an admin queue, as AQA can say them; I/O queues have fewer.
const ADMIN_ENTRIES_MAX: u32 = 4096;

/// The thread is to end: the queue or the controller goes away, or the queue cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended;

/// A submission queue, as the thread that processes it sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SubmissionQueue {
    id: u16,
    base: u64,
    size: u32,
    head: u32,
    /// The tail as it was last seen.
    tail: u32,
    /// Where the event index was written last, and what; `None` before that.
    armed: Option<(u64, u32)>,
}

impl SubmissionQueue {
    /// A new, empty queue of `size` entries. The calling thread is its only reader.
    pub fn new(id: u16, base: u64, size: u32) -> Self {
        SubmissionQueue { id, base, size, head: 0, tail: 0, armed: None }
    }

    /// The queue identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Entries of the queue.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Whether a controller can have such a queue, of this identifier at most.
    pub fn is_possible(&self, id_max: u16) -> bool {
        self.id <= id_max
            && (2..=ADMIN_ENTRIES_MAX).contains(&self.size)
            && self.head < self.size
            && self.tail < self.size
    }

    /// Up to where the queue was fetched.
    pub fn head(&self) -> u16 {
        self.head as u16
    }

    /// Looks for new entries, and says whether there are any.
    pub fn poll(&mut self, dma: &mut Dma, shared: &Shared) -> Result<bool, DmaError> {
        let Some(doorbells) = shared.doorbells.get(usize::from(self.id)) else { return Ok(false) };
        let tail = match shared.shadow.tail(self.id) {
            Some(shadow) => dma.poll(shadow.doorbell, self.tail)?,
            None => doorbells.tail.value(),
        };
        if tail < self.size {
            self.tail = tail;
        } else if self.tail != tail {
            shared.invalid_doorbell(InvalidDoorbell::Value);
        }
        Ok(self.head != self.tail)
    }

    /// Asks the host to write the register when it has new entries. `false`: it has some already.
    pub fn prepare_wait(&mut self, dma: &mut Dma, shared: &Shared) -> Result<bool, DmaError> {
        if let Some(shadow) = shared.shadow.tail(self.id)
            && self.armed != Some((shadow.event_index, self.tail))
        {
            arm(dma, shadow, self.tail)?;
            self.armed = Some((shadow.event_index, self.tail));
        }
        Ok(!self.poll(dma, shared)?)
    }

    /// Fetches at most `max` new entries; there are more if it was as many.
    pub fn fetch(&mut self, dma: &mut Dma, max: usize, entries: &mut Vec<Sqe>) -> Result<(), DmaError> {
        let end = if self.tail >= self.head { self.tail } else { self.size };
        let count = (end - self.head).min(max as u32);
        entries.clear();
        entries.resize(count as usize, Sqe::default());
        dma.read(self.base.wrapping_add(u64::from(self.head) * SQE), entries.as_mut_bytes())?;
        self.head = (self.head + count) % self.size;
        Ok(())
    }
}

/// Sets an event index, so that the host writes the doorbell register when it goes past `value`. What the host wrote
/// to the shadow before it could see that is seen by the next read.
fn arm(dma: &mut Dma, shadow: Shadow, value: u32) -> Result<(), DmaError> {
    dma.write(shadow.event_index, &value.to_le_bytes())?;
    fence(Ordering::SeqCst);
    Ok(())
}

/// A command that is done.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Completion {
    pub cid: u16,
    pub status: Status,
    pub result: u32,
}

/// A completion queue; the submission queues that belong to it share it.
pub(super) struct CompletionQueue {
    id: u16,
    base: u64,
    size: u32,
    vector: Option<u16>,
    /// Up to where entries were posted. Changed only with the state locked; looked at without, since a lock that is held
    /// during a write to guest memory may be held for long.
    tail: AtomicU32,
    state: Mutex<State>,
}

/// A completion queue's state, to be kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedCompletionQueue {
    pub id: u16,
    base: u64,
    pub size: u32,
    vector: Option<u16>,
    tail: u32,
    head: u32,
    phase: bool,
    /// Its head doorbell.
    pub doorbell: u32,
}

impl SavedCompletionQueue {
    /// Whether a controller can have such a queue, of this identifier at most; it has one vector more.
    pub fn is_possible(&self, id_max: u16) -> bool {
        let inside = [self.tail, self.head, self.doorbell].iter().all(|index| *index < self.size);
        let vector = self.vector.is_none_or(|vector| vector <= id_max);
        self.id <= id_max && (2..=ADMIN_ENTRIES_MAX).contains(&self.size) && inside && vector
    }
}

struct State {
    head: u32,
    phase: bool,
}

impl CompletionQueue {
    /// A new, empty queue of `size` entries.
    pub fn new(id: u16, base: u64, size: u32, vector: Option<u16>) -> Self {
        let state = Mutex::new(State { head: 0, phase: true });
        CompletionQueue { id, base, size, vector, tail: AtomicU32::new(0), state }
    }

    /// The queue identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Posts completions of the submission queue `sq`, with one interrupt for all that fit; while the queue is full,
    /// releases the queue that the thread polls and waits for the host. What could not be posted before an interruption
    /// is left in `done`.
    pub fn post(
        &self,
        thread: &mut ThreadContext,
        shared: &Shared,
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
                // The host that is to consume entries may be waiting for an answer of the IOMMU.
                thread.poll.release();
                self.wait(thread, shared)?;
            }
        }
        Ok(())
    }

    /// What it is to go on from.
    pub fn save(&self, shared: &Shared) -> SavedCompletionQueue {
        let state = lock(&self.state);
        SavedCompletionQueue {
            id: self.id,
            base: self.base,
            size: self.size,
            vector: self.vector,
            tail: self.tail.load(Ordering::SeqCst),
            head: state.head,
            phase: state.phase,
            doorbell: self.doorbells(shared).map_or(0, |doorbells| doorbells.head.value()),
        }
    }

    /// Goes on from where another one was, but for its doorbell.
    pub fn load(saved: &SavedCompletionQueue) -> Self {
        let state = Mutex::new(State { head: saved.head, phase: saved.phase });
        let &SavedCompletionQueue { id, base, size, vector, tail, .. } = saved;
        CompletionQueue { id, base, size, vector, tail: AtomicU32::new(tail), state }
    }

    fn interrupt(&self, shared: &Shared) {
        if let Some(vector) = self.vector {
            shared.context.interrupts.trigger(vector);
        }
    }

    /// The host masks the vectors of these bits no more: the queue interrupts if one of them is its own and there are
    /// entries that the host has not acknowledged (section 7.5.1). What is posted at the same time is either seen here, or
    /// its interrupt comes after the change of the mask.
    pub fn unmasked(&self, dma: &mut Dma, shared: &Shared, vectors: u32) -> Result<(), DmaError> {
        if vectors & self.vector_bit() != 0 && self.host_head(dma, shared)? != self.tail.load(Ordering::SeqCst) {
            self.interrupt(shared);
        }
        Ok(())
    }

    /// The bit of its vector, if there are entries that the host has not acknowledged by the register. With the interrupt
    /// pin there are no shadow doorbells.
    pub fn reason(&self, shared: &Shared) -> u32 {
        let head = self.doorbells(shared).map_or(0, |doorbells| doorbells.head.value());
        if head != self.tail.load(Ordering::SeqCst) { self.vector_bit() } else { 0 }
    }

    fn vector_bit(&self) -> u32 {
        self.vector.and_then(|vector| 1u32.checked_shl(u32::from(vector))).unwrap_or(0)
    }

    /// Posts what fits without wrapping.
    fn post_some(
        &self,
        dma: &mut Dma,
        shared: &Shared,
        (sq_id, sq_head): (u16, u16),
        done: &[Completion],
    ) -> Result<usize, DmaError> {
        let mut state = lock(&self.state);
        let tail = self.tail.load(Ordering::SeqCst);
        let mut free = self.free(state.head, tail);
        if free < done.len() {
            state.head = self.host_head(dma, shared)?;
            free = self.free(state.head, tail);
        }
        let count = done.len().min(free).min((self.size - tail) as usize);
        let entry = |completion: &Completion| Cqe {
            result: U32::new(completion.result),
            reserved: U32::ZERO,
            sq_head: U16::new(sq_head),
            sq_id: U16::new(sq_id),
            cid: U16::new(completion.cid),
            status: U16::new(completion.status.0 << 1 | u16::from(state.phase)),
        };
        let entries: Vec<Cqe> = done[..count].iter().map(entry).collect();
        if count > 0 {
            // The phase tag, which makes an entry valid, is in the same aligned 8 bytes as all that an I/O driver
            // looks at; so a host that polls sees an entry whole or not at all.
            dma.write(self.base.wrapping_add(u64::from(tail) * CQE), entries.as_bytes())?;
            let tail = (tail + count as u32) % self.size;
            state.phase ^= tail == 0;
            self.tail.store(tail, Ordering::SeqCst);
        }
        Ok(count)
    }

    /// Entries that can be posted: one always stays free.
    fn free(&self, head: u32, tail: u32) -> usize {
        ((head + self.size - tail - 1) % self.size) as usize
    }

    fn doorbells<'a>(&self, shared: &'a Shared) -> Option<&'a Doorbells> {
        shared.doorbells.get(usize::from(self.id))
    }

    /// Up to where the host has consumed the queue.
    fn host_head(&self, dma: &mut Dma, shared: &Shared) -> Result<u32, DmaError> {
        let known = self.doorbells(shared).map_or(0, |doorbells| doorbells.head.value());
        let Some(shadow) = shared.shadow.head(self.id) else { return Ok(known) };
        let head = dma.poll(shadow.doorbell, known)?;
        if head < self.size {
            return Ok(head);
        }
        shared.invalid_doorbell(InvalidDoorbell::Value);
        Ok(known)
    }

    /// Waits until the host has consumed something of a full queue.
    fn wait(&self, thread: &mut ThreadContext, shared: &Shared) -> Result<(), Ended> {
        let Some(doorbells) = self.doorbells(shared) else { return Err(Ended) };
        doorbells.head.subscribe();
        let result = self.wait_subscribed(thread, shared);
        doorbells.head.unsubscribe();
        result
    }

    fn wait_subscribed(&self, thread: &mut ThreadContext, shared: &Shared) -> Result<(), Ended> {
        let fatal = |_| {
            shared.fatal();
            Ended
        };
        let full_at = lock(&self.state).head;
        let mut armed = None;
        loop {
            // The host may give others while the thread waits.
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
