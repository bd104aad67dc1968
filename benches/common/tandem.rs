//! Guests that run by turns, to be compared with each other.
//!
//! A machine that is shared is slower in one second than in the next, by more than what is to be told apart. So all guests
//! are booted, with I/O that never ends; then each runs for a moment while the others and their daemons are stopped, over
//! and over, and what is compared are moments that follow each other. What is left is that boots differ, by how their
//! memory lies: so there are several rounds.

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
const TURN: Duration = Duration::from_millis(100);
/// How long it runs first without being looked at: caches are the others'.
const WARM_UP: Duration = Duration::from_millis(10);
/// Turns of each guest in a round.
const TURNS: usize = 24;

/// Seconds that no round takes.
pub const ENDLESS_SECONDS: u32 = 100_000;

/// The one kind of I/O that goes on in all guests.
#[derive(Clone, Copy)]
pub struct Io {
    /// Whether the host's file is written.
    pub write: bool,
    /// Bytes of each.
    pub bytes: u64,
}

/// Looks at what a guest has said by the time its I/O goes on, and panics if it is not as it should be.
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

    /// I/Os so far, from the bytes that the process that has the image open has read or written: see proc_pid_io(5).
    /// Events make it some ten bytes more for each, in our daemon as in QEMU. They cannot be told from the number of calls:
    /// our daemon reads in vain very often.
    fn ios(&self, io: Io) -> f64 {
        let id = self.daemon.as_ref().map_or_else(|| self.guest.pid(), |daemon| daemon.process().id());
        let text = fs::read_to_string(format!("/proc/{id}/io")).unwrap();
        let name = if io.write { "wchar: " } else { "rchar: " };
        let bytes: f64 = text.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap();
        bytes / io.bytes as f64
    }

    /// Waits until its I/O goes on, and checks what it said.
    fn wait_for_io(&self, io: Io) {
        self.guest.wait_for_result("the beginning of the I/O", |result| result["event"] == "begin");
        let begun = self.ios(io);
        wait_until(LIMIT, "I/O", || {
            assert!(!self.guest.ended(), "the guest does no I/O");
            self.ios(io) - begun > 100.0
        });
        (self.check)(&self.guest.results());
    }

    /// Lets it run for a while, and returns its I/Os per second.
    fn turn(&self, io: Io) -> f64 {
        self.signal(Signal::SIGCONT);
        sleep(WARM_UP);
        let (begun, before) = (Instant::now(), self.ios(io));
        sleep(TURN);
        let (time, ios) = (begun.elapsed(), self.ios(io) - before);
        assert!(!self.guest.ended() && ios > 0.0, "the guest does no I/O any more");
        self.signal(Signal::SIGSTOP);
        ios / time.as_secs_f64()
    }
}

/// What was measured of a variant: a value for each round.
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
    // Another order each time, and backwards every other time: who is first finds other memory than who is last, and who
    // follows whom other caches.
    let order = |turn: usize| {
        let count = variants.len();
        (0..count)
            .map(move |at| if turn.is_multiple_of(2) { (at + turn) % count } else { (count - 1 - at + turn) % count })
    };
    let mut guests: BTreeMap<usize, Contender> = BTreeMap::new();
    for at in order(round) {
        guests.insert(at, start(variants[at], &Folder::in_memory()));
    }
    guests.values().for_each(|guest| guest.wait_for_io(io));
    guests.values().for_each(|guest| guest.signal(Signal::SIGSTOP));
    let mut iops = vec![Vec::new(); variants.len()];
    for turn in 0..TURNS {
        for at in order(turn) {
            iops[at].push(guests[&at].turn(io));
        }
    }
    for (of, variant) in iops.iter().zip(variants) {
        let ratios: Vec<f64> = of.iter().zip(&iops[0]).map(|(of, base)| of / base).collect();
        let measured = measured.entry(*variant).or_default();
        measured.iops.push(median(of));
        measured.ratios.push(median(&ratios));
    }
}
