//! How a worker polls another queue beside its own.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::nvme::{FLUSH, READ, WRITE};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use viommu::devices::nvme::Disk;
use viommu::poller::QueuePoller;
use viommu_testkit::folders;
use viommu_testkit::nvme::{Driver, Setup, Sqe, io};
use viommu_trace::Tracer;

/// A queue that records who has it.
#[derive(Default)]
struct Noted {
    taken: AtomicBool,
    /// How many times there will still be something to do.
    work: AtomicU64,
    done: AtomicU64,
    /// How many times it was released.
    returned: AtomicU64,
    /// How many commands were done at each poll.
    seen: Mutex<BTreeSet<u64>>,
    disk: OnceLock<Arc<Disk>>,
}

impl QueuePoller for Noted {
    fn acquire(&self) -> bool {
        assert!(!self.taken.swap(true, Ordering::SeqCst), "it was not given back");
        true
    }

    fn poll(&self) -> bool {
        assert!(self.taken.load(Ordering::SeqCst), "it was not taken");
        let found = self.work.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |work| work.checked_sub(1)).is_ok();
        self.done.fetch_add(u64::from(found), Ordering::SeqCst);
        if let Some(disk) = self.disk.get() {
            self.seen.lock().unwrap().insert(disk.counters.io_count.load(Ordering::SeqCst));
        }
        found
    }

    fn release(&self) {
        assert!(self.taken.swap(false, Ordering::SeqCst), "it was not taken");
        self.returned.fetch_add(1, Ordering::SeqCst);
    }

    fn count(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }
}

/// Executes commands until the work is done. The worker may rest for a while if the machine is busy.
fn work_until(driver: &mut Driver, what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not happen");
        assert_eq!(driver.command(1, io(FLUSH, 0, 1, [0; 2])).status, 0);
    }
}

#[test]
fn a_worker_that_looks_for_commands_polls_and_releases_the_queue() {
    let poller = Arc::new(Noted::default());
    let setup = Setup::polling(64 << 20, Tracer::default(), Some(poller.clone()), |_| {});
    let mut driver = setup.ready();
    poller.work.store(500, Ordering::SeqCst);
    work_until(&mut driver, "the work", || poller.work.load(Ordering::SeqCst) == 0);
    assert_eq!(poller.count(), 500);
    let begun = Instant::now();
    while poller.taken.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(60), "an idle worker keeps the queue");
        std::thread::sleep(Duration::from_millis(1));
    }
    // A worker that ends while it polls releases the queue.
    poller.work.store(u64::MAX, Ordering::SeqCst);
    work_until(&mut driver, "the polling", || poller.count() > 500);
    driver.disable();
    assert!(!poller.taken.load(Ordering::SeqCst));
}

/// A controller with an image in this folder, whose worker polls and stays awake, since there is always something to
/// do. Also returns a page of the host.
fn polling(poller: &Arc<Noted>, folder: &Path) -> (Setup, Driver, u64) {
    let image = folder.join("disk.img");
    let setup = Setup::polling(64 << 20, Tracer::default(), Some(poller.clone()), |config| config.image = image);
    assert!(poller.disk.set(setup.disk.clone()).is_ok());
    let mut driver = setup.ready();
    poller.work.store(u64::MAX, Ordering::SeqCst);
    // A worker that has found something keeps polling.
    work_until(&mut driver, "the polling", || poller.count() > 0 && poller.taken.load(Ordering::SeqCst));
    let data = driver.pages(1);
    (setup, driver, data)
}

/// Executes many commands, which must end with `status`, and checks that the worker polled at each. If a worker loses
/// its processor for long, it rightly releases the queue; then this tries again.
fn assert_polling(poller: &Noted, setup: &Setup, driver: &mut Driver, commands: &[Sqe], status: impl Fn(u16) -> bool) {
    const COMMANDS: u64 = 40;
    let begun = Instant::now();
    loop {
        work_until(driver, "the polling", || poller.taken.load(Ordering::SeqCst));
        let returned = poller.returned.load(Ordering::SeqCst);
        let done = setup.disk.counters.io_count.load(Ordering::SeqCst);
        for sqe in commands.iter().cycle().take(COMMANDS as usize) {
            driver.put(1, *sqe);
        }
        driver.ring(1);
        for _ in 0..COMMANDS {
            let done = driver.wait(1).status;
            assert!(status(done), "{commands:?}: {done:#x}");
        }
        if poller.returned.load(Ordering::SeqCst) == returned && poller.taken.load(Ordering::SeqCst) {
            let seen = poller.seen.lock().unwrap().clone();
            let missed: Vec<_> = (done..done + COMMANDS).filter(|count| !seen.contains(count)).collect();
            assert!(missed.is_empty(), "{commands:?}: not looked after when these many were done: {missed:?}");
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{commands:?}: the queue is released each time");
    }
}

#[test]
fn a_worker_keeps_polling_while_it_reads_and_writes_data_in_memory() {
    let (poller, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(&folders()[0]).unwrap());
    let (setup, mut driver, data) = polling(&poller, folder.path());
    let commands = [io(READ, 0, 8, [data, 0]), io(WRITE, 0, 8, [data, 0])];
    assert_polling(&poller, &setup, &mut driver, &commands, |status| status == 0);
}

/// A guest may send nothing but failing commands, without end: the IOMMU's requests are still served.
#[test]
fn a_worker_polls_the_queue_even_if_its_commands_fail() {
    let (poller, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(&folders()[0]).unwrap());
    let (setup, mut driver, data) = polling(&poller, folder.path());
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
        assert_polling(&poller, &setup, &mut driver, &[sqe], |status| status != 0);
    }
}

/// A flush, and a write that must be durable, may take long on any file system.
#[test]
fn a_worker_releases_the_queue_before_it_flushes() {
    let (poller, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(&folders()[0]).unwrap());
    let (_setup, mut driver, data) = polling(&poller, folder.path());
    let write = io(WRITE, 0, 8, [data, 0]);
    for sqe in [io(FLUSH, 0, 1, [0; 2]), Sqe { cdw12: write.cdw12 | 1 << 30, ..write }] {
        work_until(&mut driver, "the polling", || poller.taken.load(Ordering::SeqCst));
        let returned = poller.returned.load(Ordering::SeqCst);
        assert_eq!(driver.command(1, sqe).status, 0);
        assert!(poller.returned.load(Ordering::SeqCst) > returned, "{sqe:?}");
    }
}

/// How often the queue was released, read while the worker has it: each further release is by this worker.
fn releases_while_held(poller: &Noted, driver: &mut Driver) -> u64 {
    loop {
        work_until(driver, "the polling", || poller.taken.load(Ordering::SeqCst));
        let returned = poller.returned.load(Ordering::SeqCst);
        if poller.taken.load(Ordering::SeqCst) {
            return returned;
        }
    }
}

#[test]
fn a_worker_releases_the_queue_before_it_waits_for_the_disk() {
    let (poller, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(&folders()[1]).unwrap());
    let (_setup, mut driver, data) = polling(&poller, folder.path());
    // The data is on the disk, and not in memory any more.
    let image = OpenOptions::new().write(true).open(folder.path().join("disk.img")).unwrap();
    image.write_all_at(&[0x5a; 1 << 20], 32 << 20).unwrap();
    image.sync_all().unwrap();
    posix_fadvise(&image, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    let waits = statfs(folder.path()).unwrap().filesystem_type() != TMPFS_MAGIC;
    let returned = releases_while_held(&poller, &mut driver);
    assert_eq!(driver.command(1, io(READ, 64 << 10, 8, [data, 0])).status, 0);
    assert_eq!(driver.read_ram(data, 4096), [0x5a; 4096]);
    assert!(!waits || poller.returned.load(Ordering::SeqCst) > returned);
    // A write may always wait.
    let returned = releases_while_held(&poller, &mut driver);
    assert_eq!(driver.command(1, io(WRITE, 64 << 10, 8, [data, 0])).status, 0);
    assert!(!waits || poller.returned.load(Ordering::SeqCst) > returned);
}

/// The host may wait for an answer from the IOMMU before it consumes completions.
#[test]
fn a_worker_without_room_for_completions_does_not_poll() {
    let (poller, folder) = (Arc::new(Noted::default()), tempfile::tempdir_in(&folders()[0]).unwrap());
    let (_setup, mut driver, data) = polling(&poller, folder.path());
    let submit = |driver: &mut Driver, count| {
        (0..count).for_each(|_| _ = driver.put(1, io(READ, 0, 8, [data, 0])));
        driver.ring(1);
    };
    // There is room for 63, and the host acknowledges none.
    submit(&mut driver, 60);
    let begun = Instant::now();
    let mut reaped = 0;
    while reaped < 60 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{reaped} completions");
        reaped += u32::from(driver.reap(1).is_some());
    }
    assert!(poller.taken.load(Ordering::SeqCst));
    submit(&mut driver, 10);
    while poller.taken.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(60), "a worker that cannot go on keeps the queue");
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..10 {
        assert_eq!(driver.wait(1).status, 0);
    }
}
