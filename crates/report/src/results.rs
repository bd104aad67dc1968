//! The results that a guest reports of its workloads, as JSON lines.

use std::io::Read;

use serde_json::Value;

/// The most bytes of results that are read. A guest has little to report, but may write without end.
const RESULTS_MAX: u64 = 4 << 20;

/// The results of a guest. All strings are the guest's own, of any length.
#[derive(Debug, Default)]
pub struct Results {
    /// The workloads' results, in the order in which the guest reported them.
    pub workloads: Vec<Workload>,
    /// The first error that the guest reported; `None` if nothing failed.
    pub failure: Option<String>,
}

/// The result of one workload.
#[derive(Debug)]
pub struct Workload {
    /// The result in one line, for people.
    pub text: String,
    /// Whether the guest read back the data that it had written; `None` if it did not check.
    pub verified: Option<bool>,
}

impl Results {
    /// Reads a guest's results. Lines that are not JSON are skipped, since a guest's programs may print to the same
    /// place.
    pub fn read(results: impl Read) -> Results {
        let mut text = Vec::new();
        // After an error, what was read so far counts.
        let _ = results.take(RESULTS_MAX).read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        let results: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        Results { workloads: results.iter().filter_map(workload).collect(), failure: failure(&results) }
    }

    /// Whether every workload that checked its data read back what it had written; `None` if none checked.
    pub fn verified(&self) -> Option<bool> {
        let mut checks = self.workloads.iter().filter_map(|workload| workload.verified).peekable();
        checks.peek().is_some().then(|| checks.all(|verified| verified))
    }
}

fn failure(results: &[Value]) -> Option<String> {
    let error = results.iter().find(|value| value["event"] == "error");
    let failed = results.iter().any(|value| value["event"] == "end" && value["ok"] == false);
    let message = error.and_then(|value| value["message"].as_str());
    message.map(str::to_owned).or_else(|| failed.then(|| "a workload failed".into()))
}

fn workload(value: &Value) -> Option<Workload> {
    if value["event"] != "result" {
        return None;
    }
    let mut text = value["workload"].as_str().unwrap_or("workload").to_string();
    if let (Some(op), Some(size)) = (value["op"].as_str(), value["bs"].as_u64()) {
        text += &format!(" {op}, {size} bytes, depth {}", value["depth"]);
    }
    if let (Some(iops), Some(speed)) = (value["iops"].as_f64(), value["mib_per_s"].as_f64()) {
        text += &format!(": {iops:.0} I/O/s, {speed:.1} MiB/s");
    }
    if let Some(error) = value["error"].as_str() {
        text += &format!(": {error}");
    }
    Some(Workload { text, verified: value["verified"].as_bool() })
}
