//! Synchronization types from `std` or, under `--cfg loom`, from the model checker.

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

use crate::sync::unpoisoned;

/// Keeps a value that one thread writes often off the cache lines that other threads read. It takes two lines, since they
/// are fetched in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub T);

/// Locks `mutex`, whether or not a thread panicked while it held it; as [`crate::sync::lock`], but for the model checker's
/// mutex too.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}
