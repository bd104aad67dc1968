//! The state that the threads of a controller share: the vfio-user thread, the admin thread, and a worker for each
//! submission queue.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Thread;

use super::disk::Disk;
use super::event::{ErrorInfo, Reports};
use super::queue::CompletionQueue;
use super::spec::{CSTS_FATAL, Status};
use crate::pci::{FunctionContext, PinSource};
use crate::sync::lock;
use viommu_trace::Event;
use viommu_wire::model::Model;

/// A doorbell register of a queue.
#[derive(Default)]
pub(super) struct Doorbell {
    /// The number of entries of the queue; 0 while the queue does not exist.
    size: AtomicU32,
    value: AtomicU32,
    /// The threads that wait for it. A tail always has one, its queue's worker. A head has those that found the queue
    /// full.
    waiters: Mutex<Vec<Thread>>,
}

impl Doorbell {
    /// The queue was created, empty.
    pub fn open(&self, size: u32) {
        self.value.store(0, Ordering::Relaxed);
        self.size.store(size, Ordering::Release);
    }

    /// The queue was loaded, with `size` entries and the doorbell at `value`.
    pub fn restore(&self, size: u32, value: u32) {
        self.open(size);
        self.value.store(value, Ordering::Release);
    }

    /// The queue was deleted.
    pub fn close(&self) {
        self.size.store(0, Ordering::Release);
        lock(&self.waiters).clear();
    }

    /// The last value that the host wrote.
    pub fn value(&self) -> u32 {
        self.value.load(Ordering::Acquire)
    }

    /// The number of entries of the queue; 0 if it does not exist.
    pub fn size(&self) -> u32 {
        self.size.load(Ordering::Acquire)
    }

    /// Unparks the calling thread at each write from now on.
    pub fn subscribe(&self) {
        lock(&self.waiters).push(std::thread::current());
    }

    /// Ends that for the calling thread.
    pub fn unsubscribe(&self) {
        let me = std::thread::current().id();
        lock(&self.waiters).retain(|thread| thread.id() != me);
    }

    /// The host writes the doorbell.
    ///
    /// # Errors
    /// The queue does not exist, or has no such index.
    pub fn ring(&self, value: u32) -> Result<(), InvalidDoorbell> {
        match self.size() {
            0 => Err(InvalidDoorbell::Register),
            size if value >= size => Err(InvalidDoorbell::Value),
            _ => {
                self.value.store(value, Ordering::Release);
                self.wake();
                Ok(())
            }
        }
    }

    /// Unparks the threads that wait for it.
    pub fn wake(&self) {
        lock(&self.waiters).iter().for_each(Thread::unpark);
    }
}

/// An invalid write to a doorbell. The numbers are those of the asynchronous event (section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InvalidDoorbell {
    Register = 0,
    Value = 1,
}

/// Both doorbells of a queue identifier.
#[derive(Default)]
pub(super) struct Doorbells {
    pub tail: Doorbell,
    pub head: Doorbell,
}

/// The addresses of the host's shadow doorbells and event indexes (section 5.7); 0 while there are none.
#[derive(Default)]
pub(super) struct ShadowBuffers {
    doorbells: AtomicU64,
    event_indexes: AtomicU64,
}

/// The addresses of one doorbell's shadow and event index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shadow {
    pub doorbell: u64,
    pub event_index: u64,
}

impl ShadowBuffers {
    /// Sets the buffers' addresses.
    pub fn set(&self, doorbells: u64, event_indexes: u64) {
        self.event_indexes.store(event_indexes, Ordering::Relaxed);
        self.doorbells.store(doorbells, Ordering::Release);
    }

    /// The buffers' addresses: doorbells, event indexes. Both are 0 if there are none.
    pub fn get(&self) -> (u64, u64) {
        (self.doorbells.load(Ordering::Acquire), self.event_indexes.load(Ordering::Relaxed))
    }

    /// The shadow of a submission queue's tail doorbell; `None` for the admin queue, which has only the register.
    pub fn tail(&self, queue: u16) -> Option<Shadow> {
        self.at(queue, 2 * u64::from(queue))
    }

    /// The shadow of a completion queue's head doorbell; `None` for the admin queue.
    pub fn head(&self, queue: u16) -> Option<Shadow> {
        self.at(queue, 2 * u64::from(queue) + 1)
    }

    fn at(&self, queue: u16, index: u64) -> Option<Shadow> {
        let doorbells = self.doorbells.load(Ordering::Acquire);
        if doorbells == 0 || queue == 0 {
            return None;
        }
        let event_indexes = self.event_indexes.load(Ordering::Relaxed);
        Some(Shadow { doorbell: doorbells.wrapping_add(4 * index), event_index: event_indexes.wrapping_add(4 * index) })
    }
}

/// The state that the threads of a controller share.
pub(super) struct SharedController {
    pub context: FunctionContext,
    pub disk: Arc<Disk>,
    /// Controller configuration, for threads other than the one that serves the registers.
    pub cc: AtomicU32,
    /// Controller status.
    pub csts: AtomicU32,
    /// CC.SHN of a shutdown that is in progress or complete, or 0.
    pub shutdown: AtomicU8,
    /// The doorbells, by queue identifier. The first ones are the admin queue's.
    pub doorbells: Box<[Doorbells]>,
    /// The completion queues, including the admin queue's.
    pub cqs: Mutex<Vec<Arc<CompletionQueue>>>,
    pub shadow: ShadowBuffers,
    pub reports: Arc<Reports>,
    /// Whether writes need not be durable at once: a copy of the feature, for the workers.
    pub write_cache: AtomicBool,
}

impl SharedController {
    pub fn new(context: FunctionContext, disk: Arc<Disk>) -> Self {
        let queues = usize::from(disk.config().queues);
        SharedController {
            context,
            disk,
            cc: AtomicU32::new(0),
            csts: AtomicU32::new(0),
            shutdown: AtomicU8::new(0),
            doorbells: (0..=queues).map(|_| Doorbells::default()).collect(),
            cqs: Mutex::default(),
            shadow: ShadowBuffers::default(),
            reports: Arc::default(),
            write_cache: AtomicBool::new(true),
        }
    }

    /// The host writes a doorbell register.
    pub fn ring(&self, queue: usize, is_head: bool, value: u32) {
        let rung = match self.doorbells.get(queue) {
            Some(doorbells) => if is_head { &doorbells.head } else { &doorbells.tail }.ring(value),
            None => Err(InvalidDoorbell::Register),
        };
        if let Err(invalid) = rung {
            self.invalid_doorbell(invalid);
        }
    }

    /// Reports an invalid doorbell write to the host, as an asynchronous event.
    pub fn invalid_doorbell(&self, invalid: InvalidDoorbell) {
        self.reports.events().error(invalid as u8);
        if let Some(admin) = self.doorbells.first() {
            admin.tail.wake();
        }
    }

    /// Adds a command that failed to the error log.
    pub fn log_error(&self, queue: u16, cid: u16, status: Status, nsid: u32, lba: u64) {
        self.disk.count(|c| &c.errors, 1);
        self.reports.errors().push(ErrorInfo { queue, cid, status, nsid, lba });
    }

    /// Sets the fatal status: a queue cannot be accessed, and the controller needs a reset.
    pub fn fatal(&self) {
        if self.csts.fetch_or(CSTS_FATAL, Ordering::SeqCst) & CSTS_FATAL == 0 {
            // Without bus mastering it is expected: QEMU clears it before it resets the function.
            let level = if self.context.dma.is_bus_master() { log::Level::Warn } else { log::Level::Debug };
            log::log!(
                level,
                "NVMe {:#x}: a queue cannot be accessed; the controller needs a reset",
                self.context.dma.endpoint()
            );
            self.trace_state();
        }
    }

    /// Whether [`SharedController::fatal`] was called since the last reset.
    pub fn is_fatal(&self) -> bool {
        self.csts.load(Ordering::Relaxed) & CSTS_FATAL != 0
    }

    pub fn trace_state(&self) {
        let state = u64::from(self.cc.load(Ordering::SeqCst)) | u64::from(self.csts.load(Ordering::SeqCst)) << 32;
        self.context.tracer.emit(Event::Device { endpoint: self.context.dma.endpoint(), model: Model::Nvme, state });
    }
}

impl PinSource for SharedController {
    fn reasons(&self) -> u32 {
        lock(&self.cqs).iter().fold(0, |bits, cq| bits | cq.reason(self))
    }
}
