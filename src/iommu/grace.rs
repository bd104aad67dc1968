//! Grace periods: a writer can wait until no reader can still use what it removed.

use std::marker::PhantomData;
use std::sync::Arc;

/// The readers and the writer's side.
pub struct Grace {}

/// One thread's right to read.
pub struct Reader {}

/// While it lives, nothing that was reachable when it was taken is freed, and no [`Grace::synchronize`] that began
/// after returns.
pub struct Guard<'a>(PhantomData<&'a mut Reader>);

impl Grace {
    /// No readers yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Grace {})
    }

    /// A new reader: one for each thread.
    pub fn reader(self: &Arc<Self>) -> Reader {
        Reader {}
    }

    /// Waits until every guard that existed at the call is gone. The caller must hold none itself.
    pub fn synchronize(&self) {}

    /// Drops `garbage` once every guard that exists now is gone: in the next [`Grace::synchronize`] that somebody
    /// calls, or with the last handle of this `Grace`. What can be reached by new readers must not refer to it.
    pub fn retire(&self, garbage: Box<dyn Send>) {
        drop(garbage);
    }
}

impl Reader {
    /// Enters a read-side section: short, and without waiting for anything but memory.
    #[inline]
    pub fn enter(&mut self) -> Guard<'_> {
        Guard(PhantomData)
    }
}
