//! The results of a guest.

use std::process::ExitStatus;

use serde_json::Value;

use super::Results;

/// Everything that is known of a guest that has ended. It is printed when the test fails.
pub struct Outcome {
    pub status: ExitStatus,
    /// The summary of `viommu run`; null for another guest.
    pub summary: Value,
    pub results: Results,
    /// The trace that `viommu run` wrote.
    pub trace: Vec<Value>,
    /// The guest's own trace.
    pub guest_trace: Vec<Value>,
    /// Both, merged.
    pub merged: Vec<Value>,
    pub console: String,
    /// The log of the process.
    pub log: String,
}

impl Outcome {
    /// Checks that the process ended without an error, and that the guest reached its last line.
    pub fn assert_good_end(&self) {
        assert!(self.status.success(), "{}", self.status);
        assert!(self.results.ended_well(), "the guest's workload failed");
    }

    /// The events of a kind in the trace.
    pub fn events<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.trace.iter().filter(move |event| event["kind"] == kind)
    }

    /// The results of a workload.
    pub fn results_of<'a>(&'a self, workload: &'a str) -> impl Iterator<Item = &'a Value> {
        self.results.of(workload)
    }

    /// A number of the summary.
    pub fn count(&self, name: &str) -> u64 {
        self.summary[name].as_u64().unwrap_or_else(|| panic!("{name} is not in {}", self.summary))
    }

    /// The number of requests of a type.
    pub fn requests(&self, name: &str) -> u64 {
        self.summary["requests"][name].as_u64().unwrap_or_else(|| panic!("{name} is not in {}", self.summary))
    }

    /// The daemon's warnings.
    pub fn warnings(&self) -> Vec<&str> {
        self.log.lines().filter(|line| line.starts_with("[WARN") || line.starts_with("[ERROR")).collect()
    }

    /// Checks what holds for every run with translated I/O.
    pub fn assert_translated(&self) {
        assert_eq!(self.summary["verified"], true, "{}", self.summary);
        assert!(self.requests("attach") > 0 && self.requests("map") > 0, "{}", self.summary);
        assert!(self.events("dma").any(|dma| dma["route"] == "mapped"), "no access went through a mapping");
        assert_eq!(self.count("faults"), 0);
        assert_eq!(self.count("events_lost"), 0);
        assert_eq!(self.count("requests_failed"), 0);
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show(&self.console, &self.log, &self.results);
        }
    }
}

pub(super) fn show(console: &str, log: &str, results: &[Value]) {
    println!("==== the guest's console ====\n{console}\n==== viommu ====\n{log}\n==== the guest's results ====");
    for result in results {
        println!("{result}");
    }
}
