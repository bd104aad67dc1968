//! Locks that ignore poisoning. The data behind a lock of this crate is consistent between any two statements that can
//! panic, so the other threads can go on after a thread has panicked while it held one.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, whether or not a thread panicked while it held it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}

/// The guard from any other lock or wait, whether or not a thread panicked while it held the lock.
pub(crate) fn unpoisoned<G>(locked: LockResult<G>) -> G {
    locked.unwrap_or_else(PoisonError::into_inner)
}
