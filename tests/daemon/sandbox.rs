//! The sandbox, which is on by default: the kernel's view of a daemon's threads, access to unmapped memory from inside,
//! and what QEMU, which is started outside, inherits.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{ENGINE, end, folder, names, pretended_qemu, serve, serve_with};
use viommu_testkit::engine::{DONE, Descriptor, RESET, register};
use viommu_testkit::process::viommu;
use viommu_testkit::vfio::*;
use viommu_testkit::{memfd, twin};

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

/// Connects a client of each kind, so that the threads of connections exist.
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
        // Ending takes only a right to remove files.
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

#[test]
fn the_environment_switches_it_off_too() {
    for (value, inside) in [("1", false), ("true", false), ("0", true), ("", true)] {
        let folder = folder();
        let mut daemon = viommu();
        daemon.args(["serve", "--socket-path", "viommu.sock"]).args(ENGINE).current_dir(folder.path());
        daemon.env("VIOMMU_NO_SANDBOX", value).env_remove("RUST_LOG").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = daemon.spawn().unwrap();
        // It prints that it serves once it is in the sandbox.
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let filter = if inside { "2" } else { "0" };
        assert!(threads(child.id(), "Seccomp").iter().all(|(_, seen)| seen == filter), "{value:?}: {line}");
        end(child);
    }
}

/// The engine's memory: a descriptor, and the data that it copies.
const RAM: u64 = 16 << 10;
const SOURCE: u64 = 0x1000;
const DESTINATION: u64 = 0x2000;
const COPIED: std::ops::Range<usize> = 0x2000..0x2300;

/// That memory before the copy, with the engine's only descriptor at 0.
fn memory() -> Vec<u8> {
    let mut ram = vec![0; RAM as usize];
    let copy = Descriptor { size: 0x300, source: SOURCE, destination: DESTINATION, ..Descriptor::default() };
    ram[..64].copy_from_slice(&copy.bytes());
    ram[SOURCE as usize..][..0x300].iter_mut().zip(1..).for_each(|(byte, at)| *byte = (at * 7 % 251) as u8);
    ram
}

/// A client of the daemon's engine; its end of the twin socket, if it wants one.
fn client(folder: &Path, json: &str) -> (RawClient, Option<UnixStream>) {
    let mut client = RawClient::connect(&folder.join("dma0.sock"));
    let (_, twin) = client.version(1, json);
    (client, twin.map(UnixStream::from))
}

/// Starts the engine's descriptor, and does not wait for its end.
fn start_copy(daemon: &Child, client: &mut RawClient) {
    assert!(threads(daemon.id(), "Seccomp").iter().all(|(_, filter)| filter == "2"));
    client.region_write(7, 4, &[6, 0]).unwrap();
    client.region_write(0, register::CHANCMD, &[RESET]).unwrap();
    until(|| client.region_read(0, register::CHANCMD, 1).unwrap()[0] & RESET == 0);
    client.region_write(0, register::CHAINADDR, &0_u64.to_le_bytes()).unwrap();
    client.region_write(0, register::DMACOUNT, &1_u16.to_le_bytes()).unwrap();
}

fn copy(daemon: &Child, client: &mut RawClient) {
    start_copy(daemon, client);
    until(|| u64::from(client.region_read(0, register::CHANSTS, 8).unwrap()[0]) & 7 == DONE);
}

fn until(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn files_are_read_and_written_from_within() {
    let folder = folder();
    let daemon = serve(folder.path());
    let file = memfd(RAM);
    file.write_all_at(&memory(), 0).unwrap();
    let (mut client, _) = client(folder.path(), "");
    client.dma_map(READ | WRITE | FILE_IO, 0, 0, RAM, &[file.as_raw_fd()]).unwrap();
    let open = || fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count();
    let before = open();
    // The daemon can identify this descriptor with the calls that the sandbox allows.
    client.dma_map(READ | WRITE | FILE_IO, 0, RAM, RAM, &[file.as_raw_fd()]).unwrap();
    assert_eq!(open(), before);
    copy(&daemon, &mut client);
    let mut ram = memory();
    file.read_exact_at(&mut ram, 0).unwrap();
    assert_eq!(ram[COPIED], memory()[SOURCE as usize..][..0x300]);
    drop(client);
    assert_eq!(end(daemon), "");
}

#[test]
fn clients_are_asked_for_memory_from_within() {
    let folder = folder();
    let daemon = serve(folder.path());
    let (mut client, twin) = client(folder.path(), TWIN);
    let answers = thread::spawn(|| twin::serve(twin.unwrap(), 0, memory(), 1 << 20));
    client.dma_map(READ | WRITE, 0, 0, RAM, &[]).unwrap();
    copy(&daemon, &mut client);
    drop(client);
    let (ram, count) = answers.join().unwrap();
    assert_eq!(ram[COPIED], ram[SOURCE as usize..][..0x300]);
    assert!(count >= 3, "descriptor, source, destination: {count}");
    assert_eq!(end(daemon), "");
}

#[test]
fn writes_that_are_not_answered_are_taken_back_from_within() {
    let folder = folder();
    let daemon = serve(folder.path());
    let (mut client, twin) = client(folder.path(), TWIN);
    let mut twin = twin.unwrap();
    client.dma_map(READ | WRITE, 0, 0, RAM, &[]).unwrap();
    start_copy(&daemon, &mut client);
    let ram = memory();
    loop {
        let asked = twin::take_head(&mut twin).unwrap();
        if asked.command == command::DMA_WRITE {
            break;
        }
        twin::answer_read(&mut twin, &asked, 0, &ram);
    }
    let mut rest = Vec::new();
    // Both the session and this thread end.
    for stream in [&mut client.stream, &mut twin] {
        stream.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "{rest:x?}");
    }
    // Nothing but the session ends.
    let (mut next, _) = self::client(folder.path(), "");
    assert_eq!(next.region_read(7, 0, 2).unwrap(), [0x86, 0x80]);
    drop(next);
    let said = end(daemon);
    assert!(said.contains("does not answer DmaWrite"), "{said}");
}

/// The status and the descriptors of the process that `viommu run` starts.
fn started(folder: &Path, arguments: &[&str]) -> (String, String) {
    pretended_qemu(folder, "cat /proc/self/status > status\nls -l /proc/self/fd > fds");
    let output = viommu()
        .args(["run", "--qemu", "./qemu", "--dir", "dir", "--trace-file", "trace.jsonl", "--summary", "summary.json"])
        .args(ENGINE)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    // Written from inside the sandbox.
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
    // Descriptors that were left open for the tests themselves are inherited by every process that they start.
    let mut list = Command::new("ls");
    let inherited = list.args(["-l", "/proc/self/fd"]).stdin(Stdio::null()).output().unwrap().stdout;
    let count = |list: &str| list.lines().skip(1).filter(|line| !line.contains("/proc/")).count();
    assert_eq!(count(&descriptors), count(&String::from_utf8_lossy(&inherited)), "{descriptors}");
}
