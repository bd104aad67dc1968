//! What a guest said of its workloads: JSON lines.

use std::io::Read;

use serde_json::Value;

/// Bytes of results that are read: a guest may write as much as it likes, and says little.
const RESULTS_MAX: u64 = 4 << 20;

/// What a guest said. All strings are its own words, of any length.
#[derive(Debug, Default)]
pub struct Results {
    /// In their order.
    pub workloads: Vec<Workload>,
    /// What went wrong.
    pub failure: Option<String>,
}

/// What the guest said of one of its workloads.
#[derive(Debug)]
pub struct Workload {
    /// In a line for people.
    pub text: String,
    /// Whether the guest found its data as it had written them; `None` if it did not check.
    pub verified: Option<bool>,
}

impl Results {
    /// Reads what a guest wrote; lines that are no results are its own noise.
    pub fn read(results: impl Read) -> Results {
        let mut text = Vec::new();
        // What was read before an error is what the guest said.
        let _ = results.take(RESULTS_MAX).read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        let results: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        Results { workloads: results.iter().filter_map(workload).collect(), failure: failure(&results) }
    }

    /// Whether all data were found as they had been written; `None` if no workload checked that.
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
