//! What threads share, from `std` or, under `--cfg loom`, from the model checker.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, fence},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, fence},
};

use std::sync::PoisonError;

/// Keeps what one thread writes often off the cache lines (two, since they are fetched in pairs) that others read.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub T);

/// Locks `mutex`. What these locks protect is whole between any two statements that can panic, so a thread that
/// panicked while it held one is no reason to stop.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
