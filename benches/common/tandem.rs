//! Guests that run by turns, to be compared with each other.
//!
//! A machine that is shared is slower in one second than in the next, by more than what is to be told apart. So all guests
//! are booted, with I/O that never ends; then each runs for a moment while the others and their daemons are stopped, over
//! and over, and what is compared are moments that follow each other. What is left is that boots differ, by how their
//! memory lies: so there are several rounds.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::{Daemon, Median, Qemu, median, results, said};

/// How long a guest runs at a time, after [`WARM_UP`].
const TURN: Duration = Duration::from_millis(100);
/// How long it runs first without being looked at: caches are the others'.
const WARM_UP: Duration = Duration::from_millis(10);
/// Turns of each guest in a round.
const TURNS: usize = 24;
/// How long guests have to boot.
const LIMIT: Duration = Duration::from_secs(600);

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
pub struct Running {
    pub qemu: Qemu,
    pub daemon: Option<Daemon>,
    pub check: Check,
}

impl Running {
    fn signal(&self, signal: Signal) {
        let daemon = self.daemon.as_ref().map(Daemon::id);
        for id in daemon.into_iter().chain([self.qemu.id()]) {
            kill(Pid::from_raw(id as i32), signal).unwrap();
        }
    }

    /// I/Os so far, from the bytes that the process that has the image open has read or written: see proc_pid_io(5).
    /// Events make it some ten bytes more for each, in our daemon as in QEMU. They cannot be told from the number of calls:
    /// our daemon reads in vain very often.
    fn ios(&self, io: Io) -> f64 {
        let id = self.daemon.as_ref().map_or_else(|| self.qemu.id(), Daemon::id);
        let text = fs::read_to_string(format!("/proc/{id}/io")).unwrap();
        let name = if io.write { "wchar: " } else { "rchar: " };
        let bytes: f64 = text.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap();
        bytes / io.bytes as f64
    }

    /// Waits until its I/O goes on, and checks what it said.
    fn wait_for_io(&mut self, io: Io, folder: &Path) {
        let deadline = Instant::now() + LIMIT;
        let mut before = self.ios(io);
        loop {
            sleep(Duration::from_millis(200));
            assert!(!self.qemu.ended() && Instant::now() < deadline, "the guest does no I/O; {}", said(folder));
            let now = self.ios(io);
            if now - before > 100.0 {
                break;
            }
            before = now;
        }
        let results = results(folder);
        assert!(results.iter().any(|result| result["event"] == "begin"), "no I/O has begun; {}", said(folder));
        (self.check)(&results);
    }

    /// Lets it run for a while, and returns its I/Os per second.
    fn turn(&mut self, io: Io, folder: &Path) -> f64 {
        self.signal(Signal::SIGCONT);
        sleep(WARM_UP);
        let (begun, before) = (Instant::now(), self.ios(io));
        sleep(TURN);
        let (time, ios) = (begun.elapsed(), self.ios(io) - before);
        assert!(!self.qemu.ended() && ios > 0.0, "the guest does no I/O any more; {}", said(folder));
        self.signal(Signal::SIGSTOP);
        ios / time.as_secs_f64()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.qemu.kill();
        // It is asked to end next.
        if let Some(daemon) = &self.daemon {
            let _ = kill(Pid::from_raw(daemon.id() as i32), Signal::SIGCONT);
        }
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

/// A folder in memory if that can be, so that the disk and what else is written to it play no part.
pub fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// One round. `start` boots a guest whose I/O never ends, with its files in the folder it is given, and returns it with
/// its daemon.
pub fn round<V: Copy + Ord>(
    variants: &[V],
    io: Io,
    round: usize,
    measured: &mut BTreeMap<V, Measured>,
    start: impl Fn(V, &Path) -> Running,
) {
    // Another order each time, and backwards every other time: who is first finds other memory than who is last, and who
    // follows whom other caches.
    let order = |turn: usize| {
        let count = variants.len();
        (0..count)
            .map(move |at| if turn.is_multiple_of(2) { (at + turn) % count } else { (count - 1 - at + turn) % count })
    };
    let mut guests: BTreeMap<usize, (Running, TempDir)> = BTreeMap::new();
    for at in order(round) {
        let folder = folder();
        guests.insert(at, (start(variants[at], folder.path()), folder));
    }
    for (guest, folder) in guests.values_mut() {
        guest.wait_for_io(io, folder.path());
    }
    guests.values().for_each(|(guest, _)| guest.signal(Signal::SIGSTOP));
    let mut iops = vec![Vec::new(); variants.len()];
    for turn in 0..TURNS {
        for at in order(turn) {
            let (guest, folder) = guests.get_mut(&at).unwrap();
            iops[at].push(guest.turn(io, folder.path()));
        }
    }
    for (of, variant) in iops.iter().zip(variants) {
        let ratios: Vec<f64> = of.iter().zip(&iops[0]).map(|(of, base)| of / base).collect();
        let measured = measured.entry(*variant).or_default();
        measured.iops.push(median(of));
        measured.ratios.push(median(&ratios));
    }
}
