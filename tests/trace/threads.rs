//! Threads that trace and end: what they leave behind, and which clients see their events.

use std::io::BufReader;
use std::sync::Barrier;
use std::thread;

use viommu_trace::Kind;
use viommu_trace::{Event, Subscription};

use crate::fixture::*;

/// Runs threads one after the other, each of which emits this many events.
fn in_turn(fixture: &Fixture, threads: usize, events: u32) {
    for _ in 0..threads {
        let tracer = fixture.tracer.clone();
        let emit = move || (0..events).for_each(|requests| tracer.emit(Event::Kick { queue: 0, requests }));
        thread::spawn(emit).join().unwrap();
    }
}

/// A member of this process's status, in MiB.
fn status_mib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

#[test]
fn threads_that_come_and_go_leave_no_memory_behind() {
    for watched in [false, true] {
        let fixture = Fixture::new();
        let client =
            watched.then(|| fixture.binary(&Subscription { kinds: vec![Kind::Panic], ..Subscription::default() }));
        let reader = client.map(|client| thread::spawn(move || rest(client)));
        in_turn(&fixture, 100, 1);
        let (resident, addresses) = (status_mib("VmRSS"), status_mib("VmSize"));
        // Few events or many: few do not make a thread wake the collector.
        in_turn(&fixture, 400, 1);
        in_turn(&fixture, 100, 8_000);
        let grown = (status_mib("VmRSS").saturating_sub(resident), status_mib("VmSize").saturating_sub(addresses));
        println!("watched: {watched}; MiB more: {grown:?}");
        // The history takes 9 MiB, and a ring 1 MiB. There may be several rings if the collector does not always get a
        // processor. Threads of the test runner take some memory too.
        assert!(grown.0 <= 80 && grown.1 <= 256, "{grown:?}");
        let stats = fixture.stop();
        assert_eq!((stats.emitted(), stats.lost), (100 + 400 + 800_000, 0));
        assert!(reader.is_none_or(|reader| reader.join().unwrap().is_empty()));
    }
}

/// The events that wait in the rings, more than are taken at a time, are earlier ones.
#[test]
fn a_client_gets_what_happened_since_it_connected_and_no_more_than_it_asked_for() {
    const THREADS: u64 = 24;
    const EVENTS: u64 = 8_000;
    let fixture = Fixture::new();
    let emitted = Barrier::new(THREADS as usize + 1);
    let end = Barrier::new(THREADS as usize + 1);
    thread::scope(|scope| {
        for n in 0..THREADS {
            let (tracer, emitted, end) = (fixture.tracer.clone(), &emitted, &end);
            scope.spawn(move || {
                (0..EVENTS).for_each(|_| tracer.emit(Event::Kick { queue: 0, requests: n as u32 }));
                emitted.wait();
                end.wait();
            });
        }
        emitted.wait();
        // Connects at once, before the collector has taken them.
        let lines = [&b""[..], b"{}\n", b"{\"backlog\":5}\n", b"{\"backlog\":\"all\"}\n"];
        let clients = lines.map(|line| JsonClient(BufReader::new(fixture.raw(line))));
        let first = THREADS * EVENTS;
        let clients = clients.map(|mut client| {
            let seq = client.next().unwrap()["seq"].as_u64();
            (client, seq)
        });
        fixture.interrupts(1, 0..10);
        end.wait();
        let readers = clients.map(|(client, seq)| {
            assert_eq!(seq, Some(first));
            thread::spawn(move || client.rest())
        });
        fixture.handle.stop();
        for (reader, backlog) in readers.into_iter().zip([0, 0, 5, 1 << 17]) {
            let found: Vec<_> = reader.join().unwrap().iter().map(|event| event["seq"].as_u64().unwrap()).collect();
            let all = found.iter().copied().eq(first - backlog..first + 10);
            assert!(all, "{} from {:?} to {:?}", found.len(), found.first(), found.last());
        }
    });
}
