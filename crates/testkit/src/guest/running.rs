//! A running guest.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{
    CONSOLE, FIRST_DISK, Folder, GUEST_TRACE, LOG, Outcome, QMP_SOCKET, Qmp, Results, SUMMARY, TRACE, outcome,
};
use crate::process::{Process, viommu};
use crate::wait_until;

/// Its process is `viommu run`, with which its QEMU ends, or QEMU itself.
pub struct Running {
    process: Process,
    folder: Folder,
    /// It must end by then.
    deadline: Instant,
    /// Whether an [`Outcome`] will print its logs.
    is_shown: bool,
}

impl Running {
    pub(super) fn start(command: &mut Command, folder: Folder, limit: Duration) -> Running {
        let deadline = Instant::now() + limit;
        Running { process: Process::start(command), folder, deadline, is_shown: false }
    }

    /// The id of its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends its process a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Whether its process has ended.
    pub fn ended(&self) -> bool {
        self.process.ended()
    }

    /// Kills it. Its files may be incomplete then.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Its results so far.
    pub fn results(&self) -> Results {
        Results::read(&self.folder)
    }

    fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Waits until it has written a result that `wanted` accepts.
    pub fn wait_for_result(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        wait_until(self.time_left(), what, || {
            let ended = self.process.ended();
            found = Results::read(&self.folder).iter().find(|result| wanted(result)).cloned();
            assert!(found.is_some() || !ended, "the guest ended without {what}");
            found.is_some()
        });
        found.unwrap()
    }

    /// Waits until the trace has more events than now. Events are written as they come.
    pub fn wait_for_events(&self) {
        let size = || fs::metadata(self.path(TRACE)).map_or(0, |file| file.len());
        let before = size();
        wait_until(self.time_left(), "an event", || size() > before);
    }

    /// Writes the mark into the first disk that ends `nvme-io --until-marked`.
    pub fn mark_disk(&self) {
        let disk = fs::OpenOptions::new().write(true).open(self.path(FIRST_DISK)).unwrap();
        let end = disk.metadata().unwrap().len();
        disk.write_all_at(b"mark", end - 4096).unwrap();
    }

    /// A connection to QEMU's monitor.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path(QMP_SOCKET))
    }

    /// Waits for the end, which must be a success: no error, and a guest that reached its last line.
    pub fn wait(self) -> Outcome {
        let outcome = self.end();
        outcome.assert_good_end();
        outcome
    }

    /// Waits for the end, whether it is a success or not.
    pub fn end(mut self) -> Outcome {
        // `viommu run` ends its QEMU by itself when its time is up, and says so.
        let status = self.process.wait(self.time_left() + crate::PATIENCE);
        self.is_shown = true;
        Outcome {
            status,
            summary: serde_json::from_str(&self.folder.read(SUMMARY)).unwrap_or_default(),
            results: self.results(),
            trace: self.folder.lines(TRACE),
            guest_trace: self.folder.lines(GUEST_TRACE),
            merged: self.merged(),
            console: self.folder.read(CONSOLE),
            log: self.folder.read(LOG),
        }
    }

    /// The trace and the guest's own trace, merged by `viommu merge`; empty if the guest made no trace.
    fn merged(&self) -> Vec<Value> {
        if !self.path(GUEST_TRACE).exists() {
            return Vec::new();
        }
        let output = viommu().current_dir(self.folder.path()).args(["merge", TRACE, GUEST_TRACE]).output().unwrap();
        println!("{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "viommu merge: {}", output.status);
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.is_shown {
            self.process.kill();
            outcome::show(&self.folder.read(CONSOLE), &self.folder.read(LOG), &self.results());
        }
    }
}
