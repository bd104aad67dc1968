//! What a worker does beside its queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use viommu::duty::Duty;
use viommu::trace::Tracer;

use crate::FLUSH;
use crate::common::nvme::{Setup, io};

/// A duty that notes who has it.
#[derive(Default)]
struct Noted {
    taken: AtomicBool,
    takes: AtomicU64,
    /// Times that there is something to do yet.
    work: AtomicU64,
    done: AtomicU64,
}

impl Duty for Noted {
    fn take(&self) -> bool {
        assert!(!self.taken.swap(true, Ordering::SeqCst), "it was not given back");
        self.takes.fetch_add(1, Ordering::SeqCst);
        true
    }

    fn look(&self) -> bool {
        assert!(self.taken.load(Ordering::SeqCst), "it was not taken");
        let found = self.work.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |work| work.checked_sub(1)).is_ok();
        self.done.fetch_add(u64::from(found), Ordering::SeqCst);
        found
    }

    fn give_back(&self) {
        assert!(self.taken.swap(false, Ordering::SeqCst), "it was not taken");
    }

    fn count(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_worker_that_is_awake_is_on_duty_and_one_that_sleeps_is_not() {
    let duty = Arc::new(Noted::default());
    let setup = Setup::on_duty(64 << 20, Tracer::default(), Some(duty.clone()), |_| {});
    let mut driver = setup.ready();
    for _ in 0..10 {
        duty.work.store(50, Ordering::SeqCst);
        assert_eq!(driver.command(1, io(FLUSH, 0, 1, [0; 2])).status, 0);
        wait_for("the work", || duty.work.load(Ordering::SeqCst) == 0);
    }
    assert_eq!(duty.count(), 500);
    wait_for("the end of the duty", || !duty.taken.load(Ordering::SeqCst));
    // Asleep, it leaves the work to others.
    duty.work.store(1, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(duty.count(), 500);
    // A worker that ends while it is on duty gives it back.
    duty.work.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(driver.command(1, io(FLUSH, 0, 1, [0; 2])).status, 0);
    wait_for("the duty", || duty.count() > 500);
    driver.disable();
    assert!(!duty.taken.load(Ordering::SeqCst));
    assert_ne!(duty.takes.load(Ordering::SeqCst), 0);
}
