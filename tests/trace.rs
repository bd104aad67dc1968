//! The trace socket, through real sockets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use viommu::socket::SocketError;
use viommu::trace::event::{Access, LossPlace, Route};
use viommu::trace::{self, Choice, Counters, Event, Last, Options, ReadError, Reader, StartError, TraceHandle, Tracer};
use viommu::wire::trace::{Kind, Record};

/// One at a time: some tests measure time, and the machine may have two processors only.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Fixture {
    tracer: Tracer,
    handle: TraceHandle,
    socket: PathBuf,
    _dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        let alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("trace.sock");
        let (tracer, handle) = trace::start(Options { socket: Some(socket.clone()), ..options }).unwrap();
        Fixture { tracer, handle, socket, _dir: dir, _alone: alone }
    }

    /// A client that sends this and whose reads do not wait for ever.
    fn raw(&self, line: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(line).unwrap();
        stream
    }

    /// A JSON client that has read its hello.
    fn json(&self, line: &str) -> JsonClient {
        let mut client = JsonClient(BufReader::new(self.raw(line.as_bytes())));
        assert_eq!(client.next().unwrap()["kind"], "hello");
        client
    }

    /// A binary client that has read its header.
    fn binary(&self, choice: &Choice) -> Reader<UnixStream> {
        Reader::connect(&self.socket, choice).unwrap()
    }

    fn interrupts(&self, endpoint: u32, vectors: std::ops::Range<u16>) {
        vectors.for_each(|vector| self.tracer.emit(Event::Interrupt { endpoint: Some(endpoint), vector }));
    }

    fn stop(self) -> Counters {
        self.handle.stop()
    }
}

struct JsonClient(BufReader<UnixStream>);

impl JsonClient {
    /// The next line; `None` at the end.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn rest(mut self) -> Vec<Value> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

fn rest(mut reader: Reader<UnixStream>) -> Vec<Record> {
    std::iter::from_fn(|| reader.next_record().unwrap()).collect()
}

/// Events received, lost in rings, lost by this client.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    received: u64,
    ring: u64,
    client: u64,
}

/// Adds up a stream; its numbers must ascend.
fn add_up<'a>(records: impl IntoIterator<Item = &'a Record>) -> Sum {
    let mut sum = Sum::default();
    let mut last = None;
    for record in records {
        assert!(last < Some(record.seq.get()), "{last:?} before {}", record.seq);
        last = Some(record.seq.get());
        match Event::decode(record).unwrap() {
            Event::Lost { place: LossPlace::Ring, count, .. } => sum.ring += count,
            Event::Lost { place: LossPlace::Client, count, .. } => sum.client += count,
            _ => sum.received += 1,
        }
    }
    sum
}

fn vectors(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|line| line["vector"].as_u64().unwrap()).collect()
}

#[test]
fn a_silent_client_gets_json_from_now_on() {
    let fixture = Fixture::new();
    fixture.interrupts(1, 0..5);
    let mut client = JsonClient(BufReader::new(fixture.raw(b"")));
    // While the server waits for a line that never comes, nothing is missed.
    for vector in 5..35 {
        thread::sleep(Duration::from_millis(10));
        fixture.interrupts(1, vector..vector + 1);
    }
    let hello = client.next().unwrap();
    assert_eq!(hello["kind"], "hello");
    assert_eq!(hello["version"], 1);
    assert_eq!(hello["pid"], std::process::id());
    assert_eq!(hello["clock"], "CLOCK_MONOTONIC");
    assert_eq!(hello["format"], "json");
    assert_eq!(hello["record_size"], 64);
    assert_eq!(hello["lost"], 0);
    assert_eq!(hello["kinds"].as_array().unwrap().len(), Kind::ALL.len());
    let first = hello["seq"].as_u64().unwrap();
    assert!((5..35).contains(&first), "its stream begins when it connected: {first}");
    fixture.interrupts(1, 35..40);
    fixture.stop();
    assert_eq!(vectors(&client.rest()), (first..40).collect::<Vec<_>>());
}

#[test]
fn an_empty_line_and_an_unfinished_one_that_ends_begin_the_stream_too() {
    let fixture = Fixture::new();
    let empty = fixture.json("\n");
    let half = fixture.raw(br#"{"kinds":["interrupt"]}"#);
    half.shutdown(Shutdown::Write).unwrap();
    let mut half = JsonClient(BufReader::new(half));
    assert_eq!(half.next().unwrap()["kinds"], serde_json::json!(["interrupt", "lost"]));
    // A client that will send no more still reads.
    thread::sleep(Duration::from_millis(150));
    fixture.interrupts(1, 0..3);
    fixture.tracer.emit(Event::Bypass { value: 1 });
    fixture.stop();
    assert_eq!(vectors(&half.rest()), [0, 1, 2]);
    assert_eq!(empty.rest().len(), 4);
}

#[test]
fn clients_choose_format_kinds_and_endpoints_for_themselves() {
    let fixture = Fixture::new();
    let all = fixture.json("{}\n");
    let kinds = fixture.json("{\"kinds\":[\"bypass\",\"kick\"]}\n");
    let endpoints = fixture.json("{\"endpoints\":[\"00:04.0\"],\"format\":\"json\"}\n");
    let binary = fixture.binary(&Choice { kinds: vec![Kind::Dma], endpoints: vec![40, 48], ..Choice::default() });
    let dma = |endpoint| Event::Dma {
        endpoint,
        access: Access::Read,
        route: Route::Mapped,
        failed: false,
        iova: 0x1000,
        gpa: 0x2000,
        len: 512,
        domain: 1,
        tag: 0,
    };
    for event in [dma(32), dma(40), Event::Bypass { value: 0 }, dma(48), Event::Kick { queue: 0, requests: 3 }] {
        fixture.tracer.emit(event);
    }
    fixture.stop();
    let seqs = |lines: Vec<Value>| lines.iter().map(|line| line["seq"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(seqs(all.rest()), [0, 1, 2, 3, 4]);
    assert_eq!(seqs(kinds.rest()), [2, 4]);
    assert_eq!(seqs(endpoints.rest()), [0, 2, 4]);
    let records = rest(binary);
    assert_eq!(records.iter().map(|record| Event::decode(record).unwrap()).collect::<Vec<_>>(), [dma(40), dma(48)]);
}

#[test]
fn a_backlog_is_the_last_events_that_pass_the_filter() {
    let fixture = Fixture::with(Options { backlog: 64, ..Options::default() });
    for vector in 0..100 {
        fixture.interrupts(1 + u32::from(vector % 2), vector..vector + 1);
    }
    let some = fixture.json("{\"backlog\":3,\"endpoints\":[2]}\n");
    let all = fixture.json("{\"backlog\":\"all\"}\n");
    let many = fixture.json("{\"backlog\":1000000000000}\n");
    let none = fixture.json("{\"backlog\":0}\n");
    fixture.interrupts(2, 100..101);
    fixture.stop();
    assert_eq!(vectors(&some.rest()), [95, 97, 99, 100]);
    assert_eq!(vectors(&none.rest()), [100]);
    let kept: Vec<u64> = (36..101).collect();
    assert_eq!(vectors(&all.rest()), kept);
    assert_eq!(vectors(&many.rest()), kept);
}

#[test]
fn a_bad_first_line_is_answered_and_hurts_nobody() {
    let fixture = Fixture::new();
    let good = fixture.json("\n");
    let long = [b'x'; 100_000];
    let lines: [(&[u8], &str); 6] = [
        (b"GET / HTTP/1.1\r\n\r\n", "Not JSON"),
        (b"\x00\xff\xfe\x80\n", "Not JSON"),
        (b"{\"kinds\":[\"dam\"]}\n", "Unknown event kind \"dam\""),
        (b"{\"format\":\"xml\"}\n", "\"json\" or \"binary\""),
        (b"{\"format\":\"json\"", "newline"),
        (&long, "4096"),
    ];
    for (line, expected) in lines {
        let mut stream = UnixStream::connect(&fixture.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // The server may have closed before it was sent all.
        let _ = stream.write_all(line);
        let answer = JsonClient(BufReader::new(stream)).rest();
        assert_eq!(answer.len(), 1, "one line, then the end");
        assert_eq!(answer[0]["kind"], "error");
        let message = answer[0]["error"].as_str().unwrap();
        assert!(message.contains(expected), "{message}");
    }
    fixture.interrupts(1, 0..3);
    fixture.stop();
    assert_eq!(vectors(&good.rest()), [0, 1, 2]);
}

#[test]
fn clients_that_vanish_hang_or_talk_hurt_nobody() {
    let fixture = Fixture::new();
    let good = fixture.binary(&Choice::default());
    let received = thread::spawn(move || add_up(&rest(good)));
    let mut hanging = Vec::new();
    let emit = |count: u32| {
        for n in 0..count {
            fixture.tracer.emit(Event::Kick { queue: 0, requests: n });
            if n % 500 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
    };
    for round in 0..10 {
        // Gone while its stream is under way, with bytes of it unread.
        let mut leaving = fixture.raw(b"{\"backlog\":\"all\"}\n");
        leaving.read_exact(&mut [0; 100]).unwrap();
        // Connects and never reads.
        hanging.push(fixture.raw(b"\n"));
        // Talks without end.
        let mut talking = fixture.raw(b"{}\n");
        talking.set_write_timeout(Some(Duration::from_millis(10))).unwrap();
        let _ = talking.write_all(&vec![b'{'; 1 << 20]);
        // Half a line, then gone.
        drop(fixture.raw(b"{\"for"));
        emit(5_000 + round);
        drop(leaving);
        emit(5_000);
    }
    let counters = fixture.stop();
    assert_eq!(received.join().unwrap(), Sum { received: counters.emitted(), ring: 0, client: 0 });
}

#[test]
fn a_slow_client_is_told_exactly_what_it_lost() {
    let fixture = Fixture::with(Options { backlog: 1024, ..Options::default() });
    let mut slow = fixture.binary(&Choice { kinds: vec![Kind::Interrupt], ..Choice::default() });
    let slow_json = fixture.json("{}\n");
    let mut fast = fixture.binary(&Choice::default());
    const BATCH: u64 = 500;
    const BATCHES: u64 = 400;
    let mut of_fast = Vec::new();
    let mut seen = 0;
    for _ in 0..BATCHES {
        for n in 0..BATCH {
            fixture.tracer.emit(match n % 2 {
                0 => Event::Interrupt { endpoint: None, vector: n as u16 },
                _ => Event::Bypass { value: 1 },
            });
        }
        // The fast one keeps up; the others read nothing.
        while seen < fixture.tracer.counters().emitted() {
            let record = fast.next_record().unwrap().unwrap();
            let sum = add_up([&record]);
            seen += sum.received + sum.ring + sum.client;
            of_fast.push(record);
        }
    }
    let total = BATCH * BATCHES;
    assert_eq!(add_up(&of_fast), Sum { received: total, ring: 0, client: 0 });

    // Now the slow ones read, and get on from where there are events again.
    let first = slow.next_record().unwrap().unwrap();
    fixture.tracer.emit(Event::Interrupt { endpoint: None, vector: 9999 });
    let json = thread::spawn(move || slow_json.rest());
    let reader = thread::spawn(move || rest(slow));
    thread::sleep(Duration::from_millis(200));
    fixture.stop();
    let records = reader.join().unwrap();
    let sum = add_up(std::iter::once(&first).chain(&records));
    assert_eq!(sum.ring, 0);
    assert!(sum.client > 0, "the test did not make it slow");
    assert_eq!(sum.received + sum.client, total / 2 + 1, "only what it asked for counts");
    assert_eq!(records.last().unwrap().args[0].get(), 9999);

    let lines = json.join().unwrap();
    let lost: u64 =
        lines.iter().filter(|line| line["kind"] == "lost").map(|line| line["count"].as_u64().unwrap()).sum();
    let received = lines.iter().filter(|line| line["kind"] != "lost").count() as u64;
    assert!(lost > 0);
    assert_eq!(received + lost, total + 1);
    let loss = lines.iter().find(|line| line["kind"] == "lost").unwrap();
    assert_eq!(loss["place"], "client");
    assert!(loss["since"].as_u64() <= loss["t"].as_u64());
}

#[test]
fn a_ring_that_overflows_is_told_to_all() {
    let fixture = Fixture::with(Options { ring: 64, ..Options::default() });
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let client = fixture.binary(&Choice::default());
            thread::spawn(move || add_up(&rest(client)))
        })
        .collect();
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let tracer = fixture.tracer.clone();
            thread::spawn(move || (0..20_000).for_each(|n| tracer.emit(Event::Kick { queue: 0, requests: n })))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let counters = fixture.stop();
    assert_eq!(counters.emitted(), 60_000);
    assert_eq!(counters.of(Kind::Kick), 60_000);
    assert!(counters.lost > 0, "64 slots cannot be enough");
    for client in clients {
        let sum = client.join().unwrap();
        assert_eq!(sum, Sum { received: 60_000 - counters.lost, ring: counters.lost, client: 0 });
    }
}

/// Emits a million events, with at most `ahead` under way. Returns the final counts and what the client got.
fn a_million(ahead: u64) -> (Counters, Sum) {
    const EVENTS: u64 = 1_000_000;
    let fixture = Fixture::new();
    let mut client = fixture.binary(&Choice::default());
    let arrived = Arc::new(AtomicU64::new(0));
    let reader = thread::spawn({
        let arrived = arrived.clone();
        move || {
            let mut records = Vec::new();
            while let Some(record) = client.next_record().unwrap() {
                records.push(record);
                arrived.store(records.len() as u64, Ordering::Relaxed);
            }
            records
        }
    });
    let begin = Instant::now();
    for n in 0..EVENTS {
        fixture.tracer.emit(Event::Kick { queue: 0, requests: n as u32 });
        while n.saturating_sub(arrived.load(Ordering::Relaxed)) > ahead {
            thread::sleep(Duration::from_micros(100));
        }
    }
    let emitted = begin.elapsed();
    let counters = fixture.stop();
    let sum = add_up(&reader.join().unwrap());
    let all = begin.elapsed();
    let rate = sum.received as f64 / all.as_secs_f64() / 1e6;
    println!("{EVENTS} events, emitted in {emitted:?}, received in {all:?}: {rate:.2} million a second, {sum:?}");
    assert_eq!(counters.emitted(), EVENTS);
    (counters, sum)
}

#[test]
fn a_million_events_reach_a_binary_client() {
    let (counters, sum) = a_million(12_000);
    assert_eq!(counters.lost, 0);
    assert_eq!(sum, Sum { received: 1_000_000, ring: 0, client: 0 });
}

#[test]
fn a_million_events_faster_than_they_can_be_collected_add_up() {
    let (counters, sum) = a_million(u64::MAX);
    assert_eq!(sum.received + sum.ring + sum.client, 1_000_000);
    // News of a ring's loss that the client missed is in the client's count, with the loss's own.
    assert!(sum.ring <= counters.lost && counters.lost <= sum.ring + sum.client, "{sum:?}, {}", counters.lost);
}

#[test]
fn at_the_end_clients_get_the_rest_and_the_socket_goes() {
    let fixture = Fixture::new();
    let client = fixture.json("\n");
    let undecided = fixture.raw(b"");
    // More than the socket's buffer holds, so that the end has to wait for the reader.
    fixture.interrupts(1, 0..10_000);
    let reader = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        client.rest()
    });
    let hanging = fixture.json("{\"backlog\":\"all\"}\n");
    let Fixture { tracer, handle, socket, .. } = fixture;
    let begin = Instant::now();
    handle.stop();
    let time = begin.elapsed();
    assert!(time < Duration::from_secs(2), "a client that does not read held up the end for {time:?}");
    assert!(!socket.exists());
    assert_eq!(vectors(&reader.join().unwrap()), (0..10_000).collect::<Vec<_>>());
    // Who emits now does so in vain, and harmlessly.
    (0..100_000).for_each(|_| tracer.emit(Event::Bypass { value: 0 }));
    drop((hanging, undecided));
}

#[test]
fn a_live_socket_is_an_error_and_a_stale_one_is_replaced() {
    let fixture = Fixture::new();
    let again = |path: &PathBuf| trace::start(Options { socket: Some(path.clone()), ..Options::default() });
    assert!(matches!(again(&fixture.socket), Err(StartError::Socket(SocketError::InUse(_)))));
    // The attempt did no harm.
    drop(fixture.json("\n"));

    let stale = fixture.socket.with_extension("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let (_, handle) = again(&stale).unwrap();
    assert!(Reader::connect(&stale, &Choice::default()).is_ok());
    handle.stop();
    assert!(matches!(Reader::connect(&stale, &Choice::default()), Err(ReadError::NoSocket(_))));
    drop(UnixListener::bind(&stale).unwrap());
    assert!(matches!(Reader::connect(&stale, &Choice::default()), Err(ReadError::Nobody(_))));

    let file = fixture.socket.with_extension("txt");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(again(&file), Err(StartError::Socket(SocketError::NotASocket(_)))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    // A socket that somebody else has put in the place of ours stays.
    std::fs::remove_file(&fixture.socket).unwrap();
    let other = UnixListener::bind(&fixture.socket).unwrap();
    let socket = fixture.socket.clone();
    fixture.handle.stop();
    assert!(socket.exists());
    drop(other);
}

#[test]
fn one_client_too_many_is_told_and_the_place_is_free_when_one_goes() {
    let fixture = Fixture::new();
    let mut clients = Vec::new();
    let error = loop {
        assert!(clients.len() <= 256);
        match Reader::connect(&fixture.socket, &Choice::default()) {
            Ok(client) => clients.push(client),
            Err(error) => break error,
        }
    };
    let ReadError::Refused(message) = error else { panic!("{error}") };
    assert!(message.contains(&format!("{} clients", clients.len())), "{message}");
    fixture.interrupts(1, 0..3);
    for client in clients.iter_mut().rev() {
        assert_eq!(client.next_record().unwrap().unwrap().args[0].get(), 0);
    }
    clients.pop();
    let begin = Instant::now();
    while Reader::connect(&fixture.socket, &Choice::default()).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_watched_event_arrives_soon_and_a_quiet_collector_sleeps() {
    let fixture = Fixture::new();
    let mut client = fixture.binary(&Choice::default());
    let mut times: Vec<Duration> = (0..40)
        .map(|n| {
            // After a pause the collector sleeps until it is woken, else it looks every 2 ms.
            thread::sleep(Duration::from_millis(if n % 2 == 0 { 80 } else { 0 }));
            let begin = Instant::now();
            fixture.tracer.emit(Event::Bypass { value: 0 });
            client.next_record().unwrap().unwrap();
            begin.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("from emit to the client: median {:?}, longest {:?}", times[times.len() / 2], times[times.len() - 1]);
    assert!(times[times.len() / 2] < Duration::from_millis(5), "{times:?}");

    thread::sleep(Duration::from_millis(100));
    let before = switches();
    thread::sleep(Duration::from_millis(500));
    let switches = switches() - before;
    println!("{switches} switches in 500 ms without an event");
    assert!(switches <= 5, "the collector polls: {switches} switches in 500 ms");
}

/// How often the collector's thread went to sleep.
fn switches() -> u64 {
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        // Threads of the test runner come and go.
        let Ok(status) = std::fs::read_to_string(path.join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_string();
        if field("Name:") == "trace" {
            return field("voluntary_ctxt_switches:").parse().unwrap();
        }
    }
    panic!("There is no thread with the collector's name");
}

#[test]
fn the_disabled_tracer_and_one_without_a_socket_work() {
    let tracer = Tracer::default();
    tracer.emit(Event::Bypass { value: 0 });
    assert_eq!(tracer.counters().emitted(), 0);

    let _alone = alone();
    let (tracer, handle) = trace::start(Options::default()).unwrap();
    (0..100_000).for_each(|n| tracer.emit(Event::Kick { queue: 0, requests: n }));
    assert_eq!(tracer.counters().emitted(), 100_000);
    let counters = handle.stop();
    assert_eq!(counters.of(Kind::Kick), 100_000);
    assert_eq!(counters.of(Kind::Fault), 0);
}

#[test]
fn a_backlog_that_wraps_shows_the_newest() {
    let fixture = Fixture::with(Options { backlog: 16, ..Options::default() });
    fixture.interrupts(1, 0..1000);
    let client = fixture.binary(&Choice { backlog: Last::All, ..Choice::default() });
    fixture.stop();
    let vectors: Vec<u64> = rest(client).iter().map(|record| record.args[0].get()).collect();
    assert_eq!(vectors, (984..1000).collect::<Vec<_>>());
}

/// `viommu trace` on the socket: what it prints, and how it ends.
fn viommu_trace(socket: &std::path::Path, arguments: &[&str]) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(["trace", "--socket"])
        .arg(socket)
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn the_command_prints_what_it_is_asked_for() {
    let fixture = Fixture::new();
    fixture.interrupts(32, 0..3);
    fixture.tracer.emit(Event::Fault {
        endpoint: 40,
        reason: 2,
        access: Access::Read,
        address: 0x1000,
        domain: None,
        dropped: false,
    });
    let print = |arguments: &[&str]| {
        let output = viommu_trace(&fixture.socket, arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let text = String::from_utf8(print(&["--backlog", "all", "--count", "4"])).unwrap();
    assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 4);
    assert!(text.ends_with("fault     00:05.0  reason=MAPPING access=read address=0x1000 dropped=0\n"), "{text}");
    let json = print(&["--backlog", "2", "--count", "2", "--format", "json", "--endpoint", "00:04.0"]);
    let json: Vec<Value> = json.split_inclusive(|b| *b == b'\n').map(|l| serde_json::from_slice(l).unwrap()).collect();
    assert_eq!(json[0]["kind"], "hello");
    assert_eq!(vectors(&json[1..]), [1, 2]);
    let binary = print(&["--backlog", "all", "--count", "1", "--format", "binary", "--kind", "kick,fault"]);
    let mut file = Reader::new(&binary[..]).unwrap();
    assert_eq!(file.next_record().unwrap().unwrap().seq.get(), 3);
    assert!(file.next_record().unwrap().is_none());
}

#[test]
fn the_command_ends_with_the_daemon_and_says_why_it_cannot_begin() {
    let fixture = Fixture::new();
    let socket = fixture.socket.clone();
    let mut watcher = std::process::Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(["trace", "--format", "json", "--socket"])
        .arg(&socket)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watcher.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("hello"));
    fixture.interrupts(32, 0..3);
    fixture.stop();
    assert_eq!(lines.count(), 3);
    assert!(watcher.wait().unwrap().success());

    let output = viommu_trace(&socket, &[]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("There is no trace socket"));
}
