//! The same guest workload on our NVMe controller behind our IOMMU, and on QEMU's own behind QEMU's own, alternating in
//! one run: `make bench-guest`. Prints the ratios and writes target/bench/guest.json; it fails if a goal is missed.
//!
//! Each variant boots the same kernel with the same initial RAM file system on the same QEMU. Ours runs three times:
//! without a trace, with a trace that nobody reads, and with one binary client.
//!
//! Boots of one variant differ, and so does the machine from minute to minute. So there are many short boots, a ratio is
//! that of two boots of one round, and what is given is the median of all rounds with the range that encloses the true
//! median with a confidence of 95 %. What tracing costs is much less than boots differ: it is looked at over all cases
//! together.
//!
//! A buffer of 128 KiB is one run of physical memory or 32, which makes 1 MAP or 32 for each I/O. Both are measured: the
//! guest has enough memory for Linux to use huge pages, so that a boot does not decide it.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::thread::JoinHandle;

use serde_json::{Value, json};

mod common;

use common::{Cores, Daemon, Guest, MISSED, Measured, Median, median, verdict};

/// Name, workload.
const CASES: [(&str, &str); 8] = [
    ("4 KiB read, depth 1", "--op randread --bs 4k --depth 1"),
    ("4 KiB read, depth 32", "--op randread --bs 4k --depth 32"),
    ("128 KiB read, depth 8", "--op randread --bs 128k --depth 8"),
    ("- of 32 scattered pages", "--op randread --bs 128k --depth 8 --scatter"),
    ("4 KiB write, depth 1", "--op randwrite --bs 4k --depth 1"),
    ("4 KiB write, depth 32", "--op randwrite --bs 4k --depth 32"),
    ("128 KiB write, depth 8", "--op randwrite --bs 128k --depth 8"),
    ("- of 32 scattered pages", "--op randwrite --bs 128k --depth 8 --scatter"),
];

/// Seconds of each case in each boot.
const SECONDS: f64 = 0.4;

/// Boots of each variant.
const ROUNDS: usize = 20;

/// What part of QEMU's throughput ours has to be at least, in each case.
const OURS_TO_QEMU: f64 = 1.0;
/// What part of the throughput has to be left with a trace that nobody reads.
const TRACED: f64 = 0.97;
/// What part of it has to be left with one client.
const WATCHED: f64 = 0.9;

const TOPOLOGY: &str = "[machine]\nmemory = \"768M\"\nvcpus = 1\n[[nvme]]\naddress = \"04.0\"\nimage = \"disk.img\"\n";

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

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn main() -> ExitCode {
    // `cargo bench` passes --bench; `cargo test --benches` runs the file too, and is to do nothing.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let rounds = std::env::var("VIOMMU_BENCH_ROUNDS").map_or(ROUNDS, |text| text.parse().expect("a number of rounds"));
    let files = common::guest_files("stock");
    // In memory if that can be, so that the disk and what else is written to it play no part.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    fs::write(folder.path().join("topology.toml"), TOPOLOGY).unwrap();
    // Not sparse: a hole reads faster than data.
    fs::write(folder.path().join("disk.img"), vec![0x5a; 256 << 20]).unwrap();

    let cores = Cores::divide();
    let measured = common::rounds(&Variant::ALL, rounds, |variant| boot(variant, &cores, folder.path(), &files));
    report(&measured, rounds)
}

/// Boots one guest and returns the I/Os per second of each case.
fn boot(variant: Variant, cores: &Cores, folder: &Path, files: &Path) -> Vec<f64> {
    let socket = folder.join("trace.sock");
    let daemon = (variant != Variant::Qemu)
        .then(|| Daemon::start(folder, (variant != Variant::Untraced).then_some(socket.as_path())));
    let client = (variant == Variant::Watched).then(|| watch(&socket));
    let workload: Vec<_> = CASES.iter().map(|(_, options)| format!("nvme-io {options} --seconds {SECONDS}")).collect();
    let devices = match variant {
        Variant::Qemu => {
            "-machine q35,memory-backend=m -m 768M -object memory-backend-memfd,id=m,size=768M,share=on -smp 1 \
             -device virtio-iommu-pci,addr=03.0 -drive if=none,id=d,file=disk.img,format=raw \
             -device nvme,drive=d,serial=bench,addr=04.0"
                .to_string()
        }
        _ => common::devices(folder),
    };
    let accel = "tcg,thread=multi";
    let guest = Guest { cores, folder, files, accel, devices: &devices, append: "", workload: &workload.join(" + ") };
    let results = guest.run();
    drop(daemon);
    if let Some(client) = client {
        assert!(client.join().unwrap() > 1 << 20, "the client of the trace got next to nothing");
    }
    check_buffers(&results);
    common::iops(&results, CASES.len(), variant)
}

/// Makes sure that buffers lay in memory as their case wants it.
fn check_buffers(results: &[Value]) {
    for result in results.iter().filter(|result| result["iops"].is_number()) {
        let (runs, scatter) = (result["physical_runs_per_io"].as_f64().unwrap(), result["scatter"] == true);
        assert!(if scatter { runs > 31.0 } else { runs == 1.0 }, "buffers of {runs} runs: {result}");
    }
}

/// Reads the trace to its end, and returns its length.
fn watch(socket: &Path) -> JoinHandle<u64> {
    common::wait_for(socket);
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"{\"format\":\"binary\"}\n").unwrap();
    std::thread::spawn(move || {
        let (mut bytes, mut buffer) = (0, vec![0; 1 << 16]);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            bytes += count as u64;
        }
        bytes
    })
}

/// The ratios of two variants in a case, round by round.
fn ratios(measured: &Measured<Variant>, case: usize, of: Variant, to: Variant) -> Vec<f64> {
    measured[&(of, case)].iter().zip(&measured[&(to, case)]).map(|(of, to)| of / to).collect()
}

/// The same of all cases together: their geometric mean.
fn mean_ratios(measured: &Measured<Variant>, rounds: usize, of: Variant, to: Variant) -> Vec<f64> {
    let all: Vec<_> = (0..CASES.len()).map(|case| ratios(measured, case, of, to)).collect();
    let mean = |round: usize| all.iter().map(|case| case[round].ln()).sum::<f64>() / CASES.len() as f64;
    (0..rounds).map(|round| mean(round).exp()).collect()
}

fn show(ratio: Median) -> String {
    format!("{:.3} ({:.3} to {:.3})", ratio.median, ratio.low, ratio.high)
}

fn report(measured: &Measured<Variant>, rounds: usize) -> ExitCode {
    let mut text = format!(
        "I/Os per second, median of {rounds} boots of {SECONDS} s a case; ratios of boots of one round, with the spread of \
         their median\n\n"
    );
    let head = ["case", "QEMU's", "ours", "ours/QEMU's", "traced/untraced", "watched/untraced"];
    let mut line = |[case, qemu, ours, to_qemu, traced, watched]: [&str; 6]| {
        let _ = writeln!(text, "{case:<24} {qemu:>7} {ours:>7}  {to_qemu:<22} {traced:<22} {watched}");
    };
    line(head);
    let mut goals = Vec::new();
    let mut cases = Vec::new();
    for (index, (name, options)) in CASES.iter().enumerate() {
        let ratio = |of, to| Median::of(ratios(measured, index, of, to));
        let to_qemu = ratio(Variant::Traced, Variant::Qemu);
        let traced = ratio(Variant::Traced, Variant::Untraced);
        let watched = ratio(Variant::Watched, Variant::Untraced);
        let iops = |variant| format!("{:.0}", median(&measured[&(variant, index)]));
        let (qemu, ours) = (iops(Variant::Qemu), iops(Variant::Traced));
        line([name, &qemu, &ours, &show(to_qemu), &show(traced), &show(watched)]);
        goals.push((format!("ours/QEMU's, {options}"), to_qemu, OURS_TO_QEMU));
        let all: BTreeMap<_, _> =
            Variant::ALL.iter().map(|variant| (variant.name(), &measured[&(*variant, index)])).collect();
        cases.push(json!({
            "case": name, "options": options, "iops": all, "ours_to_qemu": to_qemu.median,
            "traced_to_untraced": traced.median, "watched_to_untraced": watched.median,
        }));
    }
    for (of, least) in [(Variant::Traced, TRACED), (Variant::Watched, WATCHED)] {
        let ratio = Median::of(mean_ratios(measured, rounds, of, Variant::Untraced));
        goals.push((format!("{of}/untraced, all cases"), ratio, least));
    }
    println!("{text}");
    let mut missed = false;
    for (what, ratio, least) in &goals {
        let verdict = verdict(*ratio, *least);
        println!("{what}: {}, wanted at least {least}: {verdict}", show(*ratio));
        missed |= verdict == MISSED;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("guest.json"), format!("{:#}\n", json!({ "cases": cases }))).unwrap();
    if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
