//! What a thread that is awake can do for one that sleeps.
//!
//! A driver that notifies a device and waits for the answer, as Linux's does whenever it maps for the virtio-iommu, waits
//! above all for a thread to wake up. A model that looks for its next command before it sleeps has a thread that is
//! awake, and can look for such notifications as well, then and between the pieces of its work.

use std::sync::Arc;

/// Work that comes now and then. Its own thread does it, but for the times when another has taken it.
pub trait Duty: Send + Sync {
    /// Takes it, so that its own thread is not woken. `false` if it cannot be taken now. To be given back before the
    /// calling thread does anything that may take long.
    fn take(&self) -> bool;

    /// Does what there is to do, if there is anything. For the thread that took it. May wait until no DMA access uses
    /// what was unmapped: the caller must not be in the middle of one.
    fn look(&self) -> bool;

    /// Gives it back. Its own thread is woken at once if there is something to do.
    fn give_back(&self);

    /// How often there was something to do so far, whoever did it.
    fn count(&self) -> u64;
}

/// A thread's turns at a duty, if there is one. Given back when dropped.
#[derive(Default)]
pub(crate) struct Watch {
    duty: Option<Arc<dyn Duty>>,
    taken: bool,
}

impl Watch {
    /// Of a thread that has not taken it yet.
    pub fn new(duty: Option<Arc<dyn Duty>>) -> Self {
        Watch { duty, taken: false }
    }

    /// Takes the duty, if that is possible now.
    pub fn take(&mut self) {
        self.taken = self.taken || self.duty.as_ref().is_some_and(|duty| duty.take());
    }

    /// See [`Duty::look`]; `false` if it is not taken.
    pub fn look(&self) -> bool {
        self.taken && self.duty.as_ref().is_some_and(|duty| duty.look())
    }

    /// Gives it back, if it is taken: before what may take long.
    pub fn give_back(&mut self) {
        if std::mem::take(&mut self.taken)
            && let Some(duty) = &self.duty
        {
            duty.give_back();
        }
    }

    /// See [`Duty::count`].
    pub fn count(&self) -> u64 {
        self.duty.as_ref().map_or(0, |duty| duty.count())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.give_back();
    }
}
