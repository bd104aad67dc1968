//! A queue that one thread polls while its own thread sleeps.
//!
//! A driver that notifies a device and waits for the answer mostly waits for a thread to wake up. Linux's driver for
//! the virtio-iommu does so whenever it maps. A model that polls for its next command before it sleeps has a thread
//! that is awake. That thread can also poll the queue of such notifications, at that time and between the pieces of its
//! work.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// A thread that has not polled for longer than this is busy or has no processor. The queue's own thread does better
/// then.
const LATE: Duration = Duration::from_millis(2);

/// A queue that now and then has something to serve. Its own thread serves it, except while another thread has acquired
/// it.
pub trait QueuePoller: Send + Sync {
    /// Acquires the queue: the driver is not asked to wake its own thread any more. `false` if that is impossible now.
    /// The calling thread has to release the queue before it does anything that may take long.
    fn acquire(&self) -> bool;

    /// Serves what is in the queue, if anything is. To be called by the thread that acquired it. May wait until no DMA
    /// access uses what was unmapped, so the caller must not be in the middle of an access.
    fn poll(&self) -> bool;

    /// Releases the queue. Its own thread is woken at once if there is something to serve.
    fn release(&self);

    /// How often something was served so far, by whichever thread.
    fn count(&self) -> u64;
}

/// A thread's hold on a queue that it can poll, if there is one. Released when dropped.
#[derive(Default)]
pub struct PollGuard {
    poller: Option<Arc<dyn QueuePoller>>,
    /// When it was last polled; `None` if it is not acquired.
    polled: Option<Instant>,
}

impl PollGuard {
    /// The guard of a thread that has not acquired the queue yet.
    pub fn new(poller: Option<Arc<dyn QueuePoller>>) -> Self {
        PollGuard { poller, polled: None }
    }

    /// Acquires the queue, if that is possible now.
    pub fn acquire(&mut self) {
        if self.polled.is_none() && self.poller.as_ref().is_some_and(|poller| poller.acquire()) {
            self.polled = Some(Instant::now());
        }
    }

    /// See [`QueuePoller::poll`]; `false` if the queue is not acquired. Releases it if the last poll was too long ago.
    pub fn poll(&mut self) -> bool {
        let (Some(poller), Some(polled)) = (&self.poller, self.polled) else { return false };
        let late = polled.elapsed() > LATE;
        let found = poller.poll();
        if late {
            self.release();
        } else {
            // Time spent serving is no delay.
            self.polled = Some(Instant::now());
        }
        found
    }

    /// Releases the queue, if it is acquired. To be called before anything that may take long.
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
