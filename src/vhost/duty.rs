//! The request queue as another thread than its worker serves it, while that one sleeps.
//!
//! Who takes the kick disarms its descriptor in the worker's epoll; so a kick stays in the descriptor until it is read,
//! by one or the other, and none is lost or told twice. Giving it back arms it again: epoll is level-triggered, so a
//! kick that came in between wakes the worker.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vhost_user_backend::{VringEpollHandler, VringT};

use super::backend::{Backend, is_served};
use super::{Control, REQUESTS};
use crate::duty::Duty;

/// Who serves the request queue.
#[derive(Default)]
pub(super) struct Kick {
    taken: AtomicBool,
    /// Of the frontend that is connected. Locked for reading while another thread than its worker serves it.
    connection: RwLock<Option<Connection>>,
}

/// A backend and the crate's epoll for it.
pub(super) struct Connection {
    pub backend: Arc<Backend>,
    pub epoll: Arc<VringEpollHandler<Arc<Backend>>>,
}

impl Kick {
    /// A frontend came, or goes. When this returns, nobody serves the one before any more.
    pub fn connect(&self, connection: Option<Connection>) {
        *self.connection.write().unwrap_or_else(PoisonError::into_inner) = connection;
    }

    fn with_connection(&self, act: impl FnOnce(&Connection) -> bool) -> bool {
        self.connection.read().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(act)
    }
}

impl Connection {
    /// Has kicks wake the worker, or not. Returns whether that could be: the queue must be started and enabled.
    fn arm(&self, armed: bool) -> bool {
        let Some(ring) = self.backend.ring(REQUESTS) else { return false };
        // Locked until the end: the frontend that stops the queue takes the descriptor away after that.
        let state = ring.get_ref();
        let Some(kick) = state.get_kick().as_ref().filter(|_| is_served(&state)) else { return false };
        let events = if armed { libc::EPOLLIN } else { 0 };
        // The crate's number of a queue is its index, and what is not registered yet will be, armed.
        let mut event = libc::epoll_event { events: events as u32, u64: REQUESTS as u64 };
        // SAFETY: both descriptors are open, as `self` and `state` keep them so; the event outlives the call.
        unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_MOD, kick.as_raw_fd(), &raw mut event) == 0 }
    }
}

/// Serving the request queue.
impl Duty for Control {
    fn take(&self) -> bool {
        let kick = &self.shared.kick;
        // A test that has requests answered late wants no other device to be late with them.
        if self.shared.injector.get().is_some() || kick.taken.swap(true, Ordering::Acquire) {
            return false;
        }
        let taken = kick.with_connection(|connection| connection.arm(false));
        if !taken {
            kick.taken.store(false, Ordering::Release);
        }
        taken
    }

    fn look(&self) -> bool {
        self.shared.kick.with_connection(|connection| connection.backend.look(REQUESTS))
    }

    fn give_back(&self) {
        let kick = &self.shared.kick;
        kick.with_connection(|connection| connection.arm(true));
        kick.taken.store(false, Ordering::Release);
    }

    fn count(&self) -> u64 {
        self.shared.counts.kicks.load(Ordering::Relaxed)
    }
}
