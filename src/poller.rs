//! A queue that a thread polls for another one, which sleeps.
//!
//! A driver that notifies a device and waits for the answer, as Linux's does whenever it maps for the virtio-iommu, waits
//! above all for a thread to wake up. A model that looks for its next command before it sleeps has a thread that is
//! awake, and can poll the queue of such notifications as well, then and between the pieces of its work.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// A thread that has not polled for so long does something that takes long, or has no processor: the queue's own thread
/// does better.
const LATE: Duration = Duration::from_millis(2);

/// A queue that now and then has something to serve. Its own thread serves it, but for the times when another has
/// acquired it.
pub trait QueuePoller: Send + Sync {
    /// Acquires the queue, so that nobody is asked to wake its own thread. `false` if that cannot be now. The calling
    /// thread has to release it before it does anything that may take long.
    fn acquire(&self) -> bool;

    /// Serves what there is in the queue, if there is anything. For the thread that acquired it. May wait until no DMA
    /// access uses what was unmapped: the caller must not be in the middle of one.
    fn poll(&self) -> bool;

    /// Releases the queue. Its own thread is woken at once if there is something to serve.
    fn release(&self);

    /// How often there was something to serve so far, whichever thread served it.
    fn count(&self) -> u64;
}

/// A thread's hold of a queue that it can poll, if there is one. Released when dropped.
#[derive(Default)]
pub struct PollGuard {
    poller: Option<Arc<dyn QueuePoller>>,
    /// When it was last polled; `None` if it is not acquired.
    polled: Option<Instant>,
}

impl PollGuard {
    /// Of a thread that has not acquired the queue yet.
    pub fn new(poller: Option<Arc<dyn QueuePoller>>) -> Self {
        PollGuard { poller, polled: None }
    }

    /// Acquires the queue, if that is possible now.
    pub fn acquire(&mut self) {
        if self.polled.is_none() && self.poller.as_ref().is_some_and(|poller| poller.acquire()) {
            self.polled = Some(Instant::now());
        }
    }

    /// See [`QueuePoller::poll`]; `false` if the queue is not acquired. Releases it if the poll before was too long ago.
    pub fn poll(&mut self) -> bool {
        let (Some(poller), Some(polled)) = (&self.poller, self.polled) else { return false };
        let late = polled.elapsed() > LATE;
        let found = poller.poll();
        if late {
            self.release();
        } else {
            // What was found may have taken long, and was no delay.
            self.polled = Some(Instant::now());
        }
        found
    }

    /// Releases the queue, if it is acquired: before what may take long.
    pub fn release(&mut self) {
        if self.polled.take().is_some()
            && let Some(poller) = &self.poller
        {
            poller.release();
        }
    }

    /// See [`QueuePoller::count`].
    pub fn count(&self) -> u64 {
        self.poller.as_ref().map_or(0, |poller| poller.count())
    }
}

impl Drop for PollGuard {
    fn drop(&mut self) {
        self.release();
    }
}
