//! The `viommu` command as a user starts it: its messages when it cannot start, and how many it writes when a peer
//! misbehaves.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod backlog;
mod image;
mod report;
mod sandbox;
mod soak;
mod startup;
mod survivors;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use viommu_testkit::process::viommu;
use viommu_testkit::{PATIENCE, wait_until};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Runs the command in `folder`, which must fail. Returns its messages.
fn fails(folder: &Path, arguments: &[&str]) -> String {
    let output = viommu().args(arguments).current_dir(folder).output().unwrap();
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

/// Checks that the command fails, and that its messages have all these parts.
fn says(folder: &Path, arguments: &[&str], wanted: &[&str]) {
    let said = fails(folder, arguments);
    for part in wanted {
        assert!(said.contains(part), "{arguments:?}: {part:?} is not in: {said}");
    }
}

const ENGINE: [&str; 2] = ["--endpoint", "dma-engine,address=05.0"];

/// `viommu serve` of a DMA engine in `folder`.
fn serve(folder: &Path) -> Child {
    let (child, _) = serve_with(folder, &[]);
    child
}

/// The same with more arguments. Also returns its output after it has begun to serve.
fn serve_with(folder: &Path, arguments: &[&str]) -> (Child, BufReader<ChildStdout>) {
    serve_on("viommu.sock", folder, &[&ENGINE, arguments].concat())
}

/// `viommu serve` on this socket, with these arguments. Also returns its output after it has begun to serve.
fn serve_on(socket: &str, folder: &Path, arguments: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut child = viommu()
        .args(["serve", "--socket-path", socket])
        .args(arguments)
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut printed = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    printed.read_line(&mut line).unwrap();
    assert_eq!(line, format!("viommu: serving on {socket}\n"));
    (child, printed)
}

/// Asks it to end. Returns its standard error output.
fn end(mut child: Child) -> String {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    said
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_socket_that_cannot_be_made() {
    let folder = folder();
    let long = "s".repeat(120);
    let serve = |socket: &str| [&["serve", "--socket-path", socket][..], &ENGINE].concat().join("\n");
    let wanted = [
        (long.as_str(), &["has 120 bytes", "has 107 at most", "choose a shorter one"][..]),
        ("sub/folder/viommu.sock", &["There is no folder sub/folder", "make it, or choose another path"]),
        ("file", &["file exists and is not a socket", "remove it"]),
    ];
    fs::write(folder.path().join("file"), "").unwrap();
    for (socket, wanted) in wanted {
        let arguments = serve(socket);
        says(folder.path(), &arguments.split('\n').collect::<Vec<_>>(), wanted);
    }
    let trace = [&["serve", "--socket-path", "viommu.sock", "--trace-socket", "none/trace.sock"][..], &ENGINE].concat();
    says(folder.path(), &trace, &["Cannot start the trace", "There is no folder none"]);
    says(folder.path(), &["trace", "--socket", &long], &["has 120 bytes", "has 107 at most"]);
}

#[test]
fn a_socket_that_is_alive_and_one_that_is_stale() {
    let folder = folder();
    let mut killed = serve(folder.path());
    let again = [&["serve", "--socket-path", "viommu.sock"][..], &ENGINE].concat();
    says(folder.path(), &again, &["Another process listens on viommu.sock", "end it, or choose another path"]);
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(folder.path().join("viommu.sock").exists());
    assert_eq!(end(serve(folder.path())), "");
    assert!(!folder.path().join("viommu.sock").exists());
}

/// The option with which benchmarks measure the cost of tracing.
#[test]
fn tracing_in_time_slices() {
    let folder = folder();
    let slices_of = |time| {
        let (child, mut printed) = serve_with(folder.path(), &["--trace-socket", "trace.sock", "--trace-slices", "20"]);
        std::thread::sleep(time);
        assert_eq!(end(child), "");
        let mut text = String::new();
        printed.read_to_string(&mut text).unwrap();
        text
    };
    // The slices are printed at the end only, and on a slow machine there are fewer.
    let texts = [800, 8_000, 80_000].map(Duration::from_millis).into_iter().map(slices_of);
    let text = texts.into_iter().find(|text| text.lines().count() >= 4).expect("at least four slices");
    let slices: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (at, slice) in slices.iter().enumerate() {
        assert_eq!((slice["traced"].as_bool(), &slice["io_count"]), (Some(at % 2 == 0), &json!(0)), "{text}");
    }
    let time = |slice: &Value, name: &str| slice[name].as_u64().unwrap();
    for pair in slices.windows(2) {
        // The last may be cut short.
        assert!(time(&pair[0], "end") - time(&pair[0], "begin") >= 20_000_000, "{text}");
        assert!(time(&pair[1], "begin") > time(&pair[0], "end"), "{text}");
    }
}

#[test]
fn only_one_of_many_daemons_that_begin_at_once_gets_a_stale_socket() {
    for round in 0..20 {
        let folder = folder();
        drop(UnixListener::bind(folder.path().join("viommu.sock")).unwrap());
        let begin = |_| {
            viommu()
                .args([&["serve", "--socket-path", "viommu.sock"][..], &ENGINE].concat())
                .current_dir(&folder)
                .env_remove("RUST_LOG")
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let (mut serving, mut refused) = (Vec::new(), Vec::new());
        for mut daemon in (0..8).map(begin).collect::<Vec<_>>() {
            let mut line = String::new();
            BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
            if line.is_empty() {
                refused.push(String::from_utf8(daemon.wait_with_output().unwrap().stderr).unwrap());
            } else {
                serving.push(daemon);
            }
        }
        let count = serving.len();
        serving.into_iter().for_each(|daemon| drop(end(daemon)));
        assert_eq!(count, 1, "round {round}: {refused:?}");
        assert!(refused.iter().all(|said| said.contains("Another process listens on viommu.sock")), "{refused:?}");
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

#[test]
fn an_image_and_a_topology_that_cannot_be_used() {
    let folder = folder();
    let nvme = ["serve", "--socket-path", "viommu.sock", "--endpoint", "nvme,address=04.0,image=none.img"];
    says(folder.path(), &nvme, &["no image none.img", "--create-images 1G"]);
    let endpoint = ["serve", "--socket-path", "viommu.sock", "--endpoint", "nvme,address=4,image=none.img"];
    says(folder.path(), &endpoint, &["--endpoint nvme,address=4,", "key `address`: \"4\"", "was expected"]);
    fs::write(folder.path().join("t.toml"), "[[nvme]]\naddress = \"04.0\"\nimage = \"a\"\nblock-size = 7\n").unwrap();
    let topology = ["serve", "--socket-path", "viommu.sock", "--topology", "t.toml"];
    says(folder.path(), &topology, &["t.toml: line 4, column 14", "key `block-size`", "512 or 4096 was expected"]);
    let missing = ["serve", "--socket-path", "viommu.sock", "--topology", "none.toml"];
    says(folder.path(), &missing, &["Cannot read the topology none.toml", "No such file"]);
}

/// `docs/topology.md` shows the message about a wrong topology.
#[test]
fn the_documentation_shows_an_error_as_it_is() {
    let folder = folder();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/topology.md");
    let text = fs::read_to_string(path).unwrap();
    let shown: String = text
        .lines()
        .skip_while(|line| !line.starts_with("    viommu: Cannot"))
        .map_while(|line| line.strip_prefix("    "))
        .flat_map(|line| [line, "\n"])
        .collect();
    fs::write(folder.path().join("nvme.toml"), "[[nvme]]\nadress = \"04.0\"\nimage = \"a\"\n").unwrap();
    assert_eq!(fails(folder.path(), &["viot", "--topology", "nvme.toml"]), shown);
}

#[test]
fn a_qemu_that_is_too_old_or_none() {
    let folder = folder();
    let qemu = folder.path().join("qemu");
    fs::write(&qemu, "#!/bin/sh\necho QEMU emulator version 9.2.4\n").unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
    for command in ["run", "check"] {
        let arguments = [&[command, "--qemu", "./qemu"][..], &ENGINE].concat();
        says(folder.path(), &arguments, &["./qemu is QEMU 9.2, but 10.2 or later is needed", "--qemu"]);
        let arguments = [&[command, "--qemu", "./none"][..], &ENGINE].concat();
        says(folder.path(), &arguments, &["Cannot run ./none", "10.2 or later", "--qemu"]);
    }
}

/// A program in `folder` that claims to be QEMU, and then does this.
fn pretended_qemu(folder: &Path, script: &str) {
    let qemu = folder.join("qemu");
    let version = "[ \"$1\" != --version ] || { echo QEMU emulator version 11.0.0; exit; }";
    fs::write(&qemu, format!("#!/bin/sh\n{version}\n{script}\n")).unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_run_that_cannot_begin_leaves_nothing_behind() {
    let folder = folder();
    pretended_qemu(folder.path(), "exit 1");
    let run = ["run", "--qemu", "./qemu", "--dir", "dir", "--trace-file", "none/trace.jsonl"];
    says(folder.path(), &[&run[..], &ENGINE].concat(), &["Cannot write the trace to none/trace.jsonl", "No such file"]);
    assert_eq!(names(&folder.path().join("dir")), [""; 0]);
    // The second endpoint's socket cannot be made; the first one's could.
    fs::write(folder.path().join("t.toml"), "[[dma-engine]]\naddress = \"04.0\"\n[[dma-engine]]\naddress = \"05.0\"\n")
        .unwrap();
    fs::create_dir_all(folder.path().join("sockets/dma1.sock")).unwrap();
    let serve = ["serve", "--topology", "t.toml", "--socket-path", "sockets/viommu.sock"];
    says(
        folder.path(),
        &[&serve[..], &["--trace-socket", "sockets/trace.sock"]].concat(),
        &["dma1", "is not a socket"],
    );
    assert_eq!(names(&folder.path().join("sockets")), ["dma1.sock"]);
}

#[test]
fn a_summary_is_of_this_run_and_is_printed_in_any_case() {
    let folder = folder();
    pretended_qemu(folder.path(), "exit 3");
    fs::create_dir(folder.path().join("dir")).unwrap();
    let before =
        "{\"event\":\"result\",\"workload\":\"of before\",\"verified\":true}\n{\"event\":\"end\",\"ok\":true}\n";
    fs::write(folder.path().join("dir/results.jsonl"), before).unwrap();
    let run = ["run", "--qemu", "./qemu", "--dir", "dir", "--summary"];
    let said = fails(folder.path(), &[&run[..], &["summary.json"], &ENGINE].concat());
    assert!(said.contains("not checked by the guest") && said.contains("QEMU failed (exit status: 3)"), "{said}");
    assert!(!said.contains("of before"), "{said}");
    let summary: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("summary.json")).unwrap()).unwrap();
    assert!(summary["verified"].is_null(), "{summary}");
    // The names that scripts rely on.
    for name in [
        "requests",
        "kicks",
        "mappings_live",
        "mappings_peak",
        "dma_read_bytes",
        "dma_write_bytes",
        "faults",
        "io_count",
        "io_bytes",
        "verified",
        "events",
        "events_lost",
        "trace",
        "guest_log",
    ] {
        assert!(summary.get(name).is_some(), "{name} is not in {summary}");
    }
    for name in
        ["attach", "detach", "map", "unmap", "probe", "reserve", "link", "unlink", "release", "unknown", "malformed"]
    {
        assert_eq!(summary["requests"][name], 0, "{name}");
    }
    // If the summary cannot be written, there is no run at all.
    let said = fails(folder.path(), &[&run[..], &["none/summary.json"], &ENGINE].concat());
    assert!(!said.contains("requests: ATTACH") && said.contains("Cannot write the summary to none/"), "{said}");
}

/// It ends the probe of KVM if there is a /dev/kvm, else the run.
#[test]
fn a_signal_ends_a_run_that_has_not_begun_and_nothing_is_remembered() {
    let folder = folder();
    pretended_qemu(folder.path(), "echo $$ >> pids; exec sleep 60");
    fs::write(folder.path().join("kernel"), "").unwrap();
    let mut child = viommu()
        .args(["run", "--qemu", "./qemu", "--dir", "dir", "--kernel", "kernel"])
        .args(ENGINE)
        .current_dir(&folder)
        .env("XDG_CACHE_HOME", folder.path().join("cache"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = loop {
        let pids = fs::read_to_string(folder.path().join("pids")).unwrap_or_default();
        if let Some(pid) = pids.strip_suffix('\n') {
            break pid.to_owned();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let asked = Instant::now();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    child.wait().unwrap();
    // If the probe were not ended, it would give up, and the run would begin.
    assert_eq!(fs::read_to_string(folder.path().join("pids")).unwrap(), format!("{pid}\n"));
    let ended = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    while !ended(&pid) {
        assert!(asked.elapsed() < Duration::from_secs(50), "QEMU goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!folder.path().join("cache").exists(), "{:?}", names(&folder.path().join("cache")));
}

#[test]
fn what_the_other_commands_print() {
    let folder = folder();
    let prints = |arguments: &[&str]| {
        let output = viommu().args(arguments).current_dir(&folder).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let table = prints(&[&["viot"][..], &ENGINE].concat());
    assert_eq!((&table[..4], table.len()), (&b"VIOT"[..], 48 + 16 + 24));
    let arguments = String::from_utf8(prints(&[&["args", "--socket-path", "v.sock"][..], &ENGINE].concat())).unwrap();
    for part in ["-acpitable file=viot.bin", "socket,id=viommu,path=v.sock", "virtio-id=23", "dma0.sock"] {
        assert!(arguments.contains(part), "{part} is not in {arguments}");
    }
    let script = String::from_utf8(prints(&["completions", "bash"])).unwrap();
    assert!(script.contains("--create-images") && script.contains("complete -F _viommu"), "{script}");
    prints(&["man", "man"]);
    for page in ["viommu.1", "viommu-serve.1", "viommu-run.1", "viommu-trace.1"] {
        assert!(fs::read_to_string(folder.path().join("man").join(page)).unwrap().contains(".SH OPTIONS"), "{page}");
    }
}

/// The reader stops when it has read enough, as `head` does.
#[test]
fn an_output_that_nobody_reads_is_no_error() {
    let folder = folder();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = viommu()
        .args(["args", "--socket-path", "v.sock"])
        .args(ENGINE)
        .current_dir(&folder)
        .stdout(writer)
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Sends a REGION_READ past the end of the configuration space, which is refused and logged.
fn refused_read(client: &mut UnixStream) {
    let body = [&4096u64.to_le_bytes()[..], &7u32.to_le_bytes(), &4u32.to_le_bytes()].concat();
    client.write_all(&[&[1, 0, 9, 0, 32, 0, 0, 0][..], &[0; 8], &body].concat()).unwrap();
    client.read_exact(&mut [0; 16]).unwrap();
}

#[test]
fn a_client_that_repeats_itself_is_logged_a_few_times_and_counted() {
    const COUNT: u64 = 1000;
    let folder = folder();
    let daemon = serve(folder.path());
    let mut client = UnixStream::connect(folder.path().join("dma0.sock")).unwrap();
    let begun = Instant::now();
    (0..COUNT).for_each(|_| refused_read(&mut client));
    drop(client);
    let said = end(daemon);
    let tens_of_seconds = begun.elapsed().as_secs() as usize / 10 + 1;
    let (counts, messages): (Vec<&str>, Vec<&str>) =
        said.lines().filter(|line| line.contains("Refused a vfio-user message")).partition(|l| l.contains("left out"));
    let counted = |line: &str| line.split(' ').find_map(|word| word.parse::<u64>().ok()).unwrap();
    let left_out: u64 = counts.into_iter().map(counted).sum();
    assert_eq!(messages.len() as u64 + left_out, COUNT, "{said}");
    // Five in ten seconds.
    assert!(messages.len() <= 5 * (tens_of_seconds + 1), "{said}");
}

#[test]
fn messages_that_the_log_leaves_out_are_counted_even_if_no_more_come() {
    let folder = folder();
    let mut daemon = serve(folder.path());
    let mut log = BufReader::new(daemon.stderr.take().unwrap());
    let mut client = UnixStream::connect(folder.path().join("dma0.sock")).unwrap();
    (0..12).for_each(|_| refused_read(&mut client));
    let begun = Instant::now();
    let mut said = String::new();
    while !said.contains("left out") && begun.elapsed() < Duration::from_secs(60) {
        assert_ne!(log.read_line(&mut said).unwrap(), 0, "{said}");
    }
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    daemon.wait().unwrap();
    assert_eq!(said.lines().count(), 6, "{said}");
    assert!(
        said.ends_with(
            "7 more messages were left out like: Refused a vfio-user message: access past the end of a region\n"
        ),
        "{said}"
    );
}

/// A VERSION with a wrong type whose name has a megabyte, which the error repeats.
#[test]
fn a_long_text_of_a_client_is_cut_in_the_log() {
    const LENGTH: usize = 1 << 20;
    let folder = folder();
    let daemon = serve(folder.path());
    let mut client = UnixStream::connect(folder.path().join("dma0.sock")).unwrap();
    let json = format!("{{\"capabilities\":{{\"max_msg_fds\":\"{}\"}}}}\0", "a".repeat(LENGTH));
    let size = 16 + 4 + json.len() as u32;
    let message = [&[1, 0, 1, 0][..], &size.to_le_bytes(), &[0; 8], &[0, 0, 1, 0], json.as_bytes()].concat();
    client.write_all(&message).unwrap();
    // An answer, or the end of the connection.
    let _ = client.read(&mut [0; 16]).unwrap();
    drop(client);
    let said = end(daemon);
    assert!(said.contains("aaaaaaaa") && said.len() < 3000, "{} bytes", said.len());
    let cut = said.split_once("... (").unwrap().1.split_once(" bytes more)").unwrap().0.parse::<usize>().unwrap();
    assert!((LENGTH - 1024..LENGTH + 1024).contains(&cut), "{said}");
}

/// A writable DMA_MAP of a page of a file that is open for reading only.
#[test]
fn a_refusal_is_logged_with_its_causes() {
    let folder = folder();
    let daemon = serve(folder.path());
    fs::write(folder.path().join("page"), [0; 4096]).unwrap();
    let file = fs::File::open(folder.path().join("page")).unwrap();
    let mut client = UnixStream::connect(folder.path().join("dma0.sock")).unwrap();
    let body = [32u32.to_le_bytes(), 3u32.to_le_bytes()].concat();
    let range = [0, 0x10000, 4096].map(u64::to_le_bytes).concat();
    let message = [&[2, 0, 2, 0, 48, 0, 0, 0][..], &[0; 8], &body, &range].concat();
    client.send_with_fds(&[&message[..]], &[file.as_raw_fd()]).unwrap();
    client.read_exact(&mut [0; 16]).unwrap();
    drop(client);
    let said = end(daemon);
    assert!(said.contains("The file cannot be mapped: Permission denied"), "{said}");
}

/// A request that takes long stands for an access to memory that never ends: both block the thread of the virtqueues.
#[test]
fn sigterm_ends_it_though_the_virtqueues_are_stuck() {
    use viommu_testkit::frontend::{Driver, EP2, Part, REQUESTS, attach};
    let folder = folder();
    let arguments = ["--inject", "attach=late:ms=3600000", "--trace-socket", "trace.sock"];
    let (mut child, _) = serve_with(folder.path(), &arguments);
    let mut trace = UnixStream::connect(folder.path().join("trace.sock")).unwrap();
    trace.write_all(b"{\"format\":\"json\"}\n").unwrap();
    trace.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // It gets all events from its hello on.
    let mut lines = BufReader::new(trace).lines();
    assert!(lines.next().unwrap().unwrap().contains("\"hello\""));
    let mut driver = Driver::connect(&folder.path().join("viommu.sock"));
    driver.negotiate(u64::MAX);
    driver.set_memory();
    driver.start_queue(REQUESTS, 0);
    driver.add(REQUESTS, &[Part::R(zerocopy::IntoBytes::as_bytes(&attach(1, EP2, 0)).to_vec()), Part::W(4)]);
    driver.kick(REQUESTS);
    let stuck = lines.any(|line| line.unwrap().contains("\"kind\":\"injected\""));
    assert!(stuck, "the request was not met");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    wait_until(PATIENCE, "the end", || child.try_wait().unwrap().is_some());
    assert!(!folder.path().join("viommu.sock").exists());
}

#[test]
fn memory_that_is_not_shared_is_reported_once() {
    let folder = folder();
    let (child, _) = serve_with(folder.path(), &[]);
    let mut client = UnixStream::connect(folder.path().join("dma0.sock")).unwrap();
    let mut call = |command: u16, body: &[u8]| {
        let size = 16 + body.len() as u32;
        let header = [&[1, 0][..], &command.to_le_bytes(), &size.to_le_bytes(), &[0; 8]].concat();
        client.write_all(&[&header[..], body].concat()).unwrap();
        let mut header = [0; 16];
        client.read_exact(&mut header).unwrap();
        let size = u32::from_le_bytes(header[4..8].try_into().unwrap());
        client.read_exact(&mut vec![0; size as usize - 16]).unwrap();
    };
    // DMA_MAP without a descriptor: QEMU sends that for `memory-backend-ram` without share=on.
    let words = [0_u64, 0, 1 << 30].map(u64::to_le_bytes).concat();
    call(2, &[&32_u32.to_le_bytes()[..], &3_u32.to_le_bytes(), &words].concat());
    // REGION_WRITE of the command register: memory space and bus mastering, twice.
    for _ in 0..2 {
        let place = [&4_u64.to_le_bytes()[..], &7_u32.to_le_bytes(), &2_u32.to_le_bytes()].concat();
        call(10, &[&place[..], &[6, 0]].concat());
    }
    let said = end(child);
    assert_eq!(said.matches("share=on is missing").count(), 1, "{said}");
}
