//! Serving the request queue from another thread while its worker sleeps.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use super::backend::Backend;
use super::{Control, REQUESTS};
use crate::poller::QueuePoller;
use crate::sync::unpoisoned;

/// The state of polling the request queue from another thread than the worker.
#[derive(Default)]
pub(super) struct Poller {
    taken: AtomicBool,
    /// The backend of the connected frontend. Locked for reading while a thread that is not its worker serves it.
    backend: RwLock<Option<Arc<Backend>>>,
}

impl Poller {
    /// A frontend came, or goes. When this returns, nobody polls for the previous one any more.
    pub fn connect(&self, backend: Option<Arc<Backend>>) {
        *unpoisoned(self.backend.write()) = backend;
    }

    fn with<R: Default>(&self, act: impl FnOnce(&Backend) -> R) -> R {
        let backend = unpoisoned(self.backend.read());
        backend.as_ref().map_or_else(R::default, |backend| act(backend))
    }
}

/// Serving the request queue.
impl QueuePoller for Control {
    fn acquire(&self) -> bool {
        let poller = &self.shared.poller;
        // In a test that has requests answered late, other devices must not become late too.
        if self.shared.injector.get().is_some() || poller.taken.swap(true, Ordering::Acquire) {
            return false;
        }
        let taken = poller.with(|backend| backend.begin_polling(REQUESTS));
        if !taken {
            poller.taken.store(false, Ordering::Release);
        }
        taken
    }

    fn poll(&self) -> bool {
        self.shared.poller.with(|backend| backend.poll(REQUESTS))
    }

    fn release(&self) {
        let poller = &self.shared.poller;
        poller.with(|backend| backend.end_polling(REQUESTS));
        poller.taken.store(false, Ordering::Release);
    }

    fn count(&self) -> u64 {
        self.shared.counters.batches.load(Ordering::Relaxed)
    }
}
