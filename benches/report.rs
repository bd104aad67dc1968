//! `viommu report` on ten million events: `cargo bench --bench report`. Fails if it takes 10 s or 500 MB.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use viommu_testkit::process::viommu;
use viommu_trace::event::{Access, Route};
use viommu_trace::record::{Header, MAGIC, VERSION};
use viommu_trace::{Event, Record};
use viommu_wire::model::Model;
use viommu_wire::nvme::{self, DataPointer};
use viommu_wire::split::request_type::{LINK, RELEASE, RESERVE};
use zerocopy::IntoBytes;

const EVENTS: u64 = 10_000_000;
/// Operations at a time.
const DEPTH: u64 = 32;
const BYTES: u32 = 128 << 10;
const PAGES: u64 = 32;
const LIMIT_S: f64 = 10.0;
const LIMIT_MB: i64 = 500;

/// One NVMe read of 32 scattered pages after another, as the device traces them.
fn write_trace(file: File) {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        record_size: (size_of::<Record>() as u32).into(),
        clock: 1.into(),
        pid: 1.into(),
        start_ns: 0.into(),
        realtime_offset_ns: 0.into(),
        kinds: u64::MAX.into(),
        lost: 0.into(),
        seq: 0.into(),
    };
    out.write_all(header.as_bytes()).unwrap();
    let mut seq = 0;
    let mut put = |event: Event| {
        out.write_all(event.encode(seq * 500, seq).as_bytes()).unwrap();
        seq += 1;
        seq < EVENTS
    };
    put(Event::Request {
        endpoint: Some(32),
        request: 1,
        status: 0,
        domain: 0,
        virt_start: 0,
        virt_end: 0,
        phys_start: 0,
        flags: 0,
        duration: 1000,
    });
    for operation in 0.. {
        let (id, start) = (operation % 65536, (operation % DEPTH) << 17);
        let tag = 1 << 56 | 1 << 16 | id;
        let split = |request, count| Event::Split {
            request,
            status: 0,
            domain: 0,
            virt_start: start,
            virt_end: start + u64::from(BYTES) - 1,
            tag,
            count,
            flags: if request == LINK { 2 } else { 0 },
            duration: 1500 + operation % 777,
        };
        let dma = |page| Event::Dma {
            endpoint: 32,
            access: Access::Write,
            route: Route::Mapped,
            failed: false,
            iova: start + page * 4096,
            gpa: (operation * 37 + page) << 12,
            len: 4096,
            domain: 0,
            tag,
        };
        let part = nvme::Command { slba: operation * 256, pointer: DataPointer::Sgl, data: start }.into();
        let command = Event::Command {
            endpoint: 32,
            model: Model::Nvme,
            queue: 1,
            opcode: 2,
            id,
            status: 0,
            len: BYTES,
            duration: 20_000,
            part,
        };
        let mut events = [split(RESERVE, 0), split(LINK, 32)].into_iter().chain((0..PAGES).map(dma)).chain([
            command,
            Event::Interrupt { endpoint: Some(32), vector: 1 },
            split(RELEASE, 32),
        ]);
        if !events.all(&mut put) {
            break;
        }
    }
    out.flush().unwrap();
}

fn main() -> ExitCode {
    // `cargo bench` passes --bench. `cargo test --benches` runs the file too, and must do nothing.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.bin");
    write_trace(File::create(&path).unwrap());
    let begin = Instant::now();
    let status = viommu().arg("report").arg(&path).stdout(Stdio::null()).status().unwrap();
    let seconds = begin.elapsed().as_secs_f64();
    // Of the largest child, in KiB: there was one.
    let mb = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss() / 1024;
    println!(
        "report of {EVENTS} events: {seconds:.2} s (wanted at most {LIMIT_S}), {mb} MiB (wanted at most {LIMIT_MB})"
    );
    if status.success() && seconds < LIMIT_S && mb < LIMIT_MB { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
