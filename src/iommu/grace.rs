//! Grace periods: a writer can wait until no reader can still use what it removed.
//!
//! This is a small form of the kernel's SRCU. Each reader has its own slot with a section number, which is odd while the
//! reader is inside a section. [`Grace::synchronize`] notes the slots that are odd and waits until each has changed.
//!
//! # Why it holds
//!
//! A writer stores "removed" and then, in `synchronize`, issues a sequentially consistent fence F1 and loads the slots.
//! A reader stores an odd number to its slot, issues such a fence F2 and then loads what the writer may remove. The
//! fences are in one total order:
//!
//! * F1 before F2: the reader's loads see "removed", or something newer. This section cannot use what was removed.
//! * F2 before F1: the writer's load sees the odd number or a newer one of that slot. If it sees that very number, it
//!   waits. Every later number is a Release store that comes after the reads of the section in program order, and the
//!   writer's load is an Acquire: the reads happen before whatever the writer does next, such as freeing memory.
//!
//! A reader that registers after the writer has taken the lock over the list of slots sees "removed" because of that lock.
//! A reader that unregistered before has also ended its reads before.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};

use super::sync::{AtomicU64, Mutex, Padded, fence, lock};

/// The readers and the writer's side.
pub struct Grace {
    state: Mutex<State>,
}

struct State {
    slots: Vec<Arc<Slot>>,
    garbage: Vec<Box<dyn Send>>,
}

/// A reader's section number: odd inside a section, even outside. Only the reader writes it.
type Slot = Padded<AtomicU64>;

/// One thread's right to read.
pub struct Reader {
    grace: Arc<Grace>,
    slot: Arc<Slot>,
    /// The number outside a section: even.
    number: u64,
}

/// While it lives, nothing that was reachable when it was taken is freed, and no [`Grace::synchronize`] that began later
/// returns.
pub struct Guard<'a>(&'a mut Reader);

impl Grace {
    /// Grace periods without readers yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Grace { state: Mutex::new(State { slots: Vec::new(), garbage: Vec::new() }) })
    }

    /// A new reader: one for each thread.
    pub fn reader(self: &Arc<Self>) -> Reader {
        let slot = Arc::new(Padded(AtomicU64::new(0)));
        lock(&self.state).slots.push(slot.clone());
        Reader { grace: self.clone(), slot, number: 0 }
    }

    /// Waits until every guard that existed at the call is gone, then drops what was retired before the call. The
    /// calling thread must hold no guard itself.
    pub fn synchronize(&self) {
        let mut state = lock(&self.state);
        fence(SeqCst); // F1
        let inside: Vec<(Arc<Slot>, u64)> = state
            .slots
            .iter()
            .map(|slot| (slot, slot.0.load(Acquire)))
            .filter(|(_, number)| number & 1 == 1)
            .map(|(slot, number)| (slot.clone(), number))
            .collect();
        let garbage = std::mem::take(&mut state.garbage);
        drop(state);
        for (slot, number) in inside {
            wait(&slot, number);
        }
        drop(garbage);
    }

    /// Does what must not be done. The model checker has to find it.
    #[cfg(all(loom, test))]
    pub(super) fn drop_garbage_at_once(&self) {
        let garbage = std::mem::take(&mut lock(&self.state).garbage);
        drop(garbage);
    }

    /// Drops `garbage` once every guard that exists now is gone: in the next call of [`Grace::synchronize`], or with the last
    /// handle of this `Grace`. New readers must not be able to reach it any more.
    pub fn retire(&self, garbage: Box<dyn Send>) {
        lock(&self.state).garbage.push(garbage);
    }
}

/// Waits until `slot` no longer has `number`. A section is short, so the wait begins with spinning. But the reader may have
/// been preempted, and then it needs a processor more than this thread does.
fn wait(slot: &Slot, number: u64) {
    let mut tries = 0;
    while slot.0.load(Acquire) == number {
        pause(tries);
        tries += 1;
    }
}

#[cfg(not(loom))]
fn pause(tries: u64) {
    match tries {
        0..100 => std::hint::spin_loop(),
        100..120 => std::thread::yield_now(),
        _ => std::thread::sleep(std::time::Duration::from_micros(50)),
    }
}

#[cfg(loom)]
fn pause(_tries: u64) {
    loom::thread::yield_now();
}

impl Reader {
    /// Enters a read-side section. The section must be short and must not wait for anything but memory.
    #[inline]
    pub fn enter(&mut self) -> Guard<'_> {
        // Release: a writer that sees this number and missed the even one before it is still ordered after the reads of
        // the previous section.
        self.slot.0.store(self.number + 1, Release);
        fence(SeqCst); // F2
        Guard(self)
    }

    /// Ends the section, if there is one.
    #[inline]
    fn leave(&mut self) {
        self.number += 2;
        self.slot.0.store(self.number, Release);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A forgotten guard has left its section open.
        self.leave();
        lock(&self.grace.state).slots.retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

impl Guard<'_> {
    /// Whether it belongs to `grace`, which then waits for it.
    #[inline]
    pub(super) fn is_of(&self, grace: &Grace) -> bool {
        std::ptr::eq(&*self.0.grace, grace)
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn synchronize_waits_for_those_inside_and_for_nobody_else() {
        let grace = Grace::new();
        let _outside = grace.reader();
        grace.synchronize();
        let (entered, wait_for_entry) = channel();
        let leaving = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut reader = grace.reader();
                let guard = reader.enter();
                entered.send(()).unwrap();
                for _ in 0..50 {
                    std::thread::yield_now();
                }
                leaving.store(true, SeqCst);
                drop(guard);
            });
            wait_for_entry.recv().unwrap();
            grace.synchronize();
            assert!(leaving.load(SeqCst));
        });
    }

    #[test]
    fn a_forgotten_guard_does_not_stop_the_world_for_ever() {
        let grace = Grace::new();
        let mut reader = grace.reader();
        std::mem::forget(reader.enter());
        drop(reader.enter());
        grace.synchronize();
        std::mem::forget(reader.enter());
        drop(reader);
        grace.synchronize();
    }

    #[test]
    fn garbage_is_dropped_by_the_next_synchronize() {
        let grace = Grace::new();
        let garbage = Arc::new(());
        grace.retire(Box::new(garbage.clone()));
        assert_eq!(Arc::strong_count(&garbage), 2);
        grace.synchronize();
        assert_eq!(Arc::strong_count(&garbage), 1);
    }
}
