//! A virtqueue as vhost-user-backend keeps it, with what that crate does not tell a device.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};
use vm_memory::GuestMemoryMmap;

use super::backend::is_served;
use super::queue;
use crate::dma::Memory;
use crate::socket::set_nonblocking;

/// A virtqueue that knows whether it was just started, whether it was kicked, and that never ends a connection for
/// what a guest wrote into its registers.
#[derive(Clone)]
pub(super) struct Ring {
    inner: VringMutex<Memory>,
    /// Held by who waits for the lock in `inner`: so the worker, which takes that lock again right after each batch,
    /// cannot take it before the frontend that waits for it.
    turn: Arc<Mutex<()>>,
    watch: Arc<Watch>,
}

/// How many looks at an empty queue it takes to see a kick.
const LOOKS: u32 = 64;

#[derive(Default)]
struct Watch {
    /// Started, and not seen by the worker yet.
    started: AtomicBool,
    /// Kicked, and not seen by the worker yet.
    kicked: AtomicBool,
    /// The driver's size cannot be that of a split virtqueue.
    odd_size: AtomicBool,
    /// Looks at the queue while it was empty.
    looks: AtomicU32,
}

impl Ring {
    /// Whether the queue was started since the last call.
    pub(super) fn take_started(&self) -> bool {
        self.watch.started.swap(false, Ordering::AcqRel)
    }

    /// Whether the driver kicked the queue since the last call. Enabling a queue wakes the worker too, which is no kick.
    pub(super) fn take_kicked(&self) -> bool {
        self.watch.kicked.swap(false, Ordering::AcqRel)
    }

    /// Reads the kick of a queue that is served, and returns whether there was one. To see that the queue is empty costs
    /// less than to read the descriptor in vain, and is enough nearly always: a kick of an empty queue is for requests
    /// that were found with those before.
    pub(super) fn look(&self, memory: &GuestMemoryMmap) -> bool {
        let state = self.inner.get_ref();
        if !is_served(&state) {
            return false;
        }
        let empty = queue::available(state.get_queue(), memory) == Some(0);
        if empty && !self.watch.looks.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOKS) {
            return false;
        }
        self.consume(state)
    }

    /// Reads the kick, and returns whether the queue is to be served. The worker must not end, and must not wait: the
    /// descriptor may have been exchanged, or its kick read, since it was found readable.
    fn consume(&self, state: <Self as VringStateGuard<'_, Memory>>::G) -> bool {
        let Some(kick) = state.get_kick() else { return false };
        match kick.consume() {
            Ok(()) => {
                self.watch.kicked.store(true, Ordering::Release);
                state.is_enabled()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                log::warn!("A virtqueue's kick descriptor cannot be read and is closed: {error}");
                drop(state);
                self.inner.set_kick(None);
                false
            }
        }
    }

    /// Waits until it is the caller's turn to take the lock in `inner`, and makes others wait until it has it.
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the driver's size can be that of a split virtqueue; if not, the size is not the driver's.
    pub(super) fn has_size(&self) -> bool {
        !self.watch.odd_size.load(Ordering::Acquire)
    }
}

impl<'a> VringStateGuard<'a, Memory> for Ring {
    type G = <VringMutex<Memory> as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Ring {
    type G = <VringMutex<Memory> as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for Ring {
    fn new(mem: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Ring { inner: VringMutex::new(mem, max_queue_size)?, turn: Arc::default(), watch: Arc::default() })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        let _turn = self.turn();
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
        let _turn = self.turn();
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

    /// A used ring that lies partly outside of memory is found when the queue starts; an error here would end the
    /// connection, and with it the guest, for good.
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
        let _turn = self.turn();
        self.inner.set_queue_ready(ready);
        self.watch.started.store(ready, Ordering::Release);
    }

    fn set_kick(&self, file: Option<File>) {
        let _turn = self.turn();
        self.inner.set_kick(file.filter(never_waits));
    }

    fn read_kick(&self) -> io::Result<bool> {
        Ok(self.consume(self.inner.get_ref()))
    }

    fn set_call(&self, file: Option<File>) {
        let _turn = self.turn();
        self.inner.set_call(file.filter(never_waits));
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

/// Makes sure that the worker never waits for the frontend. Returns false if that is not possible.
fn never_waits(file: &File) -> bool {
    set_nonblocking(file)
        .inspect_err(|error| log::warn!("A virtqueue's descriptor cannot be used without waiting: {error}"))
        .is_ok()
}
