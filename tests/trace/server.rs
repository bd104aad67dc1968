//! Start, end and idleness of the server.

use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use viommu_socket::SocketError;
use viommu_trace::Kind;
use viommu_trace::{self as trace, Event, Options, ReadError, Reader, StartError, Subscription, Tracer};

use crate::fixture::*;

#[test]
fn at_the_end_clients_get_the_rest_and_the_socket_goes() {
    // The server gives clients half a second. On a busy machine a client may not run for so long.
    let tries = 20;
    assert!((0..tries).any(|_| clients_get_the_rest()), "clients are cut off, even if they read at once");
}

/// Ends a server. Returns whether a client that reads got everything: it may be cut off only if it took too long.
fn clients_get_the_rest() -> bool {
    let fixture = Fixture::with(Options::default());
    let mut client = fixture.json("\n").0;
    let undecided = fixture.raw(b"");
    // More than the socket's buffer holds, so that the end has to wait for the reader.
    fixture.interrupts(1, 0..10_000);
    let hanging = fixture.json("{\"backlog\":\"all\"}\n");
    let Fixture { tracer, handle, socket, .. } = fixture;
    let begin = Instant::now();
    let reader = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        let mut text = String::new();
        let _ = client.read_to_string(&mut text);
        (text, begin.elapsed())
    });
    handle.stop();
    assert!(begin.elapsed() < PATIENCE, "a client that does not read holds up the end");
    assert!(!socket.exists());
    let (text, time) = reader.join().unwrap();
    let is_all = text.ends_with('\n') && text.lines().count() == 10_000;
    assert!(is_all || time > Duration::from_millis(450), "cut off after {time:?}");
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap_or_default());
    if is_all {
        assert_eq!(vectors(&lines.collect::<Vec<_>>()), (0..10_000).collect::<Vec<_>>());
    }
    // Emitting now does nothing, and no harm.
    (0..100_000).for_each(|_| tracer.emit(Event::Bypass { value: 0 }));
    drop((hanging, undecided));
    is_all
}

#[test]
fn events_that_are_not_recorded_leave_no_gap() {
    let fixture = Fixture::new();
    let client = fixture.json("\n");
    fixture.interrupts(1, 0..10);
    fixture.handle.record(false);
    fixture.interrupts(1, 10..20);
    fixture.handle.record(true);
    fixture.interrupts(1, 20..30);
    let stats = fixture.stop();
    let events = client.rest();
    assert_eq!(vectors(&events), (0..10).chain(20..30).collect::<Vec<_>>());
    assert!(events.is_sorted_by(|a, b| a["seq"].as_u64().unwrap() + 1 == b["seq"].as_u64().unwrap()), "{events:?}");
    assert_eq!((stats.emitted(), stats.lost), (20, 0));
}

#[test]
fn a_live_socket_is_an_error_and_a_stale_one_is_replaced() {
    let fixture = Fixture::new();
    let again = |path: &PathBuf| trace::start(Options { socket: Some(path.clone()), ..Options::default() });
    assert!(matches!(again(&fixture.socket), Err(StartError::Socket(SocketError::InUse(_)))));
    // The failed attempt did no harm.
    drop(fixture.json("\n"));

    let stale = fixture.socket.with_extension("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let (_, handle) = again(&stale).unwrap();
    assert!(Reader::connect(&stale, &Subscription::default()).is_ok());
    handle.stop();
    assert!(matches!(Reader::connect(&stale, &Subscription::default()), Err(ReadError::NoSocket(_))));
    drop(UnixListener::bind(&stale).unwrap());
    assert!(matches!(Reader::connect(&stale, &Subscription::default()), Err(ReadError::Nobody(_))));

    let file = fixture.socket.with_extension("txt");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(again(&file), Err(StartError::Socket(SocketError::NotASocket(_)))));
    assert!(matches!(Reader::connect(&file, &Subscription::default()), Err(ReadError::NotASocket(_))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    // A socket that another process has put in the place of ours stays.
    std::fs::remove_file(&fixture.socket).unwrap();
    let other = UnixListener::bind(&fixture.socket).unwrap();
    let socket = fixture.socket.clone();
    fixture.handle.stop();
    assert!(socket.exists());
    drop(other);
}

#[test]
fn a_watched_event_arrives_soon_and_a_quiet_collector_sleeps() {
    let fixture = Fixture::new();
    let mut client = fixture.binary(&Subscription::default());
    let mut times: Vec<Duration> = (0..40)
        .map(|n| {
            // After a pause the collector sleeps until it is woken; before, it looks every 2 ms.
            thread::sleep(Duration::from_millis(if n % 2 == 0 { 80 } else { 0 }));
            let begin = Instant::now();
            fixture.tracer.emit(Event::Bypass { value: 0 });
            client.next_record().unwrap().unwrap();
            begin.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("from emit to the client: median {:?}, longest {:?}", times[times.len() / 2], times[times.len() - 1]);
    let thread = median_wake_up();
    println!("from one thread to another: median {thread:?}");
    assert!(times[times.len() / 2] < Duration::from_millis(5) + 10 * thread, "{times:?}");

    // On a busy machine it takes a while until it has nothing left to do.
    let begin = Instant::now();
    loop {
        let before = switches();
        thread::sleep(Duration::from_millis(500));
        let switches = switches() - before;
        println!("{switches} switches in 500 ms without an event");
        if switches <= 5 {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "the collector polls: {switches} switches in 500 ms");
    }
}

/// How long this machine takes now to wake a sleeping thread and to get its answer.
fn median_wake_up() -> Duration {
    let ((wake, woken), (answer, answered)) = (mpsc::channel::<()>(), mpsc::channel());
    let echo = thread::spawn(move || woken.iter().for_each(|()| answer.send(()).unwrap()));
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            thread::sleep(Duration::from_millis(20));
            let begin = Instant::now();
            wake.send(()).unwrap();
            answered.recv().unwrap();
            begin.elapsed()
        })
        .collect();
    drop(wake);
    echo.join().unwrap();
    times.sort_unstable();
    times[times.len() / 2]
}

/// When a client gets events already, the collector ignores what it sends, and that it closes its side: it only waits
/// until the client hangs up.
#[test]
fn a_client_that_talks_or_closes_its_side_keeps_nobody_busy() {
    let fixture = Fixture::new();
    let mut talker = fixture.json("{}\n");
    talker.0.get_mut().write_all(b"and more\n").unwrap();
    let mut closer = fixture.json("{}\n");
    closer.0.get_ref().shutdown(Shutdown::Write).unwrap();
    let mut late = JsonClient(BufReader::new(fixture.raw(b"")));
    assert_eq!(late.next().unwrap()["kind"], "hello");
    late.0.get_mut().write_all(b"{}\n").unwrap();
    fixture.interrupts(1, 0..1);
    for client in [&mut talker, &mut closer, &mut late] {
        assert_eq!(client.next().unwrap()["kind"], "interrupt");
    }
    // On a busy machine it takes a while until it has nothing left to do.
    let begin = Instant::now();
    loop {
        let before = processor_time();
        thread::sleep(Duration::from_millis(200));
        let time = processor_time() - before;
        if time < Duration::from_millis(5) {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "the collector is busy: {time:?} of 200 ms");
    }
}

/// How long the collector's thread ran.
fn processor_time() -> Duration {
    let schedstat = std::fs::read_to_string(collector().join("schedstat")).unwrap();
    Duration::from_nanos(schedstat.split(' ').next().unwrap().parse().unwrap())
}

/// How often the collector's thread went to sleep.
fn switches() -> u64 {
    let status = std::fs::read_to_string(collector().join("status")).unwrap();
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    count.trim().parse().unwrap()
}

/// The collector's thread.
fn collector() -> PathBuf {
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        // Threads of the test runner come and go.
        if std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name == "trace\n") {
            return path;
        }
    }
    panic!("There is no thread with the collector's name");
}

#[test]
fn the_disabled_tracer_and_one_without_a_socket_work() {
    let tracer = Tracer::default();
    tracer.emit(Event::Bypass { value: 0 });
    assert_eq!(tracer.stats().emitted(), 0);

    let _alone = alone();
    let (tracer, handle) = trace::start(Options::default()).unwrap();
    (0..100_000).for_each(|n| tracer.emit(Event::Kick { queue: 0, requests: n }));
    assert_eq!(tracer.stats().emitted(), 100_000);
    let stats = handle.stop();
    assert_eq!(stats.of(Kind::Kick), 100_000);
    assert_eq!(stats.of(Kind::Fault), 0);
}
