//! The same guest workload on our NVMe controller behind our IOMMU, and on QEMU's own behind QEMU's own, alternating in
//! one run: `make bench-guest`. Prints the ratios and writes target/bench/guest.json; it fails if a goal is missed.
//!
//! Both boot the same kernel with the same initial RAM file system on the same QEMU; ours has a trace socket. They run
//! in interleaved time slices ([`common::interleaved`]), in rounds of boots. The result is the median of all rounds,
//! with the range that contains the true median with a confidence of 95 %. The cost of tracing is less than the
//! difference between boots, so it is measured within a boot ([`trace_overhead`]).
//!
//! A buffer of 128 KiB is one run of physical memory or 32, which takes 1 MAP or 32 for each I/O. Both are measured:
//! the guest has enough memory for Linux to use huge pages, so that it is not left to chance.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};
use viommu_testkit::guest::{Folder, Guest, Serve};

#[path = "../common/mod.rs"]
mod common;
mod trace_overhead;

use common::interleaved::{self, Contender, Io, Measured};
use common::{Cores, MISSED, Median, median, verdict};
use trace_overhead::Reader;

/// Name, workload, and the I/O that it does.
const CASES: [(&str, &str, Io); 8] = [
    ("4 KiB read, depth 1", "--op randread --bs 4k --depth 1", Io { write: false, bytes: 4 << 10 }),
    ("4 KiB read, depth 32", "--op randread --bs 4k --depth 32", Io { write: false, bytes: 4 << 10 }),
    ("128 KiB read, depth 8", "--op randread --bs 128k --depth 8", Io { write: false, bytes: 128 << 10 }),
    ("- of 32 scattered pages", "--op randread --bs 128k --depth 8 --scatter", Io { write: false, bytes: 128 << 10 }),
    ("4 KiB write, depth 1", "--op randwrite --bs 4k --depth 1", Io { write: true, bytes: 4 << 10 }),
    ("4 KiB write, depth 32", "--op randwrite --bs 4k --depth 32", Io { write: true, bytes: 4 << 10 }),
    ("128 KiB write, depth 8", "--op randwrite --bs 128k --depth 8", Io { write: true, bytes: 128 << 10 }),
    ("- of 32 scattered pages", "--op randwrite --bs 128k --depth 8 --scatter", Io { write: true, bytes: 128 << 10 }),
];

/// Rounds, at least 6. With 9, the true median lies between the second lowest and the second highest value with a
/// confidence of 96 %.
const ROUNDS: usize = 9;
/// Boots in which tracing is switched on and off, without a client and with one; at least 6 too.
const OVERHEAD_BOOTS: usize = 6;

/// The least part of QEMU's throughput that ours must reach in each case.
const OURS_TO_QEMU: f64 = 1.0;
/// The least part of the throughput that must be left with a trace that nobody reads.
const TRACED: f64 = 0.97;
/// The least part that must be left with one client.
const WATCHED: f64 = 0.9;

const TOPOLOGY: &str = "[machine]\nmemory = \"768M\"\nvcpus = 1\n[[nvme]]\naddress = \"04.0\"\nimage = \"disk.img\"\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Variant {
    /// QEMU's `nvme` behind QEMU's `virtio-iommu-pci`.
    Qemu,
    /// Ours, with a trace socket without a client.
    Ours,
}

impl Variant {
    const ALL: [Variant; 2] = [Variant::Qemu, Variant::Ours];
}

fn main() -> ExitCode {
    // `cargo bench` passes --bench. `cargo test --benches` runs the file too, and must do nothing.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let rounds = std::env::var("VIOMMU_BENCH_ROUNDS").map_or(ROUNDS, |text| text.parse().expect("a number of rounds"));
    let cores = Cores::divide();
    let mut traced = vec![Vec::new(); CASES.len()];
    let mut watched = traced.clone();
    for round in 0..OVERHEAD_BOOTS {
        for (reader, all) in [(Reader::None, &mut traced), (Reader::Binary, &mut watched)] {
            eprintln!("tracing in time slices, round {} of {OVERHEAD_BOOTS}: reader {reader:?}", round + 1);
            all.iter_mut().zip(trace_overhead::boot(reader, &cores)).for_each(|(all, ratio)| all.push(ratio));
        }
    }
    let mut measured = vec![BTreeMap::new(); CASES.len()];
    for round in 0..rounds {
        for ((name, options, io), measured) in CASES.iter().zip(&mut measured) {
            eprintln!("round {} of {rounds}: {name}", round + 1);
            interleaved::round(&Variant::ALL, *io, round, measured, |variant, folder| {
                start(variant, &cores, folder, options)
            });
        }
    }
    report(&measured, &traced, &watched, rounds)
}

/// QEMU's own machine and devices.
const QEMUS_OWN: [&str; 14] = [
    "-machine",
    "q35,memory-backend=m",
    "-m",
    "768M",
    "-object",
    "memory-backend-memfd,id=m,size=768M,share=on",
    "-smp",
    "1",
    "-device",
    "virtio-iommu-pci,addr=03.0",
    "-drive",
    "if=none,id=d,file=disk.img,format=raw",
    "-device",
    "nvme,drive=d,serial=bench,addr=04.0",
];

/// Boots a guest that does this I/O and never stops.
fn start(variant: Variant, cores: &Cores, folder: &Folder, options: &str) -> Contender {
    common::write_image(folder);
    let workload = format!("nvme-io {options} --seconds {}", interleaved::ENDLESS_SECONDS);
    let daemon = (variant == Variant::Ours).then(|| Serve::start(folder, TOPOLOGY, &["--trace-socket", "trace.sock"]));
    let guest = match &daemon {
        None => Guest::plain(QEMUS_OWN, &workload).folder(folder),
        Some(daemon) => daemon.guest(&workload),
    };
    Contender { guest: cores.start(guest), daemon, check: Box::new(check_buffers) }
}

/// Checks that buffers were scattered or contiguous in memory, as their case wants.
fn check_buffers(results: &[Value]) {
    for result in results.iter().filter(|result| result["physical_runs_per_io"].is_number()) {
        let (runs, scatter) = (result["physical_runs_per_io"].as_f64().unwrap(), result["scatter"] == true);
        assert!(if scatter { runs > 31.0 } else { runs == 1.0 }, "buffers of {runs} runs: {result}");
    }
}

fn show(ratio: Median) -> String {
    format!("{:.3} ({:.3} to {:.3})", ratio.median, ratio.low, ratio.high)
}

/// Prints and writes everything. `traced` and `watched` are the ratios of traced slices to untraced ones, without a
/// client and with one; each case has those of all boots.
fn report(
    measured: &[BTreeMap<Variant, Measured>],
    traced: &[Vec<f64>],
    watched: &[Vec<f64>],
    rounds: usize,
) -> ExitCode {
    let mut text = format!(
        "I/Os per second and their ratio, median of {rounds} rounds of boots; ratio of time slices with and without \
         tracing, median of {OVERHEAD_BOOTS} boots of {} s a case; each with the spread of the median\n\n",
        trace_overhead::SECONDS
    );
    let head = ["case", "QEMU's", "ours", "ours/QEMU's", "traced/untraced", "watched/untraced"];
    let mut line = |[case, qemu, ours, to_qemu, traced, watched]: [&str; 6]| {
        let _ = writeln!(text, "{case:<24} {qemu:>7} {ours:>7}  {to_qemu:<22} {traced:<22} {watched}");
    };
    line(head);
    let mut goals = Vec::new();
    let mut cases = Vec::new();
    for (index, (name, options, _)) in CASES.iter().enumerate() {
        let [qemu, ours] = Variant::ALL.map(|variant| &measured[index][&variant]);
        let to_qemu = ours.ratio();
        let [traced, watched] = [traced, watched].map(|ratios| Median::of(ratios[index].clone()));
        let iops = |of: &Measured| format!("{:.0}", median(&of.iops));
        line([name, &iops(qemu), &iops(ours), &show(to_qemu), &show(traced), &show(watched)]);
        goals.push((format!("ours/QEMU's, {options}"), to_qemu, OURS_TO_QEMU));
        goals.push((format!("traced/untraced, {options}"), traced, TRACED));
        goals.push((format!("watched/untraced, {options}"), watched, WATCHED));
        cases.push(json!({
            "case": name, "options": options, "iops": { "qemu": qemu.iops, "ours": ours.iops },
            "ours_to_qemu_of_rounds": ours.ratios, "ours_to_qemu": to_qemu.median,
            "traced_to_untraced": traced.median, "watched_to_untraced": watched.median,
        }));
    }
    println!("{text}");
    goals.sort_by(|(one, ..), (other, ..)| one.split(',').next().cmp(&other.split(',').next()));
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
