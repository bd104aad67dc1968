//! What a run did, in numbers.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use viommu_report::results::Results;

use super::short::short;
use crate::daemon::DaemonStats;
use Number::{Bytes, Count};

/// The files of a run.
pub struct Files {
    /// The guest's console; `-` is this terminal.
    pub console: PathBuf,
    /// The guest's results: JSON lines.
    pub results: PathBuf,
    /// The trace: JSON lines.
    pub trace: Option<PathBuf>,
}

/// What a run did, in numbers.
pub struct Summary {
    stats: DaemonStats,
    console: PathBuf,
    results: PathBuf,
    trace: Option<PathBuf>,
    /// What the guest said of each of its workloads.
    workloads: Vec<String>,
    /// Whether the guest found its data as it had written them; `None` if no workload checked that.
    verified: Option<bool>,
    /// What the guest said went wrong.
    failure: Option<String>,
    elapsed: Duration,
}

impl Summary {
    /// Puts the daemon's statistics and the guest's results together. `elapsed` is the time that QEMU ran.
    pub fn new(stats: &DaemonStats, files: &Files, results: impl Read, elapsed: Duration) -> Summary {
        let results = Results::read(results);
        Summary {
            stats: stats.clone(),
            console: files.console.clone(),
            results: files.results.clone(),
            trace: files.trace.clone(),
            verified: results.verified(),
            workloads: results.workloads.iter().map(|workload| short(&workload.text)).collect(),
            failure: results.failure.map(|message| short(&message)),
            elapsed,
        }
    }

    /// What went wrong in the guest, if it said so.
    pub fn failure(&self) -> Option<&str> {
        match (&self.failure, self.verified) {
            (Some(message), _) => Some(message),
            (None, Some(false)) => Some("it read back something else than it had written"),
            (None, _) => None,
        }
    }

    /// The summary under stable names.
    pub fn to_json(&self) -> String {
        let stats = &self.stats;
        let mut requests = serde_json::Map::new();
        for (request, count) in stats.iommu.requests.iter() {
            requests.insert(request.name().to_lowercase(), count.total.into());
        }
        requests.insert("unknown".into(), stats.unknown_requests.into());
        requests.insert("malformed".into(), stats.malformed_requests.into());
        let mut value = json!({
            "requests": requests,
            "verified": self.verified,
            "elapsed_s": self.elapsed.as_secs_f64(),
            "trace": self.trace,
            "guest_log": self.console,
            "guest_results": self.results,
        });
        for (name, number) in self.rows().into_iter().flat_map(|row| row.numbers) {
            value[name] = number.value().into();
        }
        format!("{value:#}\n")
    }

    /// What the daemon counted, but for the types of requests: each row as it is printed, with the stable names of its
    /// numbers.
    fn rows(&self) -> [Row; 11] {
        let (stats, iommu) = (&self.stats, &self.stats.iommu);
        let failed = iommu.requests.iter().map(|(_, count)| count.failed).sum();
        let row = |label, numbers: &[_]| Row { label, numbers: numbers.to_vec() };
        [
            row("          failed of these", &[("requests_failed", Count(failed))]),
            row("kicks", &[("kicks", Count(stats.kicks))]),
            row(
                "mappings: live now, peak",
                &[("mappings_live", Count(iommu.mappings_live)), ("mappings_peak", Count(iommu.mappings_peak))],
            ),
            row("reservations: live now", &[("reservations_live", Count(iommu.reservations_live))]),
            row("linked now: bytes", &[("linked_bytes", Bytes(iommu.linked_bytes))]),
            row("DMA: translated bytes read", &[("dma_read_bytes", Bytes(stats.dma_read_bytes))]),
            row("     translated bytes written", &[("dma_write_bytes", Bytes(stats.dma_write_bytes))]),
            row("     bypass, both", &[("dma_bypass_bytes", Bytes(stats.dma_bypass_bytes))]),
            row(
                "     faults, dropped",
                &[("faults", Count(iommu.faults)), ("faults_dropped", Count(iommu.faults_dropped))],
            ),
            row(
                "device I/O: commands, bytes",
                &[("io_count", Count(stats.io_count)), ("io_bytes", Bytes(stats.io_bytes))],
            ),
            row("trace: events, lost", &[("events", Count(stats.events)), ("events_lost", Count(stats.events_lost))]),
        ]
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = &self.stats;
        let mut line = |label: &str, value: String| writeln!(f, "  {label:<28} {value}");
        for (n, (request, count)) in stats.iommu.requests.iter().enumerate() {
            let heading = if n == 0 { "requests:" } else { "" };
            line(&format!("{heading:<9} {}", request.name()), count.total.to_string())?;
        }
        line("          unknown, malformed", format!("{}, {}", stats.unknown_requests, stats.malformed_requests))?;
        for row in self.rows() {
            let numbers: Vec<_> = row.numbers.iter().map(|(_, number)| number.to_string()).collect();
            line(row.label, numbers.join(", "))?;
        }
        line("time QEMU ran", format!("{:.1} s", self.elapsed.as_secs_f64()))?;
        for workload in &self.workloads {
            line("guest", workload.clone())?;
        }
        let verified = match self.verified {
            Some(true) => "the guest read back what it had written",
            Some(false) => "NO: the guest read back something else",
            None => "not checked by the guest",
        };
        line("data verified", verified.into())?;
        if let Some(trace) = &self.trace {
            line("trace file", trace.display().to_string())?;
        }
        line("guest's console", self.console.display().to_string())
    }
}

/// Numbers that are printed in a row, with their names in JSON.
struct Row {
    label: &'static str,
    numbers: Vec<(&'static str, Number)>,
}

/// A number, by how it is printed.
#[derive(Clone, Copy)]
enum Number {
    Count(u64),
    Bytes(u64),
}

impl Number {
    fn value(self) -> u64 {
        match self {
            Count(value) | Bytes(value) => value,
        }
    }
}

impl fmt::Display for Number {
    /// Bytes are printed exactly, and in a unit that can be read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Bytes(count @ 1024..1_048_576) => write!(f, "{count} ({:.1} KiB)", count as f64 / 1024.0),
            Bytes(count @ 1_048_576..) => write!(f, "{count} ({:.1} MiB)", count as f64 / 1_048_576.0),
            Count(count) | Bytes(count) => write!(f, "{count}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(results: &str) -> Summary {
        let files = Files { console: "c".into(), results: "r".into(), trace: None };
        Summary::new(&DaemonStats::default(), &files, results.as_bytes(), Duration::from_secs(1))
    }

    #[test]
    fn verified_is_what_every_check_of_the_guest_says() {
        assert_eq!(summary("").verified, None);
        let good = "noise\n{\"event\":\"result\",\"workload\":\"nvme-io\",\"verified\":true}\n{\"event\":\"end\"}\n";
        assert_eq!(summary(good).verified, Some(true));
        assert_eq!(summary(&format!("{good}{}", good.replace("true", "false"))).verified, Some(false));
        assert!(summary(good).to_json().contains("\"verified\": true"));
        assert_eq!(summary(good).failure(), None);
        assert!(summary(&good.replace("true", "false")).failure().is_some());
    }

    #[test]
    fn what_the_guest_says_went_wrong_is_kept() {
        let text = "{\"event\":\"error\",\"message\":\"no disk\"}\n{\"event\":\"end\",\"ok\":false}\n";
        assert_eq!(summary(text).failure(), Some("no disk"));
    }

    #[test]
    fn a_guest_that_says_much_is_cut_short() {
        let much = "a".repeat(1 << 20);
        let error = format!("{{\"event\":\"error\",\"message\":\"{much}\"}}\n");
        let result = format!("{{\"event\":\"result\",\"workload\":\"{much}\"}}\n");
        let summary = summary(&(error + &result.repeat(2)));
        assert!(summary.failure().unwrap().ends_with(" bytes more)"));
        assert!((2000..8000).contains(&summary.to_string().len()));
    }
}
