//! What a thread that is awake can do for one that sleeps.
//!
//! A driver that notifies a device and waits for the answer, as Linux's does whenever it maps for the virtio-iommu, waits
//! above all for a thread to wake up. A model that looks for its next command before it sleeps has a thread that is
//! awake, and can look for such notifications as well.

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

/// A duty that was taken; given back when dropped.
pub(crate) struct OnDuty<'a>(&'a dyn Duty);

impl<'a> OnDuty<'a> {
    /// Takes the duty, if that is possible now.
    pub fn take(duty: &'a dyn Duty) -> Option<Self> {
        duty.take().then_some(OnDuty(duty))
    }

    /// See [`Duty::look`].
    pub fn look(&self) -> bool {
        self.0.look()
    }
}

impl Drop for OnDuty<'_> {
    fn drop(&mut self) {
        self.0.give_back();
    }
}
