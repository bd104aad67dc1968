//! Locks that a panic does not close. What they protect in this crate is whole between any two statements that can
//! panic, so a thread that panicked while it held one is no reason for the others to stop.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, whether or not a thread panicked while it held it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}

/// The guard of any other lock or wait, likewise.
pub(crate) fn unpoisoned<G>(locked: LockResult<G>) -> G {
    locked.unwrap_or_else(PoisonError::into_inner)
}
