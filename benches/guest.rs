//! The same guest workload on our NVMe controller behind our IOMMU, and on QEMU's own behind QEMU's own, alternating in
//! one run: `make bench-guest`. Prints the ratios and writes target/bench/guest.json.
//!
//! Each variant boots the same kernel with the same initial RAM file system on the same QEMU. Ours runs three times:
//! without a trace, with a trace that nobody reads, and with one binary client.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Name, operation, bytes, depth.
const CASES: [(&str, &str, &str, u32); 6] = [
    ("4 KiB read, depth 1", "randread", "4k", 1),
    ("4 KiB read, depth 32", "randread", "4k", 32),
    ("128 KiB read, depth 8", "randread", "128k", 8),
    ("4 KiB write, depth 1", "randwrite", "4k", 1),
    ("4 KiB write, depth 32", "randwrite", "4k", 32),
    ("128 KiB write, depth 8", "randwrite", "128k", 8),
];

/// Seconds of each case in each boot.
const SECONDS: f64 = 3.0;

/// Boots of each variant.
const ROUNDS: usize = 5;

/// How long one guest may take.
const LIMIT: Duration = Duration::from_secs(180);

const TOPOLOGY: &str = "[machine]\nmemory = \"512M\"\nvcpus = 1\n[[nvme]]\naddress = \"04.0\"\nimage = \"disk.img\"\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Variant {
    /// QEMU's `nvme` behind QEMU's `virtio-iommu-pci`.
    Qemu,
    /// Ours, not tracing.
    Untraced,
    /// Ours, with a trace socket without a client.
    Traced,
    /// Ours, with one client that reads binary records.
    Watched,
}

impl Variant {
    const ALL: [Variant; 4] = [Variant::Qemu, Variant::Untraced, Variant::Traced, Variant::Watched];

    fn name(self) -> &'static str {
        match self {
            Variant::Qemu => "qemu",
            Variant::Untraced => "untraced",
            Variant::Traced => "traced",
            Variant::Watched => "watched",
        }
    }
}

fn main() {
    // `cargo bench` passes --bench; `cargo test --benches` runs the file too, and is to do nothing.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let rounds = std::env::var("VIOMMU_BENCH_ROUNDS").map_or(ROUNDS, |text| text.parse().expect("a number of rounds"));
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/stock");
    assert!(files.join("initramfs").exists(), "no guest in {files:?}; run scripts/prepare-guest stock");
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("topology.toml"), TOPOLOGY).unwrap();
    // Not sparse: a hole reads faster than data.
    fs::write(folder.path().join("disk.img"), vec![0x5a; 256 << 20]).unwrap();

    let mut measured: BTreeMap<(Variant, usize), Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        // Another order each time, so that no variant always follows the same other one.
        for turn in 0..Variant::ALL.len() {
            let variant = Variant::ALL[(turn + round) % Variant::ALL.len()];
            eprintln!("round {} of {rounds}: {}", round + 1, variant.name());
            for (case, iops) in boot(variant, folder.path(), &files).into_iter().enumerate() {
                measured.entry((variant, case)).or_default().push(iops);
            }
        }
    }
    report(&measured, rounds);
}

/// Boots one guest and returns the I/Os per second of each case.
fn boot(variant: Variant, folder: &Path, files: &Path) -> Vec<f64> {
    let results = folder.join("results.jsonl");
    let _ = fs::remove_file(&results);
    let daemon = (variant != Variant::Qemu).then(|| Daemon::start(variant, folder));
    // Commas: one word for the kernel, which takes 32 at most.
    let workload: Vec<_> = CASES
        .iter()
        .map(|(_, op, size, depth)| format!("nvme-io,--op,{op},--bs,{size},--depth,{depth},--seconds,{SECONDS}"))
        .collect();
    let devices = match variant {
        Variant::Qemu => {
            "-machine q35,memory-backend=m -m 512M -object memory-backend-memfd,id=m,size=512M,share=on -smp 1 \
             -device virtio-iommu-pci,addr=03.0 -drive if=none,id=d,file=disk.img,format=raw \
             -device nvme,drive=d,serial=bench,addr=04.0"
                .to_string()
        }
        _ => args(folder),
    };
    let line = format!(
        "exec {}/qemu -accel tcg,thread=multi -cpu max -no-user-config -nodefaults -display none -no-reboot {devices} \
         -serial file:console.log -serial file:results.jsonl -kernel {}/vmlinuz -initrd {}/initramfs \
         -append 'console=ttyS0 panic=-1 -- {}'",
        files.display(),
        files.display(),
        files.display(),
        workload.join(",+,")
    );
    let mut qemu = Command::new("sh").arg("-c").arg(line).current_dir(folder).stdin(Stdio::null()).spawn().unwrap();
    let ended = wait(&mut qemu);
    drop(daemon);
    let console = fs::read(folder.join("console.log")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    assert!(ended, "{}: the guest did not end; its console:\n{console}", variant.name());
    let text = fs::read_to_string(&results).unwrap();
    let values = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let iops: Vec<f64> = values.filter_map(|value| value["iops"].as_f64()).collect();
    assert_eq!(iops.len(), CASES.len(), "{}: not every case has a result; the console:\n{console}", variant.name());
    iops
}

fn wait(child: &mut Child) -> bool {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    false
}

fn args(folder: &Path) -> String {
    let output = viommu(folder, &["args", "--machine"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

fn viommu(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommu"));
    command.current_dir(folder).args(args).args(["--topology", "topology.toml", "--socket-path", "viommu.sock"]);
    command
}

/// `viommu serve`, and perhaps a client of its trace.
struct Daemon {
    child: Child,
    client: Option<std::thread::JoinHandle<u64>>,
}

impl Daemon {
    fn start(variant: Variant, folder: &Path) -> Daemon {
        let mut command = viommu(folder, &["serve"]);
        let socket = folder.join("trace.sock");
        if variant != Variant::Untraced {
            command.arg("--trace-socket").arg(&socket);
        }
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        wait_for(&folder.join("nvme0.sock"));
        let client = (variant == Variant::Watched).then(|| {
            wait_for(&socket);
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.write_all(b"{\"format\":\"binary\"}\n").unwrap();
            std::thread::spawn(move || {
                let (mut bytes, mut buffer) = (0, vec![0; 1 << 16]);
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    bytes += count as u64;
                }
                bytes
            })
        });
        Daemon { child, client }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // SIGTERM, so that the sockets are removed.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
        if let Some(client) = self.client.take() {
            assert!(client.join().unwrap() > 1 << 20, "the client of the trace got next to nothing");
        }
    }
}

fn wait_for(path: &PathBuf) {
    for _ in 0..500 {
        if path.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{path:?} did not appear");
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn report(measured: &BTreeMap<(Variant, usize), Vec<f64>>, rounds: usize) {
    let mut text = format!("I/Os per second, median of {rounds} boots of {SECONDS} s a case; ratios of medians\n\n");
    let head = ["case", "QEMU's", "ours", "ours/QEMU's", "traced/untraced", "watched/untraced"];
    let _ =
        writeln!(text, "{:<24} {:>9} {:>9} {:>12} {:>16} {:>17}", head[0], head[1], head[2], head[3], head[4], head[5]);
    let mut cases = Vec::new();
    for (index, (name, ..)) in CASES.iter().enumerate() {
        let of = |variant| median(&measured[&(variant, index)]);
        let (qemu, traced, untraced) = (of(Variant::Qemu), of(Variant::Traced), of(Variant::Untraced));
        let watched = of(Variant::Watched);
        let _ = writeln!(
            text,
            "{name:<24} {qemu:>9.0} {traced:>9.0} {:>12.2} {:>16.3} {:>17.3}",
            traced / qemu,
            traced / untraced,
            watched / untraced
        );
        let all: BTreeMap<_, _> =
            Variant::ALL.iter().map(|variant| (variant.name(), &measured[&(*variant, index)])).collect();
        cases.push(json!({
            "case": name, "iops": all, "ours_to_qemu": traced / qemu,
            "traced_to_untraced": traced / untraced, "watched_to_untraced": watched / untraced,
        }));
    }
    println!("{text}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("guest.json"), format!("{:#}\n", json!({ "cases": cases }))).unwrap();
}
