//! `viommu trace`.

use std::io::{BufRead, BufReader};

use serde_json::Value;
use viommu_testkit::process::viommu;
use viommu_trace::event::Access;
use viommu_trace::{Event, Reader};

use crate::fixture::*;

/// Runs `viommu trace` on the socket. Returns its output and its status.
fn viommu_trace(socket: &std::path::Path, arguments: &[&str]) -> std::process::Output {
    viommu().args(["trace", "--socket"]).arg(socket).args(arguments).output().unwrap()
}

#[test]
fn the_command_prints_what_it_is_asked_for() {
    let fixture = Fixture::new();
    fixture.interrupts(32, 0..3);
    fixture.tracer.emit(Event::Fault {
        endpoint: 40,
        reason: 2,
        access: Access::Read,
        address: 0x1000,
        domain: None,
        dropped: false,
    });
    let print = |arguments: &[&str]| {
        let output = viommu_trace(&fixture.socket, arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let text = String::from_utf8(print(&["--backlog", "all", "--count", "4"])).unwrap();
    assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 4);
    assert!(text.ends_with("fault     00:05.0  reason=MAPPING access=read address=0x1000 dropped=0\n"), "{text}");
    let json = print(&["--backlog", "2", "--count", "2", "--format", "json", "--endpoint", "00:04.0"]);
    let json: Vec<Value> = json.split_inclusive(|b| *b == b'\n').map(|l| serde_json::from_slice(l).unwrap()).collect();
    assert_eq!(json[0]["kind"], "hello");
    assert_eq!(vectors(&json[1..]), [1, 2]);
    let binary = print(&["--backlog", "all", "--count", "1", "--format", "binary", "--kind", "kick,fault"]);
    let mut file = Reader::new(&binary[..]).unwrap();
    assert_eq!(file.next_record().unwrap().unwrap().seq.get(), 3);
    assert!(file.next_record().unwrap().is_none());
}

#[test]
fn the_command_ends_with_the_daemon_and_says_why_it_cannot_begin() {
    let fixture = Fixture::new();
    let socket = fixture.socket.clone();
    let mut watcher = viommu()
        .args(["trace", "--format", "json", "--socket"])
        .arg(&socket)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watcher.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("hello"));
    fixture.interrupts(32, 0..3);
    fixture.stop();
    assert_eq!(lines.count(), 3);
    assert!(watcher.wait().unwrap().success());

    let output = viommu_trace(&socket, &[]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("There is no trace socket"));
}
