//! Guests that run in interleaved time slices, to be compared with each other.
//!
//! The speed of a shared machine changes from second to second by more than the difference to be measured. So all
//! guests are booted, with I/O that never ends. Then each in turn runs for a time slice while the others and their
//! daemons are stopped, repeatedly, and adjacent slices are compared. Boots still differ, by the layout of their
//! memory: so there are several rounds.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use viommu_testkit::guest::{Folder, LIMIT, Running, Serve};
use viommu_testkit::wait_until;

use super::{Median, median};

/// How long a guest runs at a time, after [`WARM_UP`].
const SLICE: Duration = Duration::from_millis(100);
/// How long it runs first without being measured, while the caches still hold the others' data.
const WARM_UP: Duration = Duration::from_millis(10);
/// Time slices of each guest in a round.
const SLICES: usize = 24;

/// More seconds than a round takes.
pub const ENDLESS_SECONDS: u32 = 100_000;

/// The kind of I/O that all guests do.
#[derive(Clone, Copy)]
pub struct Io {
    /// Whether the host's file is written.
    pub write: bool,
    /// Bytes of each.
    pub bytes: u64,
}

/// Checks the results that a guest has reported when its I/O has begun, and panics if they are not as they should be.
pub type Check = Box<dyn Fn(&[Value])>;

/// A guest and the daemon of its devices, if it has one.
pub struct Contender {
    pub guest: Running,
    pub daemon: Option<Serve>,
    pub check: Check,
}

impl Contender {
    fn signal(&self, signal: Signal) {
        if let Some(daemon) = &self.daemon {
            daemon.process().signal(signal);
        }
        self.guest.signal(signal);
    }

    /// I/Os so far, from the bytes that the process with the open image has read or written: see proc_pid_io(5).
    /// Eventfds add some ten bytes to each I/O, in our daemon as in QEMU. The number of calls cannot be used: our
    /// daemon very often reads without getting anything.
    fn ios(&self, io: Io) -> f64 {
        let id = self.daemon.as_ref().map_or_else(|| self.guest.pid(), |daemon| daemon.process().id());
        let text = fs::read_to_string(format!("/proc/{id}/io")).unwrap();
        let name = if io.write { "wchar: " } else { "rchar: " };
        let bytes: f64 = text.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap();
        bytes / io.bytes as f64
    }

    /// Waits until its I/O has begun, and checks its results.
    fn wait_for_io(&self, io: Io) {
        self.guest.wait_for_result("the beginning of the I/O", |result| result["event"] == "begin");
        let begun = self.ios(io);
        wait_until(LIMIT, "I/O", || {
            assert!(!self.guest.ended(), "the guest does no I/O");
            self.ios(io) - begun > 100.0
        });
        (self.check)(&self.guest.results());
    }

    /// Lets it run for a time slice, and returns its I/Os per second.
    fn run_slice(&self, io: Io) -> f64 {
        self.signal(Signal::SIGCONT);
        sleep(WARM_UP);
        let started = Instant::now();
        loop {
            let (begun, before) = (Instant::now(), self.ios(io));
            sleep(SLICE);
            let (time, ios) = (begun.elapsed(), self.ios(io) - before);
            assert!(!self.guest.ended(), "the guest ended");
            if ios > 0.0 {
                self.signal(Signal::SIGSTOP);
                return ios / time.as_secs_f64();
            }
            // On a busy machine the guest may get no processor for as long as a slice. That says nothing about it.
            assert!(started.elapsed() < LIMIT, "the guest does no I/O any more");
        }
    }
}

/// The measurements of a variant: a value for each round.
#[derive(Clone, Default)]
pub struct Measured {
    /// I/Os per second.
    pub iops: Vec<f64>,
    /// Their ratio to those of the first variant.
    pub ratios: Vec<f64>,
}

impl Measured {
    /// The median of the ratios of all rounds.
    pub fn ratio(&self) -> Median {
        Median::of(self.ratios.clone())
    }
}

/// One round. `start` boots a guest whose I/O never ends, with its files in the folder it is given, and returns it with
/// its daemon.
pub fn round<V: Copy + Ord>(
    variants: &[V],
    io: Io,
    round: usize,
    measured: &mut BTreeMap<V, Measured>,
    start: impl Fn(V, &Folder) -> Contender,
) {
    // The order changes each time, and is reversed every other time: the first guest gets other memory than the last,
    // and each guest finds the caches of the one before it.
    let order = |nth: usize| {
        let count = variants.len();
        (0..count)
            .map(move |at| if nth.is_multiple_of(2) { (at + nth) % count } else { (count - 1 - at + nth) % count })
    };
    let mut guests: BTreeMap<usize, Contender> = BTreeMap::new();
    for at in order(round) {
        guests.insert(at, start(variants[at], &Folder::in_memory()));
    }
    guests.values().for_each(|guest| guest.wait_for_io(io));
    guests.values().for_each(|guest| guest.signal(Signal::SIGSTOP));
    let mut iops = vec![Vec::new(); variants.len()];
    for nth in 0..SLICES {
        for at in order(nth) {
            iops[at].push(guests[&at].run_slice(io));
        }
    }
    for (of, variant) in iops.iter().zip(variants) {
        let ratios: Vec<f64> = of.iter().zip(&iops[0]).map(|(of, base)| of / base).collect();
        let measured = measured.entry(*variant).or_default();
        measured.iops.push(median(of));
        measured.ratios.push(median(&ratios));
    }
}
