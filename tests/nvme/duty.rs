//! What a worker does beside its queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use viommu::duty::Duty;
use viommu::trace::Tracer;

use crate::FLUSH;
use crate::common::nvme::{Driver, Setup, io};

/// A duty that notes who has it.
#[derive(Default)]
struct Noted {
    taken: AtomicBool,
    /// Times that there is something to do yet.
    work: AtomicU64,
    done: AtomicU64,
}

impl Duty for Noted {
    fn take(&self) -> bool {
        assert!(!self.taken.swap(true, Ordering::SeqCst), "it was not given back");
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

/// Has commands executed until the work is done; the worker may rest for a while if the machine is busy.
fn work_until(driver: &mut Driver, what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not happen");
        assert_eq!(driver.command(1, io(FLUSH, 0, 1, [0; 2])).status, 0);
    }
}

#[test]
fn a_worker_that_looks_for_commands_is_on_duty_and_gives_it_back() {
    let duty = Arc::new(Noted::default());
    let setup = Setup::on_duty(64 << 20, Tracer::default(), Some(duty.clone()), |_| {});
    let mut driver = setup.ready();
    duty.work.store(500, Ordering::SeqCst);
    work_until(&mut driver, "the work", || duty.work.load(Ordering::SeqCst) == 0);
    assert_eq!(duty.count(), 500);
    let begun = Instant::now();
    while duty.taken.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(60), "an idle worker keeps the duty");
        std::thread::sleep(Duration::from_millis(1));
    }
    // A worker that ends while it is on duty gives it back.
    duty.work.store(u64::MAX, Ordering::SeqCst);
    work_until(&mut driver, "the duty", || duty.count() > 500);
    driver.disable();
    assert!(!duty.taken.load(Ordering::SeqCst));
}
