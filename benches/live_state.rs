//! What clients that ask for the live state cost: the time of a request meanwhile, memory, and whether another client
//! loses events. A million mappings are live, and the clients leave before they have read them all. Fails if a goal is
//! missed.

#![allow(clippy::expect_used, reason = "a benchmark that cannot start has nothing to measure")]

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use viommu::iommu::{EndpointSettings, Iommu, Live, Request, Settings};
use viommu_trace::{self as trace, Event, Format, Kind, Options, Reader, Subscription, Tracer};
use viommu_wire::request::RequestType;
use viommu_wire::virtio_iommu::{Attach, Head, Map, Unmap, feature};
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;
const MAPPINGS: u64 = 1_000_000;
/// Clients at once; with the one that wants events, as many as there may be. Each number is measured beside none, in the
/// same round.
const CLIENTS: [usize; 4] = [0, 1, 16, 255];
/// The goals: how much longer a request may take, and how much memory the clients may take.
const RATIO_MAX: f64 = 1.1;
const MIB_MAX: u64 = 64;
const ROUNDS: usize = 7;
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
    cores.keep_one();
    let mut ratios = vec![Vec::new(); CLIENTS.len()];
    let mut most_more = 0;
    println!("{:>7} {:>12} {:>10} {:>10}", "clients", "ns a request", "to none", "MiB more");
    for _ in 0..ROUNDS {
        let mut alone = 0.0;
        for (count, ratios) in CLIENTS.into_iter().zip(&mut ratios) {
            let (before, open) = (resident(), descriptors());
            let clients = Clients::start(&socket, count, &cores);
            let time = device.time_of_a_request();
            let more = resident().saturating_sub(before);
            drop(clients);
            // The trace's server closes its ends a moment later.
            wait_for("the end of the clients", || descriptors() == open);
            most_more = most_more.max(more);
            if count == 0 {
                alone = time;
            }
            ratios.push(time / alone);
            println!("{count:>7} {time:>12.0} {:>10.3} {more:>10}", time / alone);
        }
    }
    let mut reached = true;
    for (count, mut ratios) in CLIENTS.into_iter().zip(ratios) {
        ratios.sort_by(f64::total_cmp);
        let ratio = ratios[ROUNDS / 2];
        println!(
            "{count} clients: {ratio:.3} of the time without them, median of {ROUNDS} rounds; at most {RATIO_MAX}"
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

/// Waits until something is so.
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "waited for {what} in vain");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The requesting thread has a core of its own, since what is measured is not how processors are shared.
struct Cores {
    one: CpuSet,
    others: CpuSet,
}

impl Cores {
    /// Moves this thread, and those that it starts from now on, to all cores but one.
    fn divide() -> Cores {
        let all = sched_getaffinity(Pid::from_raw(0)).expect("the cores of this process");
        let mut cores = (0..CpuSet::count()).filter(|core| all.is_set(*core) == Ok(true));
        let (mut one, mut others) = (CpuSet::new(), CpuSet::new());
        one.set(cores.next().expect("a core")).expect("it is a core");
        cores.for_each(|core| others.set(core).expect("it is a core"));
        sched_setaffinity(Pid::from_raw(0), &others).expect("at least two cores are wanted");
        Cores { one, others }
    }

    fn keep_one(&self) {
        sched_setaffinity(Pid::from_raw(0), &self.one).expect("a core");
    }

    fn share_others(&self) {
        sched_setaffinity(Pid::from_raw(0), &self.others).expect("a core");
    }
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
        let head = head(RequestType::Attach);
        let attach = Attach { head, domain: 1.into(), endpoint: 1.into(), flags: 0.into(), reserved: [0; 4] };
        device.execute(attach.as_bytes());
        device
    }

    fn map(&self, page: u64) {
        let (virt_start, virt_end, phys_start) = ((page * PAGE).into(), (page * PAGE + PAGE - 1).into(), 0.into());
        let head = head(RequestType::Map);
        let map = Map { head, domain: 1.into(), virt_start, virt_end, phys_start, flags: 3.into() };
        self.execute(map.as_bytes());
    }

    fn unmap(&self, page: u64) {
        let (virt_start, virt_end) = ((page * PAGE).into(), (page * PAGE + PAGE - 1).into());
        let head = head(RequestType::Unmap);
        self.execute(Unmap { head, domain: 1.into(), virt_start, virt_end, reserved: [0; 4] }.as_bytes());
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

    /// The median, in nanoseconds.
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

fn head(request: RequestType) -> Head {
    Head { kind: request as u8, reserved: [0; 3] }
}

/// Clients that have asked for the live state, and read it until this is dropped.
struct Clients {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Clients {
    fn start(socket: &Path, count: usize, cores: &Cores) -> Clients {
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
        cores.share_others();
        let thread = thread::spawn({
            let (stop, received) = (stop.clone(), received.clone());
            move || read(&streams, &stop, &received)
        });
        wait_for("the state at all clients", || received.load(Ordering::Relaxed) == count as u64);
        cores.keep_one();
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

/// How many descriptors this process has.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Resident memory in MiB.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * PAGE / (1 << 20)
}
