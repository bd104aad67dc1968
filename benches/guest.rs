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
use std::path::Path;
use std::thread::JoinHandle;

use serde_json::json;

mod common;

use common::{Cores, Daemon, Guest, Measured, median};

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
const SECONDS: f64 = 1.0;

/// Boots of each variant.
const ROUNDS: usize = 15;

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

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn main() {
    // `cargo bench` passes --bench; `cargo test --benches` runs the file too, and is to do nothing.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let rounds = std::env::var("VIOMMU_BENCH_ROUNDS").map_or(ROUNDS, |text| text.parse().expect("a number of rounds"));
    let files = common::guest_files("stock");
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("topology.toml"), TOPOLOGY).unwrap();
    // Not sparse: a hole reads faster than data.
    fs::write(folder.path().join("disk.img"), vec![0x5a; 256 << 20]).unwrap();

    let cores = Cores::divide();
    let measured = common::rounds(&Variant::ALL, rounds, |variant| boot(variant, &cores, folder.path(), &files));
    report(&measured, rounds);
}

/// Boots one guest and returns the I/Os per second of each case.
fn boot(variant: Variant, cores: &Cores, folder: &Path, files: &Path) -> Vec<f64> {
    let socket = folder.join("trace.sock");
    let daemon = (variant != Variant::Qemu)
        .then(|| Daemon::start(folder, (variant != Variant::Untraced).then_some(socket.as_path())));
    let client = (variant == Variant::Watched).then(|| watch(&socket));
    let workload: Vec<_> = CASES
        .iter()
        .map(|(_, op, size, depth)| format!("nvme-io --op {op} --bs {size} --depth {depth} --seconds {SECONDS}"))
        .collect();
    let devices = match variant {
        Variant::Qemu => {
            "-machine q35,memory-backend=m -m 512M -object memory-backend-memfd,id=m,size=512M,share=on -smp 1 \
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
    common::iops(&results, CASES.len(), variant)
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

fn report(measured: &Measured<Variant>, rounds: usize) {
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
