//! What a worker does beside its queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use viommu::duty::Duty;
use viommu::trace::Tracer;

use crate::common::nvme::{Driver, Setup, io};
use crate::{FLUSH, READ, WRITE};

/// A duty that notes who has it.
#[derive(Default)]
struct Noted {
    taken: AtomicBool,
    /// Times that there is something to do yet.
    work: AtomicU64,
    done: AtomicU64,
    /// Times that it was given back.
    returned: AtomicU64,
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
        self.returned.fetch_add(1, Ordering::SeqCst);
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

/// A controller whose worker is on duty and stays awake, since there is always something to do; and a page of the
/// host's that was written to the first blocks, which are in memory from then on.
fn on_duty(duty: &Arc<Noted>) -> (Setup, Driver, u64) {
    let setup = Setup::on_duty(64 << 20, Tracer::default(), Some(duty.clone()), |_| {});
    let mut driver = setup.ready();
    let data = driver.pages(1);
    assert_eq!(driver.command(1, io(WRITE, 0, 8, [data, 0])).status, 0);
    duty.work.store(u64::MAX, Ordering::SeqCst);
    work_until(&mut driver, "the duty", || duty.taken.load(Ordering::SeqCst));
    (setup, driver, data)
}

#[test]
fn a_worker_stays_on_duty_while_it_reads_what_is_in_memory() {
    const READS: u64 = 40;
    let duty = Arc::new(Noted::default());
    let (_setup, mut driver, data) = on_duty(&duty);
    let (returned, done) = (duty.returned.load(Ordering::SeqCst), duty.count());
    for _ in 0..READS {
        driver.put(1, io(READ, 0, 8, [data, 0]));
    }
    driver.ring(1);
    for _ in 0..READS {
        assert_eq!(driver.wait(1).status, 0);
    }
    assert_eq!(duty.returned.load(Ordering::SeqCst), returned, "it was given back");
    assert!(duty.count() - done >= READS, "it was looked after before each command");
    // A flush may take long.
    assert_eq!(driver.command(1, io(FLUSH, 0, 1, [0; 2])).status, 0);
    assert!(duty.returned.load(Ordering::SeqCst) > returned);
}

/// The host may wait for an answer of the IOMMU before it consumes completions.
#[test]
fn a_worker_without_room_for_completions_is_not_on_duty() {
    let duty = Arc::new(Noted::default());
    let (_setup, mut driver, data) = on_duty(&duty);
    let submit = |driver: &mut Driver, count| {
        (0..count).for_each(|_| _ = driver.put(1, io(READ, 0, 8, [data, 0])));
        driver.ring(1);
    };
    // There is room for 63, and the host does not tell that it has consumed any.
    submit(&mut driver, 60);
    let begun = Instant::now();
    let mut reaped = 0;
    while reaped < 60 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{reaped} completions");
        reaped += u32::from(driver.reap(1).is_some());
    }
    submit(&mut driver, 10);
    while duty.taken.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(60), "a worker that cannot go on keeps the duty");
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..10 {
        assert_eq!(driver.wait(1).status, 0);
    }
}
