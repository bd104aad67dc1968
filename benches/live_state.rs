//! What clients that ask for the live state cost: the time of a request meanwhile, memory, and whether another client
//! loses events. A million mappings are live, and the clients leave before they have read them all. Fails if a goal is
//! missed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark that cannot start has nothing to measure")]

#[path = "common/cores.rs"]
mod cores;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cores::Cores;
use nix::unistd::Pid;
use viommu::iommu::{EndpointSettings, Iommu, Live, Request, Settings};
use viommu_testkit::frontend::{IntoBytesRequest, READ, attach, map, unmap};
use viommu_testkit::process::{descriptors, resident};
use viommu_testkit::{PATIENCE, wait_until};
use viommu_trace::{self as trace, Event, Format, Kind, Options, Reader, Subscription, Tracer};
use viommu_wire::virtio_iommu::feature;

const PAGE: u64 = 4096;
const MAPPINGS: u64 = 1_000_000;
/// Clients at once; with the one that wants events, as many as there may be. Each number is measured in each round.
const CLIENTS: [usize; 4] = [0, 1, 16, 255];
/// The goals: how much longer a request may take, and how much memory the clients may take.
const RATIO_MAX: f64 = 1.1;
const MIB_MAX: u64 = 64;
/// The fastest of these is what a request takes: a machine that others use too has slow rounds, with clients or without.
const ROUNDS: usize = 15;
/// Pairs of a MAP and an UNMAP that are measured each time, and the pause after each.
const PAIRS: usize = 10_000;
const PAUSE: Duration = Duration::from_micros(20);

fn main() -> ExitCode {
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let cores = Cores::divide();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = folder.path().join("trace.sock");
    let (tracer, mut bound) =
        trace::bind(Options { socket: Some(socket.clone()), ..Options::default() }).expect("a trace");
    let mut device = Device::new();
    // Not traced, since nobody collects events yet.
    (0..MAPPINGS).for_each(|number| device.map(number * 2));
    device.tracer = tracer;
    let iommu = device.iommu.clone();
    bound.set_state(move || Box::new(Live::new(iommu.clone())));
    let handle = bound.start().expect("a thread");
    let other = thread::spawn({
        let reader = Reader::connect(&socket, &Subscription { kinds: vec![Kind::Request], ..Subscription::default() });
        move || lost(reader.expect("a client"))
    });
    let mut fastest = [f64::INFINITY; CLIENTS.len()];
    let mut most_more = 0;
    println!("{:>7} {:>12} {:>10}", "clients", "ns a request", "MiB more");
    for _ in 0..ROUNDS {
        for (count, fastest) in CLIENTS.into_iter().zip(&mut fastest) {
            let (before, open) = (resident(), descriptors());
            let clients = Clients::start(&socket, count);
            // On a core of its own, since what is measured is not how processors are shared.
            let measured = thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    cores.give_processor(Pid::from_raw(0));
                    device.time_of_a_request()
                });
                thread.join()
            });
            let time = measured.expect("the measuring thread");
            let more = resident().saturating_sub(before) >> 20;
            drop(clients);
            // The trace's server closes its ends a moment later.
            wait_until(PATIENCE, "the end of the clients", || descriptors() == open);
            most_more = most_more.max(more);
            *fastest = fastest.min(time);
            println!("{count:>7} {time:>12.0} {more:>10}");
        }
    }
    let mut reached = true;
    for (count, time) in CLIENTS.into_iter().zip(fastest) {
        let ratio = time / fastest[0];
        println!(
            "{count} clients: {time:.0} ns in the fastest of {ROUNDS} rounds, {ratio:.3} of none; at most {RATIO_MAX}"
        );
        reached &= ratio <= RATIO_MAX;
    }
    let stats = handle.stop();
    let other = other.join().expect("the other client ends with the trace");
    println!("{} events; another client lost {other}, the rings {}; 0 wanted", stats.emitted(), stats.lost);
    println!("{most_more} MiB more with clients; at most {MIB_MAX}");
    reached &= other == 0 && stats.lost == 0 && most_more <= MIB_MAX;
    println!("{}", if reached { "reached" } else { "MISSED" });
    if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Device {
    iommu: Arc<Iommu>,
    tracer: Tracer,
}

impl Device {
    /// Endpoint 1 is in domain 1. Without a trace.
    fn new() -> Device {
        let endpoints = vec![EndpointSettings { id: 1, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
        iommu.set_features(feature::MAP_UNMAP);
        let device = Device { iommu, tracer: Tracer::default() };
        device.execute(&attach(1, 1, 0).bytes());
        device
    }

    fn map(&self, page: u64) {
        self.execute(&map(1, page * PAGE, page * PAGE + PAGE - 1, 0, READ).bytes());
    }

    fn unmap(&self, page: u64) {
        self.execute(&unmap(1, page * PAGE, page * PAGE + PAGE - 1).bytes());
    }

    /// As the request queue's thread does it.
    fn execute(&self, request: &[u8]) {
        let journal = self.iommu.journal();
        let request = Request::parse(request, self.iommu.features()).expect("a request");
        let outcome = self.iommu.execute(&request, &mut []);
        self.iommu.synchronize();
        self.tracer.emit(request.event(outcome, PAGE));
        drop(journal);
    }

    /// The median of a round, in nanoseconds.
    fn time_of_a_request(&self) -> f64 {
        let mut times: Vec<u64> = (0..PAIRS as u64)
            .map(|number| {
                let page = 2 * MAPPINGS + number % 7;
                let begin = Instant::now();
                self.map(page);
                self.unmap(page);
                let time = begin.elapsed();
                let begin = Instant::now();
                while begin.elapsed() < PAUSE {
                    std::hint::spin_loop();
                }
                time.as_nanos() as u64
            })
            .collect();
        times.sort_unstable();
        times[PAIRS / 2] as f64 / 2.0
    }
}

/// Clients that have asked for the live state, and read it until this is dropped.
struct Clients {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Clients {
    fn start(socket: &Path, count: usize) -> Clients {
        let subscription =
            Subscription { format: Format::Binary, kinds: vec![Kind::State], state: true, ..Subscription::default() };
        let streams: Vec<_> = (0..count)
            .map(|_| {
                let mut stream = UnixStream::connect(socket).expect("the trace's socket");
                stream.write_all(subscription.line().as_bytes()).expect("a line is taken");
                stream.set_nonblocking(true).expect("a socket");
                stream
            })
            .collect();
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (stop, received) = (stop.clone(), received.clone());
            move || read(&streams, &stop, &received)
        });
        wait_until(PATIENCE, "the state at all clients", || received.load(Ordering::Relaxed) == count as u64);
        Clients { stop, thread: Some(thread) }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reads from all streams. Counts in `received` those that have got more than a hello.
fn read(streams: &[UnixStream], stop: &AtomicBool, received: &AtomicU64) {
    use std::io::Read as _;
    let (mut buffer, mut totals) = (vec![0; 64 << 10], vec![0; streams.len()]);
    while !stop.load(Ordering::Relaxed) {
        for (mut stream, total) in streams.iter().zip(&mut totals) {
            match stream.read(&mut buffer) {
                Ok(0) => panic!("a client was sent away"),
                Ok(len) => *total += len,
                Err(_) => {}
            }
        }
        let served = totals.iter().filter(|total| **total > 1 << 10).count();
        received.store(served as u64, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(1));
    }
}

/// The events that a client lost until the trace ended.
fn lost(mut reader: Reader<UnixStream>) -> u64 {
    let mut lost = 0;
    while let Ok(Some(record)) = reader.next_record() {
        if let Ok(Event::Lost { count, .. }) = Event::decode(&record) {
            lost += count;
        }
    }
    lost
}
