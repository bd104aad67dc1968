//! What a run did, in numbers.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use viommu_report::results::Results;

use super::short::short;
use crate::daemon::Counts;

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
    counts: Counts,
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
    /// Puts the daemon's counts and the guest's results together. `elapsed` is the time that QEMU ran.
    pub fn new(counts: &Counts, files: &Files, results: impl Read, elapsed: Duration) -> Summary {
        let results = Results::read(results);
        Summary {
            counts: counts.clone(),
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
        let counts = &self.counts;
        let mut requests = serde_json::Map::new();
        for (request, count) in counts.iommu.requests.iter() {
            requests.insert(request.name().to_lowercase(), count.total.into());
        }
        requests.insert("unknown".into(), counts.unknown_requests.into());
        requests.insert("malformed".into(), counts.malformed_requests.into());
        let value = json!({
            "requests": requests,
            "requests_failed": self.failed(),
            "kicks": counts.kicks,
            "mappings_live": counts.iommu.mappings_live,
            "mappings_peak": counts.iommu.mappings_peak,
            "reservations_live": counts.iommu.reservations_live,
            "linked_bytes": counts.iommu.linked_bytes,
            "dma_read_bytes": counts.dma_read_bytes,
            "dma_write_bytes": counts.dma_write_bytes,
            "dma_bypass_bytes": counts.dma_bypass_bytes,
            "faults": counts.iommu.faults,
            "faults_dropped": counts.iommu.faults_dropped,
            "io_count": counts.io_count,
            "io_bytes": counts.io_bytes,
            "verified": self.verified,
            "events": counts.events,
            "events_lost": counts.events_lost,
            "elapsed_s": self.elapsed.as_secs_f64(),
            "trace": self.trace,
            "guest_log": self.console,
            "guest_results": self.results,
        });
        format!("{value:#}\n")
    }

    fn failed(&self) -> u64 {
        self.counts.iommu.requests.iter().map(|(_, count)| count.failed).sum()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.counts;
        let iommu = &counts.iommu;
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<28} {value}");
        for (n, (request, count)) in iommu.requests.iter().enumerate() {
            let heading = if n == 0 { "requests:" } else { "" };
            row(&format!("{heading:<9} {}", request.name()), count.total.to_string())?;
        }
        row("          unknown, malformed", format!("{}, {}", counts.unknown_requests, counts.malformed_requests))?;
        row("          failed of these", self.failed().to_string())?;
        row("kicks", counts.kicks.to_string())?;
        row("mappings: live now, peak", format!("{}, {}", iommu.mappings_live, iommu.mappings_peak))?;
        row("reservations: live now", iommu.reservations_live.to_string())?;
        row("linked now: bytes", bytes(iommu.linked_bytes))?;
        row("DMA: translated bytes read", bytes(counts.dma_read_bytes))?;
        row("     translated bytes written", bytes(counts.dma_write_bytes))?;
        row("     bypass, both", bytes(counts.dma_bypass_bytes))?;
        row("     faults, dropped", format!("{}, {}", iommu.faults, iommu.faults_dropped))?;
        row("device I/O: commands, bytes", format!("{}, {}", counts.io_count, bytes(counts.io_bytes)))?;
        row("trace: events, lost", format!("{}, {}", counts.events, counts.events_lost))?;
        row("time QEMU ran", format!("{:.1} s", self.elapsed.as_secs_f64()))?;
        for workload in &self.workloads {
            row("guest", workload.clone())?;
        }
        let verified = match self.verified {
            Some(true) => "the guest read back what it had written",
            Some(false) => "NO: the guest read back something else",
            None => "not checked by the guest",
        };
        row("data verified", verified.into())?;
        if let Some(trace) = &self.trace {
            row("trace file", trace.display().to_string())?;
        }
        row("guest's console", self.console.display().to_string())
    }
}

/// A number of bytes, exact and in a unit that can be read.
fn bytes(count: u64) -> String {
    match count {
        0..1024 => count.to_string(),
        1024..1_048_576 => format!("{count} ({:.1} KiB)", count as f64 / 1024.0),
        _ => format!("{count} ({:.1} MiB)", count as f64 / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(results: &str) -> Summary {
        let files = Files { console: "c".into(), results: "r".into(), trace: None };
        Summary::new(&Counts::default(), &files, results.as_bytes(), Duration::from_secs(1))
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
