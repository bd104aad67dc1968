//! The cost of an event: for the thread that emits it, and for the collector that sends it to clients.
//!
//! Events come in bursts, as they do from a device. Between bursts the collector catches up, outside of the measured
//! time, so that no event is lost: a lost event would cost less and spoil the result.

#![allow(clippy::expect_used, reason = "a benchmark that cannot start has nothing to measure")]

use std::fs;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use viommu_trace::event::{Access, Route};
use viommu_trace::{self as trace, Event, Options, Reader, Subscription, Tracer};

/// Events of a burst: an eighth of a ring.
const BURST: u64 = 2048;

fn dma(n: u64) -> Event {
    Event::Dma {
        endpoint: 32,
        access: Access::Write,
        route: Route::Mapped,
        failed: false,
        iova: n << 12,
        gpa: n << 13,
        len: 4096,
        domain: 1,
        tag: 0,
    }
}

/// Bursts with a pause in which the collector empties the ring.
fn bursts(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, tracer: &Tracer, pause: Duration) {
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|events| {
            let mut time = Duration::ZERO;
            for first in (0..events).step_by(BURST as usize) {
                let end = events.min(first + BURST);
                let begin = Instant::now();
                for n in first..end {
                    tracer.emit(black_box(dma(n)));
                }
                time += begin.elapsed();
                std::thread::sleep(pause);
            }
            time
        });
    });
    let stats = tracer.stats();
    println!("{name}: {} events emitted, {} lost", stats.emitted(), stats.lost);
}

fn emit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("emit");
    group.throughput(Throughput::Elements(1)).measurement_time(Duration::from_secs(3)).sample_size(30);
    bursts(&mut group, "disabled", &Tracer::default(), Duration::ZERO);

    let (tracer, handle) = trace::start(Options::default()).expect("a trace without a socket");
    bursts(&mut group, "no_client", &tracer, Duration::from_millis(4));
    handle.stop();

    let dir = tempfile::tempdir().expect("a temporary folder");
    let socket = dir.path().join("trace.sock");
    let (tracer, handle) =
        trace::start(Options { socket: Some(socket.clone()), ..Options::default() }).expect("a trace with a socket");
    let client = std::thread::spawn({
        let reader = connect(&socket);
        move || read(reader)
    });
    bursts(&mut group, "binary_client", &tracer, Duration::from_millis(4));
    handle.stop();
    println!("binary_client: {} received", client.join().unwrap_or(0));
    group.finish();
}

/// The time that the collector had a processor, ns: that of the one thread with its name.
fn collector_time() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").expect("the process has threads").flatten();
    let is_collector = |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|name| name == "trace\n");
    let task = tasks.map(|task| task.path()).find(is_collector).expect("the collector runs");
    let times = fs::read_to_string(task.join("schedstat")).expect("the kernel counts times");
    times.split(' ').next().and_then(|time| time.parse().ok()).expect("the first is a number")
}

/// The collector's time for an event, with some clients that read all events.
fn collector(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("collector");
    group.throughput(Throughput::Elements(1)).measurement_time(Duration::from_secs(3)).sample_size(20);
    for (name, format, count) in [("binary", "binary", 1), ("json", "json", 1), ("json_4", "json", 4)] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let socket = dir.path().join("trace.sock");
        let options = Options { socket: Some(socket.clone()), ..Options::default() };
        let (tracer, handle) = trace::start(options).expect("a trace with a socket");
        let clients: Vec<_> = (0..count)
            .map(|_| {
                let mut stream = UnixStream::connect(&socket).expect("the trace's server listens");
                writeln!(stream, "{{\"format\":\"{format}\"}}").expect("it reads what a client wants");
                // It begins when it has read that.
                stream.read_exact(&mut [0; 8]).expect("it begins");
                std::thread::spawn(move || io::copy(&mut stream, &mut io::sink()).unwrap_or(0))
            })
            .collect();
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|events| {
                let before = collector_time();
                for first in (0..events).step_by(BURST as usize) {
                    (first..events.min(first + BURST)).for_each(|n| tracer.emit(black_box(dma(n))));
                    std::thread::sleep(Duration::from_millis(4));
                }
                Duration::from_nanos(collector_time() - before)
            });
        });
        let stats = handle.stop();
        println!("{name}: {} events emitted, {} lost", stats.emitted(), stats.lost);
        for client in clients {
            println!("{name}: {} bytes received", client.join().unwrap_or(0));
        }
    }
    group.finish();
}

fn connect(socket: &Path) -> Reader<std::os::unix::net::UnixStream> {
    Reader::connect(socket, &Subscription::default()).expect("the trace's server listens")
}

fn read(mut reader: Reader<std::os::unix::net::UnixStream>) -> u64 {
    let mut received = 0;
    while let Ok(Some(_)) = reader.next_record() {
        received += 1;
    }
    received
}

criterion_group!(benches, emit, collector);
criterion_main!(benches);
