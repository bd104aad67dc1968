//! The request queue: its chains are taken, executed and answered in batches.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost_user_backend::{VringState, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::REQUESTS;
use super::backend::{Backend, WorkerState};
use super::inject::InjectedFault;
use super::queue::{self, BadChain, Popped};
use super::ring::{Ring, is_served};
use crate::iommu::{NotARequest, Request};
use viommu_trace::Event;
use viommu_wire::virtio_iommu::Tail;

/// Requests that are answered together: one grace period, and one notification at most, for all of them.
const BATCH_MAX: usize = 256;

/// The most batches that the worker serves before it serves the other queue, and lets the frontend have this one.
const ROUNDS_MAX: usize = 8;

/// A batch takes no more requests after this time, and the worker starts no further one before it has served the
/// others. A single LINK of many pages may take longer, but nobody waits for a second one.
const TIME_SLICE: Duration = Duration::from_millis(2);

/// A chain that was executed and is not in the used ring yet.
pub(super) struct PendingAnswer {
    head: u16,
    used: u32,
    start: Instant,
    /// The request's trace event, without its duration.
    event: Option<Event>,
}

impl Backend {
    /// Answers what is in the request queue, batch by batch.
    pub(super) fn serve_requests(&self, worker: &mut WorkerState, rings: &[Ring], memory: &GuestMemoryMmap) {
        let ring = &rings[REQUESTS];
        let begun = Instant::now();
        for round in 0..ROUNDS_MAX {
            if round > 0 && begun.elapsed() >= TIME_SLICE {
                break;
            }
            // Held for a batch, so that a thread that stops the queue waits for the batch and reads the right index.
            let mut state = ring.get_mut();
            if !is_served(&state) {
                return;
            }
            // First find out what a start means: it may be a reset, which would drop what is done here.
            if rings.iter().any(Ring::is_starting) {
                break;
            }
            if !worker.usable[REQUESTS] || worker.silent {
                return;
            }
            if !self.catch_panic(|| self.serve_batch(worker, &mut state, memory)) {
                return self.mark_broken(worker, REQUESTS);
            }
            match ring.rest(&mut state, memory) {
                Some(true) => {}
                Some(false) => return,
                None => return self.mark_broken(worker, REQUESTS),
            }
        }
        self.leave_requests();
    }

    /// Answers one batch. Returns false if the queue is broken.
    fn serve_batch(&self, worker: &mut WorkerState, state: &mut VringState, memory: &GuestMemoryMmap) -> bool {
        let queue = state.get_queue_mut();
        let mut usable = queue.disable_notification(memory).is_ok();
        let begun = Instant::now();
        worker.answers.clear();
        let journal = self.shared.iommu.journal();
        while usable && worker.answers.len() < BATCH_MAX && (worker.answers.is_empty() || begun.elapsed() < TIME_SLICE)
        {
            match queue::pop(queue, memory) {
                Popped::Chain(chain) => {
                    let (start, head) = (Instant::now(), chain.head_index());
                    let filled = worker.buffers.fill(chain, queue.size());
                    let (used, event) = match filled.and_then(|()| self.answer(worker, queue, memory)) {
                        Ok(Some((used, event))) => (used, Some(event)),
                        Ok(None) => {
                            worker.silent = true;
                            break;
                        }
                        Err(BadChain) => {
                            let (readable, writable) = (worker.buffers.readable(), worker.buffers.writable());
                            self.trace_malformed(REQUESTS, head, readable, writable);
                            (0, None)
                        }
                    };
                    worker.answers.push(PendingAnswer { head, used, start, event });
                }
                Popped::Empty => break,
                Popped::Broken => usable = false,
            }
        }
        if worker.answers.is_empty() {
            return usable;
        }
        // The rule on which everything depends: the driver must not learn of a removal while an access may still use
        // what was removed.
        self.shared.iommu.synchronize();
        self.shared.counters.batches.fetch_add(1, Ordering::Relaxed);
        for answer in worker.answers.drain(..) {
            if let Some(event) = answer.event {
                self.shared.tracer.emit(event.after(answer.start.elapsed()));
            }
            // A head outside the queue cannot be returned.
            if answer.head < queue.size() {
                usable &= queue.add_used(memory, answer.head, answer.used).is_ok();
            }
        }
        drop(journal);
        self.notify(REQUESTS, state, memory);
        usable
    }

    /// Executes the request in the buffers and writes its answer. Returns the number of bytes written and the trace
    /// event; `None` for a request that a test wants to stay unanswered.
    fn answer(
        &self,
        worker: &mut WorkerState,
        queue: &Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<(u32, Event)>, BadChain> {
        let WorkerState { buffers, request, reply, .. } = worker;
        request.resize(Request::MAX_LEN, 0);
        let len = buffers.read(memory, request)?;
        let iommu = &self.shared.iommu;
        let bytes = &request[..len];
        let request = Request::parse(bytes, iommu.features()).map_err(|error| {
            if let NotARequest::UnknownType(_) = error {
                self.shared.counters.unknown.fetch_add(1, Ordering::Relaxed);
            }
            BadChain
        })?;
        // The tail is the last four bytes of the device-writable part, whose length may vary.
        let writable = buffers.writable();
        let properties = writable.checked_sub(size_of::<Tail>()).ok_or(BadChain)?;
        buffers.check_writable(memory)?;
        reply.clear();
        reply.resize(writable, 0);
        let (properties, tail) = reply.split_at_mut(properties);
        let injected = self
            .shared
            .injector
            .get()
            .and_then(|injector| injector.decide(request.request_type(), &self.shared.tracer));
        let outcome = match injected {
            None => iommu.execute(&request, properties),
            Some(InjectedFault::Refused(status)) => iommu.refuse(&request, status),
            Some(InjectedFault::Late(wait)) => {
                wait.wait(|| queue::available(queue, memory));
                iommu.execute(&request, properties)
            }
            Some(InjectedFault::Silent) => return Ok(None),
        };
        tail[0] = outcome.status as u8;
        buffers.write(memory, reply)?;
        Ok(Some((writable as u32, request.event(outcome, iommu.granule()))))
    }
}
