//! What is live, for clients that ask for it.

use std::io::Read;
use std::sync::mpsc;
use std::thread;

use serde_json::Value;
use viommu_testkit::process::resident;
use viommu_trace::event::StateItem;
use viommu_trace::{Event, Kind, StateSource, Subscription};

use crate::fixture::*;

/// A source of this many mappings, some in each step.
struct Mappings {
    next: u64,
    count: u64,
    step: u64,
}

impl Mappings {
    fn new(count: u64, step: u64) -> Self {
        Mappings { next: 0, count, step }
    }
}

impl StateSource for Mappings {
    fn step(&mut self, now: &dyn Fn() -> u64, take: &mut dyn FnMut(u64, Event)) -> bool {
        let at = now();
        let end = self.count.min(self.next + self.step);
        for page in self.next..end {
            let mapping = Event::State {
                endpoint: None,
                item: StateItem::Mapping,
                domain: 1,
                bypass: false,
                virt_start: page << 12,
                virt_end: page << 12 | 0xfff,
                phys_start: page << 12,
                flags: 3,
                tag: 0,
                lost: 0,
            };
            take(at, mapping);
        }
        self.next = end;
        self.next < self.count
    }
}

/// The pages of the mappings up to the end mark, and the numbers of the events in between.
fn until_the_end_mark(client: &mut JsonClient) -> (Vec<String>, Vec<u64>) {
    let (mut pages, mut events) = (Vec::new(), Vec::new());
    while let Some(line) = client.next() {
        let seq = line["seq"].as_u64().unwrap();
        match (line["kind"].as_str().unwrap(), line["item"].as_str()) {
            ("state", Some("begin")) => assert!(pages.is_empty()),
            ("state", Some("end")) => {
                assert_eq!(line["lost"], 0);
                assert!(events.iter().all(|event| *event < seq));
                return (pages, events);
            }
            ("state", _) => pages.push(line["virt_start"].as_str().unwrap().to_owned()),
            _ => events.push(seq),
        }
    }
    panic!("The trace ended before the end mark");
}

#[test]
fn all_that_is_live_comes_once_between_the_marks() {
    let fixture = Fixture::with_state(|| Box::new(Mappings::new(5_000, 7)));
    let pages: Vec<String> = (0..5_000).map(|page| format!("{:#x}", page << 12)).collect();
    let mut client = fixture.json("{\"state\":true}\n");
    // Events come in between.
    let (found, events) = thread::scope(|scope| {
        let reader = scope.spawn(|| until_the_end_mark(&mut client));
        for vector in 0..2_000 {
            fixture.interrupts(32, vector..vector + 1);
        }
        reader.join().unwrap()
    });
    assert_eq!(found, pages);
    assert!(events.is_sorted());
    // Naming the kind asks for it too; another client gets none.
    let mut named = fixture.json("{\"kinds\":[\"state\"]}\n");
    let other = fixture.json("\n");
    assert_eq!(until_the_end_mark(&mut named), (pages, Vec::new()));
    fixture.stop();
    assert!(named.next().is_none(), "what is live comes once");
    assert!(other.rest().iter().all(|line: &Value| line["kind"] != "state"));
}

#[test]
fn clients_that_ask_and_do_not_read_or_leave_cost_little() {
    let fixture = Fixture::with_state(|| Box::new(Mappings::new(1_000_000, 2_048)));
    let line = "{\"state\":true,\"format\":\"binary\"}\n";
    let before = resident();
    let mut silent: Vec<_> = (0..200).map(|_| fixture.raw(line.as_bytes())).collect();
    // Other clients begin to read and leave.
    for _ in 0..50 {
        let mut stream = fixture.raw(line.as_bytes());
        stream.read_exact(&mut [0; 10_000]).unwrap();
    }
    // A client that wants only events gets all of them.
    let mut reader = fixture.binary(&Subscription { kinds: vec![Kind::Interrupt], ..Subscription::default() });
    let (sender, received) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            while let Some(record) = reader.next_record().unwrap() {
                sender.send(record.seq.get()).unwrap();
            }
        });
        for burst in 0..20 {
            fixture.interrupts(32, 0..1_000);
            for n in 0..1_000 {
                assert_eq!(received.recv_timeout(PATIENCE), Ok(burst * 1_000 + n));
            }
        }
        // Each client that does not read has been sent something, but no more than its buffers take.
        silent.iter_mut().for_each(|stream| stream.read_exact(&mut [0; 100]).unwrap());
        let grown = resident().saturating_sub(before);
        assert!(grown < 200 << 20, "{grown} bytes for {} clients", silent.len());
        drop(silent);
        assert_eq!(fixture.stop().lost, 0);
    });
}
