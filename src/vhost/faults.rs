//! The event queue: the device writes faults into the buffers that the driver provided.

use vhost_user_backend::{VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use zerocopy::IntoBytes;

use super::EVENTS;
use super::backend::{Backend, WorkerState};
use super::queue::{self, BadChain, ChainBuffers, Popped};
use super::ring::{Ring, is_served};
use viommu_wire::virtio_iommu::FaultRecord;

impl Backend {
    /// Moves faults into the event queue's buffers while there are any. The rest waits until the worker is woken again.
    pub(super) fn deliver_faults(&self, worker: &mut WorkerState, rings: &[Ring], memory: &GuestMemoryMmap) {
        let ring = &rings[EVENTS];
        let mut state = ring.get_mut();
        if !is_served(&state) || !worker.usable[EVENTS] {
            return;
        }
        // First find out what a start means: a reset drops the faults.
        if rings.iter().any(Ring::is_starting) {
            drop(state);
            return self.leave_requests();
        }
        if !self.catch_panic(|| self.serve_faults(worker, &mut state, memory)) {
            self.mark_broken(worker, EVENTS);
        }
    }

    /// Delivers what can be delivered. Returns false if the queue is broken.
    fn serve_faults(&self, worker: &mut WorkerState, state: &mut VringState, memory: &GuestMemoryMmap) -> bool {
        let queue = state.get_queue_mut();
        let (mut usable, mut used_any) = (true, false);
        // Take no more than the ring holds: a driver that keeps adding useless buffers must not keep the worker busy.
        for _ in 0..queue.size() {
            if !usable || !self.shared.iommu.has_fault() {
                break;
            }
            match queue::pop(queue, memory) {
                Popped::Chain(chain) => {
                    let head = chain.head_index();
                    let filled = worker.buffers.fill(chain, queue.size());
                    let used = match filled.and_then(|()| self.write_fault(&worker.buffers, memory)) {
                        Ok(used) => used,
                        Err(BadChain) => {
                            let (readable, writable) = (worker.buffers.readable(), worker.buffers.writable());
                            self.trace_malformed(EVENTS, head, readable, writable);
                            0
                        }
                    };
                    if head < queue.size() {
                        usable &= queue.add_used(memory, head, used).is_ok();
                        used_any = true;
                    }
                }
                Popped::Empty => {
                    // Ask for a kick, and check once more for a buffer that came meanwhile.
                    match queue.enable_notification(memory) {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(_) => usable = false,
                    }
                }
                Popped::Broken => usable = false,
            }
        }
        if used_any {
            self.notify(EVENTS, state, memory);
        }
        usable
    }

    /// Writes the oldest fault into the buffers. Returns the bytes written.
    fn write_fault(&self, buffers: &ChainBuffers, memory: &GuestMemoryMmap) -> Result<u32, BadChain> {
        if buffers.writable() < size_of::<FaultRecord>() {
            return Err(BadChain);
        }
        buffers.check_writable(memory)?;
        if let Some(record) = self.shared.iommu.next_fault() {
            buffers.write(memory, record.as_bytes())?;
            return Ok(size_of::<FaultRecord>() as u32);
        }
        Ok(0)
    }
}
