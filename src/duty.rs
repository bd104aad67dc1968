//! What a thread that is awake can do for one that sleeps.
//!
//! A driver that notifies a device and waits for the answer, as Linux's does whenever it maps for the virtio-iommu, waits
//! above all for a thread to wake up. A model that looks for its next command before it sleeps has a thread that is
//! awake, and can look for such notifications as well, then and between the pieces of its work.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// Who has not looked for so long does something that takes long, or has no processor: its own thread does better.
const LATE: Duration = Duration::from_millis(2);

/// Work that comes now and then. Its own thread does it, but for the times when another has taken it.
pub trait Duty: Send + Sync {
    /// Takes it, so that nobody is asked to wake its own thread. `false` if it cannot be taken now. To be given back before
    /// the calling thread does anything that may take long.
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
    /// When it was last looked at; `None` if it is not taken.
    looked: Option<Instant>,
}

impl Watch {
    /// Of a thread that has not taken it yet.
    pub fn new(duty: Option<Arc<dyn Duty>>) -> Self {
        Watch { duty, looked: None }
    }

    /// Takes the duty, if that is possible now.
    pub fn take(&mut self) {
        if self.looked.is_none() && self.duty.as_ref().is_some_and(|duty| duty.take()) {
            self.looked = Some(Instant::now());
        }
    }

    /// See [`Duty::look`]; `false` if it is not taken. Gives it back if the look before was too long ago.
    pub fn look(&mut self) -> bool {
        let (Some(duty), Some(looked)) = (&self.duty, self.looked) else { return false };
        let late = looked.elapsed() > LATE;
        let found = duty.look();
        if late {
            self.give_back();
        } else {
            // What was found may have taken long, and was no delay.
            self.looked = Some(Instant::now());
        }
        found
    }

    /// Gives it back, if it is taken: before what may take long.
    pub fn give_back(&mut self) {
        if self.looked.take().is_some()
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
