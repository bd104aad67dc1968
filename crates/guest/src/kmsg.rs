//! The kernel log's lines that matter to a run.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use serde_json::{Value, json};

/// What a line must contain (lower case) to be reported.
const TOPICS: [&str; 8] = ["iommu", "nvme", "ioat", "dmar", "vfio", "pcieport", "error", " fault"];

/// Words with which the kernel reports that something is wrong with it.
const COMPLAINTS: [&str; 7] =
    ["BUG:", "WARNING:", "Oops", "Call Trace:", "INFO: task", "rcu_preempt detected stalls", "DMA-API:"];

/// The log's lines about IOMMUs and devices, and separately the lines in which the kernel complains.
pub fn report() -> Value {
    let lines = read_log();
    let about = |line: &&String| TOPICS.iter().any(|topic| line.to_lowercase().contains(topic));
    let complaint = |line: &&String| COMPLAINTS.iter().any(|mark| line.contains(mark));
    json!({
        "lines": lines.iter().filter(about).collect::<Vec<_>>(),
        "complaints": lines.iter().filter(complaint).collect::<Vec<_>>(),
    })
}

/// All messages that the kernel still holds, oldest first: `seconds message`.
pub fn read_log() -> Vec<String> {
    let Ok(mut log) = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg") else {
        return Vec::new();
    };
    let mut lines = Vec::new();
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(length) => lines.extend(message(&String::from_utf8_lossy(&record[..length]))),
            // The record was overwritten before it was read; the next read continues after the gap.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(_) => return lines,
        }
    }
}

/// The text of one record, `priority,sequence,microseconds,flags;text`, as `seconds text`.
fn message(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let microseconds: u64 = head.split(',').nth(2)?.parse().ok()?;
    let text = text.lines().next()?;
    Some(format!("{}.{:06} {text}", microseconds / 1_000_000, microseconds % 1_000_000))
}

#[cfg(test)]
mod tests {
    use super::message;

    #[test]
    fn a_record_becomes_time_and_text() {
        let line = message("6,339,5140900,-;NET: Registered PF_INET\n SUBSYSTEM=x\n");
        assert_eq!(line.as_deref(), Some("5.140900 NET: Registered PF_INET"));
        assert_eq!(message("nonsense"), None);
    }
}
