//! The choices of clients, what they get, and that they cannot harm others.

use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use viommu_trace::event::{Access, Route};
use viommu_trace::{Backlog, Event, Options, ReadError, Reader, Subscription};
use viommu_trace::{Kind, Record};

use crate::fixture::*;

#[test]
fn a_silent_client_gets_json_from_now_on() {
    let fixture = Fixture::new();
    fixture.interrupts(1, 0..5);
    let (said, hello) = mpsc::channel();
    let client = fixture.raw(b"");
    let reader = thread::spawn(move || {
        let mut client = JsonClient(BufReader::new(client));
        said.send(client.next().unwrap()).unwrap();
        client.rest()
    });
    // While the server waits for a line that never comes, nothing is missed.
    let (mut end, mut pause) = (5, Duration::from_millis(10));
    let hello = loop {
        fixture.interrupts(1, end..end + 1);
        end += 1;
        match hello.recv_timeout(pause) {
            Ok(hello) => break hello,
            // Enough for any duration.
            Err(_) => pause += pause / 10,
        }
    };
    assert_eq!(hello["kind"], "hello");
    assert_eq!(hello["version"], 2);
    assert_eq!(hello["pid"], std::process::id());
    assert_eq!(hello["clock"], "CLOCK_MONOTONIC");
    assert_eq!(hello["format"], "json");
    assert_eq!(hello["record_size"], 72);
    assert_eq!(hello["lost"], 0);
    assert_eq!(hello["kinds"].as_array().unwrap().len() as u32, Kind::DEFAULT.count_ones());
    let first = hello["seq"].as_u64().unwrap();
    assert!((5..u64::from(end)).contains(&first), "its stream begins when it connected: {first}");
    fixture.interrupts(1, end..40 + end);
    fixture.stop();
    assert_eq!(vectors(&reader.join().unwrap()), (first..u64::from(40 + end)).collect::<Vec<_>>());
}

#[test]
fn an_empty_line_and_an_unfinished_one_that_ends_begin_the_stream_too() {
    let fixture = Fixture::new();
    let empty = fixture.json("\n");
    let half = fixture.raw(br#"{"kinds":["interrupt"]}"#);
    half.shutdown(Shutdown::Write).unwrap();
    let mut half = JsonClient(BufReader::new(half));
    assert_eq!(half.next().unwrap()["kinds"], serde_json::json!(["interrupt", "lost"]));
    // A client that has closed its side still reads, and is served before the wait for a silent client would end.
    let silent = JsonClient(BufReader::new(fixture.raw(b""))).next().unwrap();
    assert_eq!(silent["kind"], "hello");
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
    let binary =
        fixture.binary(&Subscription { kinds: vec![Kind::Dma], endpoints: vec![40, 48], ..Subscription::default() });
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
    let fixture = Fixture::with(Options { history: 64, ..patient() });
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
fn a_backlog_that_wraps_shows_the_newest() {
    let fixture = Fixture::with(Options { history: 16, ..patient() });
    fixture.interrupts(1, 0..1000);
    let client = fixture.binary(&Subscription { backlog: Backlog::All, ..Subscription::default() });
    fixture.stop();
    let vectors: Vec<u64> = rest(client).iter().map(|record| record.args[0].get()).collect();
    assert_eq!(vectors, (984..1000).collect::<Vec<_>>());
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
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The server may have closed the socket before everything was sent.
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
    let fixture = Fixture::with(Options::default());
    let mut good = fixture.binary(&Subscription::default());
    let arrived = Arc::new(AtomicU64::new(0));
    let received = thread::spawn({
        let arrived = arrived.clone();
        move || {
            let count = |_: &Record| _ = arrived.fetch_add(1, Ordering::Relaxed);
            add_up(&std::iter::from_fn(|| good.next_record().unwrap().inspect(count)).collect::<Vec<_>>())
        }
    });
    let mut hanging = Vec::new();
    // Events are emitted no faster than the good client reads.
    let emit = |count: u32| {
        let begin = Instant::now();
        for n in 0..count {
            fixture.tracer.emit(Event::Kick { queue: 0, requests: n });
            while n % 500 == 0 && fixture.tracer.stats().emitted() > arrived.load(Ordering::Relaxed) + 2000 {
                assert!(begin.elapsed() < PATIENCE, "a client that reads does not get what is emitted");
                thread::sleep(Duration::from_millis(1));
            }
        }
    };
    for round in 0..10 {
        // Leaves in the middle of its stream, with unread bytes.
        let mut leaving = fixture.raw(b"{\"backlog\":\"all\"}\n");
        leaving.read_exact(&mut [0; 100]).unwrap();
        // Connects and never reads.
        hanging.push(fixture.raw(b"\n"));
        // Sends without end.
        let mut talking = fixture.raw(b"{}\n");
        talking.set_write_timeout(Some(Duration::from_millis(10))).unwrap();
        let _ = talking.write_all(&vec![b'{'; 1 << 20]);
        // Sends half a line, then leaves.
        drop(fixture.raw(b"{\"for"));
        emit(5_000 + round);
        drop(leaving);
        emit(5_000);
    }
    // Clients that hang delay the end, which does not wait for ever. So wait for the good client here.
    let begin = Instant::now();
    while arrived.load(Ordering::Relaxed) < fixture.tracer.stats().emitted() {
        assert!(begin.elapsed() < PATIENCE, "a client that reads does not get what is emitted");
        thread::sleep(Duration::from_millis(1));
    }
    let stats = fixture.stop();
    assert_eq!(received.join().unwrap(), Sum { received: stats.emitted(), ring: 0, client: 0 });
}

/// Threads that connect and leave as fast as they can, until this is dropped.
struct Flood {
    ended: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Flood {
    fn new(socket: &Path) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let threads = (0..8).map(|_| {
            let (ended, socket) = (ended.clone(), socket.to_path_buf());
            thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    drop(UnixStream::connect(&socket));
                }
            })
        });
        Flood { threads: threads.collect(), ended }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

#[test]
fn connecting_again_and_again_stops_neither_the_trace_nor_its_end() {
    const LONG: Duration = Duration::from_secs(60);
    let fixture = Fixture::new();
    let mut watcher = fixture.json("{}\n");
    watcher.0.get_ref().set_read_timeout(Some(LONG)).unwrap();
    let flood = Flood::new(&fixture.socket);
    for vector in 0..300 {
        fixture.interrupts(1, vector..vector + 1);
        let event = watcher.next().unwrap();
        assert_eq!((&event["kind"], event["vector"].as_u64()), (&"interrupt".into(), Some(vector.into())));
    }
    let handle = fixture.handle;
    let (ended, end) = mpsc::channel();
    thread::spawn(move || {
        let _ = ended.send(handle.stop());
    });
    let stats = end.recv_timeout(LONG).expect("the trace ends while there are connections to accept");
    assert_eq!((stats.emitted(), stats.lost), (300, 0));
    assert!(watcher.rest().is_empty());
    drop(flood);
}

#[test]
fn one_client_too_many_gets_an_error_until_another_leaves() {
    let fixture = Fixture::new();
    let mut clients = Vec::new();
    let error = loop {
        assert!(clients.len() <= 256);
        match Reader::connect(&fixture.socket, &Subscription::default()) {
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
    while Reader::connect(&fixture.socket, &Subscription::default()).is_err() {
        assert!(begin.elapsed() < PATIENCE);
    }
}
