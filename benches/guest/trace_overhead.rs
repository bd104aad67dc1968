//! The cost of tracing: it is switched on and off in time slices while a guest runs.
//!
//! Two boots differ by more than the cost of tracing. So each ratio compares adjacent slices of one boot.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;
use viommu_testkit::guest::{Folder, Serve};
use viommu_trace::now_ns;

use super::common::{self, Cores, median};
use super::{CASES, TOPOLOGY};

/// Milliseconds of a time slice that are measured.
const SLICE_MS: u64 = 100;

/// Seconds of each case in each boot.
pub const SECONDS: f64 = 3.0;

/// The time at both ends of a case that is not measured.
const EDGE: Duration = Duration::from_millis(50);

/// Who reads the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Nobody.
    None,
    /// One client, binary records.
    Binary,
}

/// A time slice, as `viommu serve --trace-slices` prints it: times of `CLOCK_MONOTONIC` in nanoseconds.
#[derive(Deserialize)]
struct Slice {
    begin: u64,
    end: u64,
    traced: bool,
    io_count: u64,
}

impl Slice {
    fn iops(&self) -> f64 {
        self.io_count as f64 * 1e9 / (self.end - self.begin) as f64
    }
}

/// Boots a guest, and returns the ratio of traced slices to untraced ones in each case.
pub fn boot(reader: Reader, cores: &Cores) -> Vec<f64> {
    let folder = Folder::in_memory();
    common::write_image(&folder);
    let slice = SLICE_MS.to_string();
    let daemon = Serve::start(&folder, TOPOLOGY, &["--trace-socket", "trace.sock", "--trace-slices", &slice]);
    let client = (reader == Reader::Binary).then(|| watch(&folder.join("trace.sock")));
    let cases = CASES.iter().map(|(_, options, _)| format!("nvme-io {options} --seconds {SECONDS}"));
    let guest = cores.start(daemon.guest(&cases.collect::<Vec<_>>().join(" + ")));
    let arrivals = Arrivals::of(&folder.join("results.jsonl"));
    super::check_buffers(&guest.wait().results);
    let ends = arrivals.end();
    let (_, printed) = daemon.end();
    if let Some(client) = client {
        assert!(client.join().unwrap() > 1 << 20, "the client of the trace got next to nothing");
    }
    let slices: Vec<Slice> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(ends.len(), CASES.len(), "not every case has a result");
    ends.iter().map(|end| ratio(&slices, *end)).collect()
}

/// The ratio of the case whose result arrived at this time: the median of those of its traced slices to the mean of the
/// two slices beside them.
fn ratio(slices: &[Slice], end: u64) -> f64 {
    let edge = EDGE.as_nanos() as u64;
    let begin = end - Duration::from_secs_f64(SECONDS).as_nanos() as u64;
    let inside: Vec<_> = slices.iter().filter(|slice| slice.begin >= begin + edge && slice.end <= end - edge).collect();
    let traced = inside.windows(3).filter(|three| three[1].traced);
    let ratios: Vec<_> = traced.map(|three| 2.0 * three[1].iops() / (three[0].iops() + three[2].iops())).collect();
    assert!(ratios.len() >= 5 && ratios.iter().all(|ratio| ratio.is_normal()), "{} slices: {ratios:?}", inside.len());
    median(&ratios)
}

/// Notes when results of cases arrive in a file, in nanoseconds of `CLOCK_MONOTONIC`.
struct Arrivals {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Vec<u64>>,
}

impl Arrivals {
    fn of(path: &Path) -> Arrivals {
        let (path, over) = (path.to_owned(), Arc::new(AtomicBool::new(false)));
        let ended = over.clone();
        let thread = std::thread::spawn(move || {
            let mut arrivals = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
                let text = fs::read_to_string(&path).unwrap_or_default();
                let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
                let count = whole.lines().filter(|line| line.contains("\"iops\"")).count();
                arrivals.resize(count, now_ns());
            }
            arrivals
        });
        Arrivals { over, thread }
    }

    fn end(self) -> Vec<u64> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Reads the trace to its end, and returns its length.
fn watch(socket: &Path) -> JoinHandle<u64> {
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
