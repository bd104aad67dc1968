//! Faults: from a refused access to the driver's event queue.

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::sync::lock;
use viommu_trace::event::Access;
use viommu_wire::virtio_iommu::{FaultFlags, FaultReason, FaultRecord};

/// An access that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The endpoint.
    pub endpoint: u32,
    /// Why.
    pub reason: FaultReason,
    /// Read or write.
    pub access: Access,
    /// The first I/O virtual address that could not be accessed.
    pub address: u64,
    /// The domain that the endpoint was attached to.
    pub domain: Option<u32>,
}

impl Fault {
    /// The record for the driver (section 5.13.6.9).
    fn record(&self) -> FaultRecord {
        let access = match self.access {
            Access::Read => FaultFlags::READ,
            Access::Write => FaultFlags::WRITE,
        };
        FaultRecord {
            reason: self.reason as u8,
            flags: (access | FaultFlags::ADDRESS).bits().into(),
            endpoint: self.endpoint.into(),
            address: self.address.into(),
            ..FaultRecord::default()
        }
    }
}

/// Called, from any thread, when a fault was queued. It must not wait.
pub type FaultListener = Box<dyn Fn() + Send + Sync>;

/// The faults that wait for a buffer of the driver.
pub(super) struct FaultQueue {
    limit: usize,
    pending: Mutex<VecDeque<FaultRecord>>,
    listener: Mutex<Option<FaultListener>>,
}

impl FaultQueue {
    pub(super) fn new(limit: usize) -> Self {
        FaultQueue { limit, pending: Mutex::default(), listener: Mutex::default() }
    }

    /// Queues a fault. If the queue is full, the fault is dropped: the older ones are kept, since they are nearer to the
    /// cause. `record` is called with whether the fault is queued, before anybody can take it.
    pub(super) fn push(&self, fault: &Fault, record: impl FnOnce(bool)) {
        {
            let mut pending = lock(&self.pending);
            let queued = pending.len() < self.limit;
            record(queued);
            if !queued {
                return;
            }
            pending.push_back(fault.record());
        }
        if let Some(listener) = &*lock(&self.listener) {
            listener();
        }
    }

    pub(super) fn pop(&self) -> Option<FaultRecord> {
        lock(&self.pending).pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.pending).is_empty()
    }

    /// Drops all pending faults. If there are any, `record` is called with their number before a newer one can come.
    pub(super) fn clear(&self, record: impl FnOnce(usize)) {
        let mut pending = lock(&self.pending);
        if !pending.is_empty() {
            record(pending.len());
            pending.clear();
        }
    }

    pub(super) fn listen(&self, listener: Option<FaultListener>) {
        *lock(&self.listener) = listener;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    const FAULT: Fault =
        Fault { endpoint: 8, reason: FaultReason::Mapping, access: Access::Write, address: 0x1234, domain: Some(1) };

    #[test]
    fn a_full_queue_keeps_the_oldest() {
        let queue = FaultQueue::new(2);
        let woken = Arc::new(AtomicU32::new(0));
        let counter = woken.clone();
        queue.listen(Some(Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        })));
        for (address, queued) in [(0x1234, true), (0x1234, true), (0, false)] {
            queue.push(&Fault { address, ..FAULT }, |found| assert_eq!(found, queued));
        }
        assert_eq!(woken.load(Ordering::Relaxed), 2);
        let record = queue.pop().unwrap();
        assert_eq!(record.address.get(), 0x1234);
        assert_eq!(record.flags.get(), 0x102);
        assert_eq!(record.reserved, [0; 3]);
        assert_eq!(queue.pop().unwrap().address.get(), 0x1234);
        assert!(queue.is_empty());
    }
}
