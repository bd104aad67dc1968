//! What a worker does beside its queue.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use viommu::devices::nvme::Disk;
use viommu::duty::Duty;
use viommu_trace::Tracer;

use crate::common::nvme::{Driver, FOLDERS, Setup, Sqe, io};
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
    /// How many commands were done whenever it was looked after.
    seen: Mutex<BTreeSet<u64>>,
    disk: OnceLock<Arc<Disk>>,
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
        if let Some(disk) = self.disk.get() {
            self.seen.lock().unwrap().insert(disk.counters.io_count.load(Ordering::SeqCst));
        }
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

/// A controller with an image in this folder, whose worker is on duty and stays awake, since there is always something
/// to do; and a page of the host's.
fn on_duty(duty: &Arc<Noted>, folder: &Path) -> (Setup, Driver, u64) {
    let image = folder.join("disk.img");
    let setup = Setup::on_duty(64 << 20, Tracer::default(), Some(duty.clone()), |config| config.image = image);
    assert!(duty.disk.set(setup.disk.clone()).is_ok());
    let mut driver = setup.ready();
    duty.work.store(u64::MAX, Ordering::SeqCst);
    // Who has found something looks on.
    work_until(&mut driver, "the duty", || duty.count() > 0 && duty.taken.load(Ordering::SeqCst));
    let data = driver.pages(1);
    (setup, driver, data)
}

/// Has many commands executed, with what `status` says of it, and looks whether the worker was on duty at each. A worker that
/// loses its processor for long gives the duty back, as it should: that is tried again.
fn assert_on_duty(duty: &Noted, setup: &Setup, driver: &mut Driver, commands: &[Sqe], status: impl Fn(u16) -> bool) {
    const COMMANDS: u64 = 40;
    let begun = Instant::now();
    loop {
        work_until(driver, "the duty", || duty.taken.load(Ordering::SeqCst));
        let returned = duty.returned.load(Ordering::SeqCst);
        let done = setup.disk.counters.io_count.load(Ordering::SeqCst);
        for sqe in commands.iter().cycle().take(COMMANDS as usize) {
            driver.put(1, *sqe);
        }
        driver.ring(1);
        for _ in 0..COMMANDS {
            let done = driver.wait(1).status;
            assert!(status(done), "{commands:?}: {done:#x}");
        }
        if duty.returned.load(Ordering::SeqCst) == returned && duty.taken.load(Ordering::SeqCst) {
            let seen = duty.seen.lock().unwrap().clone();
            let missed: Vec<_> = (done..done + COMMANDS).filter(|count| !seen.contains(count)).collect();
            assert!(missed.is_empty(), "{commands:?}: not looked after when these many were done: {missed:?}");
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{commands:?}: the duty is given back each time");
    }
}

#[test]
fn a_worker_stays_on_duty_while_it_reads_and_writes_what_is_in_memory() {
    let (duty, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(FOLDERS[0]).unwrap());
    let (setup, mut driver, data) = on_duty(&duty, folder.path());
    let commands = [io(READ, 0, 8, [data, 0]), io(WRITE, 0, 8, [data, 0])];
    assert_on_duty(&duty, &setup, &mut driver, &commands, |status| status == 0);
}

/// A guest may have nothing but failing commands, and always more of them: the IOMMU's requests are served all the same.
#[test]
fn a_worker_looks_after_the_duty_whatever_becomes_of_its_commands() {
    let (duty, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(FOLDERS[0]).unwrap());
    let (setup, mut driver, data) = on_duty(&duty, folder.path());
    let past = setup.disk.blocks();
    let sgl = |opcode| Sqe { flags: 1 << 6, ..io(opcode, 0, 8, [data, 0xf0 << 56 | 4096]) };
    let failing = [
        io(READ, past, 8, [data, 0]),
        io(WRITE, past, 8, [data, 0]),
        io(READ, 0, 16, [data, 3]),
        sgl(READ),
        sgl(WRITE),
    ];
    for sqe in failing {
        assert_on_duty(&duty, &setup, &mut driver, &[sqe], |status| status != 0);
    }
}

/// A flush, and a write that is to be durable, may take long wherever the image is.
#[test]
fn a_worker_gives_the_duty_back_before_it_flushes() {
    let (duty, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(FOLDERS[0]).unwrap());
    let (_setup, mut driver, data) = on_duty(&duty, folder.path());
    let write = io(WRITE, 0, 8, [data, 0]);
    for sqe in [io(FLUSH, 0, 1, [0; 2]), Sqe { cdw12: write.cdw12 | 1 << 30, ..write }] {
        work_until(&mut driver, "the duty", || duty.taken.load(Ordering::SeqCst));
        let returned = duty.returned.load(Ordering::SeqCst);
        assert_eq!(driver.command(1, sqe).status, 0);
        assert!(duty.returned.load(Ordering::SeqCst) > returned, "{sqe:?}");
    }
}

#[test]
fn a_worker_gives_the_duty_back_before_it_waits_for_the_disk() {
    let (duty, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(FOLDERS[1]).unwrap());
    let (_setup, mut driver, data) = on_duty(&duty, folder.path());
    // What is on the disk, and not in memory any more.
    let image = OpenOptions::new().write(true).open(folder.path().join("disk.img")).unwrap();
    image.write_all_at(&[0x5a; 1 << 20], 32 << 20).unwrap();
    image.sync_all().unwrap();
    posix_fadvise(&image, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    let returned = duty.returned.load(Ordering::SeqCst);
    assert_eq!(driver.command(1, io(READ, 64 << 10, 8, [data, 0])).status, 0);
    assert_eq!(driver.read_ram(data, 4096), [0x5a; 4096]);
    let waits = statfs(folder.path()).unwrap().filesystem_type() != TMPFS_MAGIC;
    assert_eq!(duty.returned.load(Ordering::SeqCst) > returned, waits);
    // To write may wait in any case.
    work_until(&mut driver, "the duty", || duty.taken.load(Ordering::SeqCst));
    let returned = duty.returned.load(Ordering::SeqCst);
    assert_eq!(driver.command(1, io(WRITE, 64 << 10, 8, [data, 0])).status, 0);
    assert_eq!(duty.returned.load(Ordering::SeqCst) > returned, waits);
}

/// The host may wait for an answer of the IOMMU before it consumes completions.
#[test]
fn a_worker_without_room_for_completions_is_not_on_duty() {
    let (duty, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(FOLDERS[0]).unwrap());
    let (_setup, mut driver, data) = on_duty(&duty, folder.path());
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
    assert!(duty.taken.load(Ordering::SeqCst));
    submit(&mut driver, 10);
    while duty.taken.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(60), "a worker that cannot go on keeps the duty");
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..10 {
        assert_eq!(driver.wait(1).status, 0);
    }
}
