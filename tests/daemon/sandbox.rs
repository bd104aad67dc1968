//! The sandbox, on by default: what the kernel says of a daemon's threads, and what a QEMU inherits that is started outside.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{ENGINE, end, folder, names, pretended_qemu, serve_with};

/// Fields of /proc/PID/task/TID/status of each thread, and the thread's name.
fn threads(process: u32, field: &str) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let status = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let value = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap().trim().to_owned()
    };
    status.map(|status| (value(&status, "Name"), value(&status, field))).collect()
}

/// A client of each kind, so that there are the threads that a connection has.
fn clients(folder: &Path) -> [UnixStream; 3] {
    ["viommu.sock", "dma0.sock", "trace.sock"].map(|socket| {
        let mut client = UnixStream::connect(folder.join(socket)).unwrap();
        let (message, answer): (&[u8], usize) = match socket {
            // GET_FEATURES.
            "viommu.sock" => (&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], 20),
            // DEVICE_GET_INFO without its body, which is refused.
            "dma0.sock" => (&[1, 0, 4, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0),
            _ => (b"{}\n", 1),
        };
        client.write_all(message).unwrap();
        client.read_exact(&mut vec![0; answer]).unwrap();
        client
    })
}

#[test]
fn every_thread_is_in_the_sandbox_unless_it_is_switched_off() {
    for (arguments, inside) in
        [(&["--trace-socket", "trace.sock"][..], true), (&["--trace-socket", "trace.sock", "--no-sandbox"], false)]
    {
        let folder = folder();
        let (child, _) = serve_with(folder.path(), arguments);
        let clients = clients(folder.path());
        let (filtered, privileges) = (threads(child.id(), "Seccomp"), threads(child.id(), "NoNewPrivs"));
        assert!(filtered.len() >= 5, "{filtered:?}");
        let (filter, no_new) = if inside { ("2", "1") } else { ("0", "0") };
        assert!(filtered.iter().all(|(_, value)| value == filter), "{filtered:?}");
        assert!(privileges.iter().all(|(_, value)| value == no_new), "{privileges:?}");
        drop(clients);
        end(child);
        // Which takes a right to remove files, and that alone.
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

#[test]
fn the_environment_switches_it_off_too() {
    for (value, inside) in [("1", false), ("true", false), ("0", true), ("", true)] {
        let folder = folder();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_viommu"));
        daemon.args(["serve", "--socket-path", "viommu.sock"]).args(ENGINE).current_dir(folder.path());
        daemon.env("VIOMMU_NO_SANDBOX", value).env_remove("RUST_LOG").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = daemon.spawn().unwrap();
        // It prints that it serves when it is in the sandbox.
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let filter = if inside { "2" } else { "0" };
        assert!(threads(child.id(), "Seccomp").iter().all(|(_, seen)| seen == filter), "{value:?}: {line}");
        end(child);
    }
}

/// What `viommu run` starts: its status, and the descriptors that it has.
fn started(folder: &Path, arguments: &[&str]) -> (String, String) {
    pretended_qemu(folder, "cat /proc/self/status > status\nls -l /proc/self/fd > fds");
    let output = Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(["run", "--qemu", "./qemu", "--dir", "dir", "--trace-file", "trace.jsonl", "--summary", "summary.json"])
        .args(ENGINE)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    // Written from within.
    assert!(fs::read_to_string(folder.join("trace.jsonl")).unwrap().contains("\"hello\""));
    assert!(fs::read_to_string(folder.join("summary.json")).unwrap().contains("\"requests\""));
    assert_eq!(names(&folder.join("dir")), ["guest.log", "results.jsonl"]);
    let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    (text("status"), text("fds"))
}

#[test]
fn a_qemu_is_started_outside_and_inherits_no_descriptor() {
    let folder = folder();
    let (status, descriptors) = started(folder.path(), &[]);
    assert!(status.contains("Seccomp:\t0") && status.contains("NoNewPrivs:\t0"), "{status}");
    // What whoever started the tests left open is inherited by all that they start.
    let mut list = Command::new("ls");
    let inherited = list.args(["-l", "/proc/self/fd"]).stdin(Stdio::null()).output().unwrap().stdout;
    let count = |list: &str| list.lines().skip(1).filter(|line| !line.contains("/proc/")).count();
    assert_eq!(count(&descriptors), count(&String::from_utf8_lossy(&inherited)), "{descriptors}");
}
