//! Lost events are counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use viommu_trace::Kind;
use viommu_trace::{Event, Options, Subscription, TraceStats};

use crate::fixture::*;

#[test]
fn a_slow_client_learns_exactly_what_it_lost() {
    let fixture = Fixture::with(Options { history: 1024, ..patient() });
    let mut slow = fixture.binary(&Subscription { kinds: vec![Kind::Interrupt], ..Subscription::default() });
    let mut slow_json = fixture.json("{}\n");
    let mut fast = fixture.binary(&Subscription::default());
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
        // The fast client keeps up; the others read nothing.
        while seen < fixture.tracer.stats().emitted() {
            let record = fast.next_record().unwrap().unwrap();
            let sum = add_up([&record]);
            seen += sum.received + sum.ring + sum.client;
            of_fast.push(record);
        }
    }
    let total = BATCH * BATCHES;
    assert_eq!(add_up(&of_fast), Sum { received: total, ring: 0, client: 0 });

    // Now the slow clients read, and continue where there are events again.
    let first = slow.next_record().unwrap().unwrap();
    fixture.tracer.emit(Event::Interrupt { endpoint: None, vector: 9999 });
    let (got_all, both_got_all) = mpsc::channel();
    let of_json = got_all.clone();
    let json = thread::spawn(move || {
        let mut lines = Vec::new();
        while let Some(line) = slow_json.next() {
            if line["vector"] == 9999 {
                of_json.send(()).unwrap();
            }
            lines.push(line);
        }
        lines
    });
    let reader = thread::spawn(move || {
        let mut records = Vec::new();
        while let Some(record) = slow.next_record().unwrap() {
            if record.args[0].get() == 9999 {
                got_all.send(()).unwrap();
            }
            records.push(record);
        }
        records
    });
    (0..2).for_each(|_| both_got_all.recv_timeout(PATIENCE).unwrap());
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
fn the_overflow_of_a_ring_is_reported_to_all() {
    let fixture = Fixture::with(Options { ring: 64, ..patient() });
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let client = fixture.binary(&Subscription::default());
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
    let stats = fixture.stop();
    assert_eq!(stats.emitted(), 60_000);
    assert_eq!(stats.of(Kind::Kick), 60_000);
    assert!(stats.lost > 0, "64 slots cannot be enough");
    for client in clients {
        let sum = client.join().unwrap();
        assert_eq!(sum, Sum { received: 60_000 - stats.lost, ring: stats.lost, client: 0 });
    }
}

/// Emits a million events, with at most `ahead` not received yet. Returns the final counts, and the sums of the client.
fn a_million(ahead: u64) -> (TraceStats, Sum) {
    const EVENTS: u64 = 1_000_000;
    let fixture = Fixture::new();
    let mut client = fixture.binary(&Subscription::default());
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
    let stats = fixture.stop();
    let sum = add_up(&reader.join().unwrap());
    let all = begin.elapsed();
    let rate = sum.received as f64 / all.as_secs_f64() / 1e6;
    println!("{EVENTS} events, emitted in {emitted:?}, received in {all:?}: {rate:.2} million a second, {sum:?}");
    assert_eq!(stats.emitted(), EVENTS);
    (stats, sum)
}

#[test]
fn a_million_events_reach_a_binary_client() {
    let (stats, sum) = a_million(12_000);
    assert_eq!(stats.lost, 0);
    assert_eq!(sum, Sum { received: 1_000_000, ring: 0, client: 0 });
}

#[test]
fn a_million_events_faster_than_they_can_be_collected_add_up() {
    let (stats, sum) = a_million(u64::MAX);
    assert_eq!(sum.received + sum.ring + sum.client, 1_000_000);
    // If the client missed a `lost` event of a ring, its count is in the client's count.
    assert!(sum.ring <= stats.lost && stats.lost <= sum.ring + sum.client, "{sum:?}, {}", stats.lost);
}
