//! The device as vhost-user-backend drives it: one thread handles the frontend's messages, another the queues.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::queue::{self, ChainBuffers};
use super::requests::PendingAnswer;
use super::ring::Ring;
use super::table::{MemoryTable, TableError};
use super::{QUEUES, QueueMemory, REQUESTS, SharedDevice, config};
use crate::sync::lock;
use viommu_trace::Event;
use viommu_trace::event::Channel;
use viommu_trace::record::NO_ENDPOINT;

/// The largest virtqueue that the device accepts, in case QEMU is configured with another size than
/// [`super::QUEUE_SIZE`].
const QUEUE_SIZE_MAX: usize = 1024;

/// The epoll token of [`Backend::wake`]. The crate uses the numbers up to the count of queues.
const WAKE_TOKEN: u16 = QUEUES as u16 + 1;

/// The features that the device offers beside those of its type.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_IN_ORDER
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// One connection's device.
pub(super) struct Backend {
    pub(super) shared: Arc<SharedDevice>,
    table: MemoryTable,
    /// The queues, once the worker has seen them.
    rings: OnceLock<Vec<Ring>>,
    /// State that only the thread that serves the queues uses.
    worker: Mutex<WorkerState>,
    /// Wakes the worker when a fault was queued or requests are left.
    wake: (EventConsumer, EventNotifier),
    /// The worker has stopped before the request queue was empty, and is to go on.
    left: AtomicBool,
    /// Ends the worker. The crate takes the consumer and never closes it: see [`Backend::end`].
    exit: Mutex<Option<RawFd>>,
    /// Guest memory as it was traced last: address and length of each region.
    traced_memory: Mutex<BTreeSet<(u64, u64)>>,
}

/// The worker's own state.
#[derive(Default)]
pub(super) struct WorkerState {
    pub(super) buffers: ChainBuffers,
    pub(super) answers: Vec<PendingAnswer>,
    /// The part of a chain's device-readable bytes that is read.
    pub(super) request: Vec<u8>,
    /// Bytes that are written into a chain.
    pub(super) reply: Vec<u8>,
    /// Whether a queue was set up correctly and nothing impossible was found in it since.
    pub(super) usable: [bool; QUEUES],
    /// The request queue is left alone until it is started again, though nothing is wrong with it: a test wants it so.
    pub(super) silent: bool,
    /// The index at which the queue was started.
    base: [u16; QUEUES],
}

impl Backend {
    pub(super) fn new(shared: Arc<SharedDevice>) -> io::Result<Arc<Self>> {
        let wake = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Arc::new(Backend {
            shared,
            table: MemoryTable::new(),
            rings: OnceLock::new(),
            worker: Mutex::default(),
            wake,
            left: AtomicBool::new(false),
            exit: Mutex::new(None),
            traced_memory: Mutex::default(),
        }))
    }

    /// The descriptor and the token that wake the worker.
    pub(super) fn wake_source(&self) -> (RawFd, u64) {
        (self.wake.0.as_raw_fd(), u64::from(WAKE_TOKEN))
    }

    /// Something that wakes the worker.
    pub(super) fn waker(&self) -> io::Result<EventNotifier> {
        self.wake.1.try_clone()
    }

    /// Cleans up when the connection and all the crate's threads are gone. To be called once.
    pub(super) fn end(&self) {
        (0..QUEUES).for_each(|index| self.stop(index));
        // Never an error without a region.
        let _ = self.use_memory(&GuestMemoryMmap::new());
        if let Some(fd) = lock(&self.exit).take() {
            // SAFETY: the crate took the consumer apart into this descriptor, registered it with an epoll that is
            // closed by now, and dropped every trace of it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }

    /// Waits until the worker has seen the queues, and gives them the epoll that it waits with. To be called before the
    /// frontend is served: a kick that the frontend replaces must be removed from that epoll.
    pub(super) fn introduce(&self, epoll: BorrowedFd<'_>) -> io::Result<()> {
        self.wake.1.notify()?;
        let mut rings = self.rings.wait().iter().enumerate();
        rings.try_for_each(|(number, ring)| ring.set_epoll(epoll, number))
    }

    /// Notes that a thread polls a queue from now on, so that the driver need not kick. `false` if it is not served.
    pub(super) fn begin_polling(&self, index: usize) -> bool {
        self.ring(index).is_some_and(|ring| ring.begin_polling(&self.table.memory().memory()))
    }

    /// Serves a queue that has something, as the worker does after a kick. Returns whether anything was served.
    pub(super) fn poll(&self, index: usize) -> bool {
        let Some(rings) = self.rings.get() else { return false };
        if !rings.get(index).is_some_and(|ring| ring.has_more(&self.table.memory().memory())) {
            return false;
        }
        let served = &self.shared.counters.batches;
        let before = served.load(Ordering::Relaxed);
        self.serve_catching_panics(index as u16, rings);
        // A broken queue has something but nothing is served.
        served.load(Ordering::Relaxed) != before
    }

    /// Notes that nobody polls the queue any more. The driver kicks again, and the worker is woken now if need be.
    pub(super) fn end_polling(&self, index: usize) {
        if self.ring(index).is_some_and(|ring| ring.end_polling(&self.table.memory().memory())) {
            self.leave_requests();
        }
    }

    /// Makes the worker check the request queue soon.
    pub(super) fn leave_requests(&self) {
        self.left.store(true, Ordering::Release);
        if let Err(error) = self.wake.1.notify() {
            log::warn!("The worker cannot be woken, and requests wait for the next kick: {error}");
        }
    }

    fn ring(&self, index: usize) -> Option<&Ring> {
        self.rings.get()?.get(index)
    }

    /// Never an error, and never a panic: either would end the worker for good.
    fn serve_catching_panics(&self, event: u16, rings: &[Ring]) {
        // Stays locked until a failure is noted: nobody may see a queue start in between.
        let mut worker = lock(&self.worker);
        let whole = self.catch_panic(|| {
            self.serve(&mut worker, event, rings);
            !self.lost_memory()
        });
        if !whole {
            (0..QUEUES).for_each(|index| self.mark_broken(&mut worker, index));
        }
    }

    /// The worker was woken.
    fn serve(&self, worker: &mut WorkerState, event: u16, rings: &[Ring]) {
        let rings = self.rings.get_or_init(|| rings.to_vec());
        let memory = self.table.memory().memory();
        for (index, ring) in rings.iter().enumerate() {
            if ring.take_started() {
                self.start(worker, index, ring, &memory);
                worker.silent &= index != REQUESTS;
            }
        }
        if event == WAKE_TOKEN {
            // An empty counter is no error: an earlier wake has read it.
            let _ = self.wake.0.consume();
        }
        for (index, ring) in rings.iter().enumerate() {
            if ring.take_kicked() {
                self.trace_kick(index, worker.base[index], ring, &memory);
            }
        }
        if usize::from(event) == REQUESTS || self.left.swap(false, Ordering::AcqRel) {
            self.serve_requests(worker, rings, &memory);
        }
        self.deliver_faults(worker, rings, &memory);
    }

    /// Notes that a queue was started, where, and whether it can be used.
    fn start(&self, worker: &mut WorkerState, index: usize, ring: &Ring, memory: &GuestMemoryMmap) {
        // Stays locked until the lifecycle knows of the start, so that a frontend cannot stop the queue before that.
        let state = ring.get_ref();
        let queue = state.get_queue();
        let (base, size) = (queue.next_avail(), queue.size());
        (worker.base[index], worker.usable[index]) = (base, queue.ready());
        if !queue.ready() {
            // It was stopped again before anybody saw it start.
            return;
        }
        let valid = ring.has_size() && queue.is_valid(memory) && !self.table.is_lost();
        self.shared.queue_started(index, base);
        self.shared.tracer.emit(Event::Queue { queue: index as u8, started: true, index: base, size });
        drop(state);
        if !valid {
            self.mark_broken(worker, index);
        }
    }

    /// Notes and traces that a queue was stopped, if it was running.
    fn stop(&self, index: usize) {
        let Some(ring) = self.rings.get().and_then(|rings| rings.get(index)) else { return };
        let (base, size) = (ring.queue_next_avail(), ring.get_ref().get_queue().size());
        if self.shared.queue_stopped(index, base) {
            self.shared.tracer.emit(Event::Queue { queue: index as u8, started: false, index: base, size });
        }
    }

    /// Uses this memory from now on, and traces how it differs from the previous one.
    fn use_memory(&self, memory: &GuestMemoryMmap) -> Result<(), TableError> {
        self.table.replace(memory)?;
        let new: BTreeSet<(u64, u64)> = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        let mut old = lock(&self.traced_memory);
        let trace = |added, &(gpa, len): &(u64, u64)| {
            let channel = Channel::VhostUser;
            self.shared.tracer.emit(Event::Memory { channel, endpoint: None, added, gpa, len, writable: true });
        };
        old.difference(&new).for_each(|region| trace(false, region));
        new.difference(&old).for_each(|region| trace(true, region));
        *old = new;
        Ok(())
    }

    /// Whether a page with a queue or a request was lost to SIGBUS, and this was not logged before.
    fn lost_memory(&self) -> bool {
        let lost = self.table.is_newly_lost();
        if lost {
            log::error!(
                "Guest memory that the virtqueues use is not available (SIGBUS): its file was truncated, its file system is \
                 full, or no huge page is left. The queues are ignored until the driver resets the device and QEMU hands \
                 over its memory again"
            );
        }
        lost
    }

    /// Something impossible was found in a queue. It is left alone until it is set up again. The specification's way to
    /// report this, DEVICE_NEEDS_RESET, does not exist in vhost-user.
    pub(super) fn mark_broken(&self, worker: &mut WorkerState, index: usize) {
        worker.usable[index] = false;
        log::warn!("Virtqueue {index} is broken and is ignored until the driver resets the device");
        self.trace_malformed(index, 0, 0, 0);
    }

    /// Runs a function that serves a queue. Returns false if it panics: the queue is then not to be trusted any more.
    /// The caller must take the queue's lock outside of `serve`: a panic that unwound past the lock would poison it,
    /// and then the crate would panic too.
    pub(super) fn catch_panic(&self, serve: impl FnOnce() -> bool) -> bool {
        // The call may leave two things half done: the queue, which is left alone from now on, and the worker's
        // buffers, which are filled again for each request.
        self.shared.tracer.catch_panic(NO_ENDPOINT, serve).unwrap_or_else(|| {
            log::error!("Caught a panic while serving the virtqueues");
            false
        })
    }

    /// Traces a kick of the driver. QEMU also kicks each queue when it hands the queue over; such a kick is recognised
    /// by a queue that is empty and was never used.
    fn trace_kick(&self, index: usize, base: u16, ring: &Ring, memory: &GuestMemoryMmap) {
        let (requests, next) = {
            let state = ring.get_ref();
            let queue = state.get_queue();
            (queue::available(queue, memory).unwrap_or(0), queue.next_avail())
        };
        if requests == 0 && next == base {
            return;
        }
        self.shared.counters.kicks.fetch_add(1, Ordering::Relaxed);
        self.shared.tracer.emit(Event::Kick { queue: index as u8, requests: u32::from(requests) });
    }

    pub(super) fn trace_malformed(&self, index: usize, head: u16, readable: usize, writable: usize) {
        self.shared.counters.malformed.fetch_add(1, Ordering::Relaxed);
        self.shared.tracer.emit(Event::Malformed {
            queue: index as u8,
            head,
            readable: readable as u32,
            writable: writable as u32,
            used: 0,
        });
    }

    /// Notifies the driver of used entries that were just added, if it asked to be notified of one of them.
    pub(super) fn notify(&self, index: usize, state: &mut VringState, memory: &GuestMemoryMmap) {
        if !queue::needs_notification(state.get_queue_mut(), memory) || state.get_call().is_none() {
            return;
        }
        if let Err(error) = state.signal_used_queue() {
            log::warn!("The driver cannot be notified of virtqueue {index}: {error}");
            return;
        }
        self.shared.counters.notifications.fetch_add(1, Ordering::Relaxed);
        self.shared.tracer.emit(Event::Interrupt { endpoint: None, vector: index as u16 });
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        FEATURES | self.shared.iommu.offered()
    }

    fn acked_features(&self, features: u64) {
        self.shared.iommu.set_features(features);
        self.shared.tracer.emit(Event::Features { offered: self.features(), accepted: features });
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate sets it in the queues.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        config::read(&self.shared.iommu, offset, size)
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        // Never an error, whatever the guest wrote, since an error would end the connection.
        config::write(&self.shared.iommu, &self.shared.tracer, offset, buf);
        Ok(())
    }

    fn update_memory(&self, memory: QueueMemory) -> io::Result<()> {
        self.use_memory(&memory.memory()).map_err(|error| {
            log::warn!("Refused the frontend's memory: {error}");
            io::Error::new(io::ErrorKind::InvalidInput, error)
        })
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|error| log::error!("Cannot make the event that ends the virtqueues' worker: {error}"))
            .ok()?;
        *lock(&self.exit) = Some(exit.0.as_raw_fd());
        Some(exit)
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        self.stop(index as usize);
        Ok(())
    }

    fn handle_event(&self, event: u16, _events: EventSet, rings: &[Ring], _thread: usize) -> io::Result<()> {
        self.serve_catching_panics(event, rings);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::{Iommu, Settings};
    use viommu_trace::Tracer;

    #[test]
    fn a_panic_ends_neither_the_worker_nor_the_queue_s_lock() {
        let tracer = Tracer::default();
        let iommu = Iommu::new(Settings::default(), tracer.clone());
        let (lifecycle, counters, poller, injector) = Default::default();
        let shared = SharedDevice { iommu, tracer, lifecycle, counters, poller, injector };
        let memory = QueueMemory::new(GuestMemoryMmap::new());
        let backend = Backend::new(Arc::new(shared)).unwrap();
        let ring = Ring::new(memory, 256).unwrap();
        let mut state = ring.get_mut();
        let usable = backend.catch_panic(|| {
            state.get_queue_mut().set_size(128);
            panic!("a bug of the device's");
        });
        assert!(!usable);
        drop(state);
        assert_eq!(ring.get_ref().get_queue().size(), 128);
        assert!(backend.catch_panic(|| true));
    }
}
