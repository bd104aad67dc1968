//! What ordinary tools show of a running guest.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use viommu_testkit::guest::{Guest, LIMIT};
use viommu_testkit::process::viommu;

use crate::{BUSY, NVME};

#[test]
fn a_plain_client_follows_a_running_guest() {
    let guest = Guest::new(NVME, BUSY).start();
    guest.wait_for_result("the boot report", |result| result["event"] == "boot");
    // As `nc -U` does: connect and read.
    let stream = UnixStream::connect(guest.path("trace.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut kinds = std::collections::BTreeSet::new();
    for line in BufReader::new(stream).lines().take(5000) {
        let event: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
        kinds.extend(event["kind"].as_str().map(String::from));
    }
    for kind in ["kick", "request", "dma", "command", "interrupt"] {
        assert!(kinds.contains(kind), "{kind} is not among {kinds:?}");
    }
    guest.mark_disk();
    guest.wait();
}

#[test]
fn viommu_trace_prints_what_is_asked_for() {
    let guest = Guest::new(NVME, BUSY).start();
    guest.wait_for_result("the boot report", |result| result["event"] == "boot");
    let mut trace = viommu()
        .args(["trace", "--kind", "request", "--format", "text", "--count", "20", "--socket"])
        .arg(guest.path("trace.sock"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    trace.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(trace.wait().unwrap().success());
    assert!(text.lines().count() >= 20 && text.contains("MAP"), "{text}");
    assert!(!text.contains("dma"), "{text}");
    guest.mark_disk();
    guest.wait();
}
