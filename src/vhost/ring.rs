//! A virtqueue as vhost-user-backend keeps it, with facts that the crate does not report to a device.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::event::EventConsumer;

use super::QueueMemory;
use super::kicks::Kicks;
use super::queue::{self, Taken};
use crate::sync::lock;
use viommu_socket::set_nonblocking;

/// A virtqueue that knows whether it was just started and whether it was kicked. It never ends a connection because of
/// values that a guest wrote into its registers.
#[derive(Clone)]
pub(super) struct Ring {
    inner: VringMutex<QueueMemory>,
    /// Held while waiting for the lock in `inner`. The worker takes that lock again right after each batch; this way it
    /// cannot overtake a frontend that is waiting for it.
    handoff: Arc<Mutex<()>>,
    watch: Arc<Watch>,
}

#[derive(Default)]
struct Watch {
    /// It was started, and the worker has not seen that yet.
    started: AtomicBool,
    /// It was kicked, and the worker has not seen that yet.
    kicked: AtomicBool,
    /// The driver's size is impossible for a split virtqueue.
    odd_size: AtomicBool,
    /// Locked only while the queue is locked.
    kicks: Mutex<Kicks>,
    /// The epoll with which the worker waits, and the queue's number there.
    epoll: OnceLock<(OwnedFd, usize)>,
}

/// Whether the frontend started and enabled the queue.
pub(super) fn is_served(state: &VringState) -> bool {
    state.is_enabled() && state.get_queue().ready()
}

impl Ring {
    /// Whether the queue was started since the last call.
    pub(super) fn take_started(&self) -> bool {
        self.watch.started.swap(false, Ordering::AcqRel)
    }

    /// Whether the queue was started since [`Ring::take_started`] was called last.
    pub(super) fn is_starting(&self) -> bool {
        self.watch.started.load(Ordering::Acquire)
    }

    /// Whether the driver kicked the queue since the last call. Enabling a queue also wakes the worker, but is no kick.
    pub(super) fn take_kicked(&self) -> bool {
        self.watch.kicked.swap(false, Ordering::AcqRel)
    }

    /// Whether the queue is served and not empty.
    pub(super) fn has_more(&self, memory: &GuestMemoryMmap) -> bool {
        let state = self.inner.get_ref();
        is_served(&state) && queue::available(state.get_queue(), memory) != Some(0)
    }

    /// Notes that a thread polls the queue from now on, so that the driver need not kick. `false` if the queue is not
    /// served.
    pub(super) fn begin_polling(&self, memory: &GuestMemoryMmap) -> bool {
        let mut state = self.get_mut();
        let served = is_served(&state);
        if served {
            self.kicks().begin_polling(&mut Taken { queue: state.get_queue_mut(), memory });
        }
        served
    }

    /// Notes that nobody polls the queue any more. Returns whether the worker has to check it now.
    pub(super) fn end_polling(&self, memory: &GuestMemoryMmap) -> bool {
        let mut state = self.get_mut();
        let served = is_served(&state);
        let mut queue = Taken { queue: state.get_queue_mut(), memory };
        self.kicks().end_polling(served.then_some(&mut queue))
    }

    /// To be called, with the queue locked, when everything found in it was taken. Returns whether there is more;
    /// `None` if that cannot be read.
    pub(super) fn rest(&self, state: &mut VringState<QueueMemory>, memory: &GuestMemoryMmap) -> Option<bool> {
        self.kicks().rest(&mut Taken { queue: state.get_queue_mut(), memory })
    }

    fn kicks(&self) -> MutexGuard<'_, Kicks> {
        lock(&self.watch.kicks)
    }

    /// Sets the epoll with which the worker waits for kicks, and the queue's number in it. To be called once.
    pub(super) fn set_epoll(&self, epoll: BorrowedFd<'_>, number: usize) -> io::Result<()> {
        let epoll = epoll.try_clone_to_owned()?;
        let _ = self.watch.epoll.set((epoll, number));
        Ok(())
    }

    /// Reads the kick, and returns whether the queue is to be served. The worker must neither end nor wait here: since
    /// the descriptor was found readable, it may have been replaced, or its kick may have been read.
    fn consume(&self) -> bool {
        let state = self.inner.get_ref();
        let Some(kick) = state.get_kick() else { return false };
        match kick.consume() {
            Ok(()) => {
                self.watch.kicked.store(true, Ordering::Release);
                state.is_enabled()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                log::warn!("A virtqueue's kick descriptor cannot be read and is closed: {error}");
                let broken = kick.as_raw_fd();
                drop(state);
                let _handoff = self.handoff();
                // The frontend may have given another one meanwhile, while this one was still open.
                let is_broken = |kick: &EventConsumer| kick.as_raw_fd() == broken;
                if self.inner.get_ref().get_kick().as_ref().is_some_and(is_broken) {
                    self.replace_kick(None);
                }
                false
            }
        }
    }

    /// Replaces the kick's descriptor. The frontend may also hold the old one's open file. Closing the descriptor here
    /// would then leave that file in the worker's epoll, and a write to it would wake the worker for ever.
    fn replace_kick(&self, file: Option<File>) {
        if let (Some((epoll, _)), Some(kick)) = (self.watch.epoll.get(), self.inner.get_ref().get_kick()) {
            // An error is normal: most often it is not registered, since the queue was stopped before.
            let _ = control(epoll, libc::EPOLL_CTL_DEL, kick.as_raw_fd(), 0);
        }
        self.inner.set_kick(file);
        let state = self.inner.get_ref();
        // The crate registers a kick only when its queue is started or enabled.
        if let (Some((epoll, number)), Some(kick)) = (self.watch.epoll.get(), state.get_kick())
            && is_served(&state)
            && let Err(error) = control(epoll, libc::EPOLL_CTL_ADD, kick.as_raw_fd(), *number as u64)
        {
            log::warn!("A virtqueue's kick descriptor cannot be waited for: {error}");
        }
    }

    /// Waits for the others that want the lock in `inner`. To be held until the caller has that lock.
    fn handoff(&self) -> MutexGuard<'_, ()> {
        lock(&self.handoff)
    }

    /// Whether the driver's size is possible for a split virtqueue. If not, the queue's size is not the driver's.
    pub(super) fn has_size(&self) -> bool {
        !self.watch.odd_size.load(Ordering::Acquire)
    }
}

impl<'a> VringStateGuard<'a, QueueMemory> for Ring {
    type G = <VringMutex<QueueMemory> as VringStateGuard<'a, QueueMemory>>::G;
}

impl<'a> VringStateMutGuard<'a, QueueMemory> for Ring {
    type G = <VringMutex<QueueMemory> as VringStateMutGuard<'a, QueueMemory>>::G;
}

impl VringT<QueueMemory> for Ring {
    fn new(mem: QueueMemory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Ring { inner: VringMutex::new(mem, max_queue_size)?, handoff: Arc::default(), watch: Arc::default() })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, QueueMemory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, QueueMemory>>::G {
        let _handoff = self.handoff();
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        let _handoff = self.handoff();
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.inner.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    /// Never an error: that would end the connection, and with it the guest, for good. A used ring that lies partly
    /// outside memory is found when the queue starts.
    fn queue_used_idx(&self) -> Result<u16, Error> {
        Ok(self.inner.queue_used_idx().unwrap_or(0))
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
        let taken = self.inner.get_ref().get_queue().size() == num;
        self.watch.odd_size.store(!taken, Ordering::Release);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        let _handoff = self.handoff();
        // Both are set with the queue locked: a thread that finds it ready also knows whether its start was seen.
        let mut state = self.inner.get_mut();
        state.get_queue_mut().set_ready(ready);
        self.watch.started.store(ready, Ordering::Release);
    }

    fn set_kick(&self, file: Option<File>) {
        let _handoff = self.handoff();
        self.replace_kick(file.filter(never_waits));
    }

    fn read_kick(&self) -> io::Result<bool> {
        Ok(self.consume())
    }

    fn set_call(&self, file: Option<File>) {
        let _handoff = self.handoff();
        self.inner.set_call(file.filter(never_waits));
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

/// Makes the descriptor nonblocking, so that the worker never waits for the frontend. Returns false if that fails.
fn never_waits(file: &File) -> bool {
    set_nonblocking(file)
        .inspect_err(|error| log::warn!("A virtqueue's descriptor cannot be made nonblocking: {error}"))
        .is_ok()
}

/// Adds a descriptor to an epoll or removes it.
fn control(epoll: &OwnedFd, operation: libc::c_int, fd: RawFd, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: data };
    // SAFETY: the event is a local variable that lives through the call. The kernel checks both descriptors.
    let result = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), operation, fd, &raw mut event) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
