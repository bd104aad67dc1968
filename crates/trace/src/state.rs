//! What is live, for a client that asks for it: between two marks, among the events.

use std::cell::Cell;
use std::collections::VecDeque;

use crate::Event;
use crate::event::StateItem;
use crate::record::Record;
use crate::tracer::now_ns;

/// Reads what is live, for one client.
pub trait StateSource: Send {
    /// Passes the next items to `take`: a few, or none. Returns whether there is more. `now` says how many events were made. It
    /// is called at the instant that the first items show, before later ones are read, and at last when the trace has all
    /// that the items show. Each item comes with the result of the call before it.
    ///
    /// Must not wait: the clients of the trace would.
    fn step(&mut self, now: &dyn Fn() -> u64, take: &mut dyn FnMut(u64, Event)) -> bool;
}

/// Makes what reads for a client.
pub type MakeState = Box<dyn Fn() -> Box<dyn StateSource> + Send>;

/// Nothing is live where nobody says what is.
pub struct Nothing;

impl StateSource for Nothing {
    fn step(&mut self, now: &dyn Fn() -> u64, _: &mut dyn FnMut(u64, Event)) -> bool {
        now();
        false
    }
}

/// How far a client is with what is live.
pub struct Snapshot {
    /// `None`: all is read.
    source: Option<Box<dyn StateSource>>,
    /// What was read and is not sent: of one step, so that a client that does not read takes little memory.
    ready: VecDeque<Record>,
    /// Events that the client is to have before it gets what is ready.
    until: u64,
    /// Events before the first instant, once that was.
    begin: Option<u64>,
    /// Events since then that the client does not get.
    lost: u64,
}

impl Snapshot {
    /// Nothing is read yet.
    pub fn new(source: Box<dyn StateSource>) -> Self {
        Snapshot { source: Some(source), ready: VecDeque::new(), until: 0, begin: None, lost: 0 }
    }

    /// Whether there is something to read, and all that was read is sent.
    pub fn is_to_read(&self) -> bool {
        self.source.is_some() && self.ready.is_empty()
    }

    /// Reads a little; `made` is how many events were made, and `wanted` what the client gets.
    pub fn read(&mut self, made: impl Fn() -> u64, wanted: impl Fn(&Record) -> bool) {
        let Some(source) = &mut self.source else { return };
        let time = now_ns();
        let last = Cell::new(None);
        let now = || {
            let made = made();
            last.set(Some(made));
            made
        };
        let ready = &mut self.ready;
        let more = source.step(&now, &mut |seq, item| {
            let record = item.encode(time, seq);
            if wanted(&record) {
                ready.push_back(record);
            }
        });
        // Nothing was read, as others were at it.
        let Some(last) = last.get() else { return };
        self.until = last;
        if self.begin.is_none() {
            self.begin = Some(last);
            self.ready.push_front(mark(StateItem::Begin, 0).encode(time, last));
        }
        if !more {
            self.source = None;
            self.ready.push_back(mark(StateItem::End, 0).encode(time, last));
        }
    }

    /// How far the client may go before it gets what is ready.
    pub fn until(&self) -> Option<u64> {
        (!self.ready.is_empty()).then_some(self.until)
    }

    /// Takes the next that is ready for a client that has all events before `position`.
    pub fn next(&mut self, position: u64) -> Option<Record> {
        if position < self.until {
            return None;
        }
        let record = self.ready.pop_front()?;
        if self.is_over() {
            return Some(mark(StateItem::End, self.lost).encode(record.time_ns.get(), record.seq.get()));
        }
        Some(record)
    }

    /// The client does not get some events, of which the last has this number.
    pub fn lose(&mut self, seq: u64, count: u64) {
        if self.begin.is_some_and(|begin| seq >= begin) {
            self.lost += count;
        }
    }

    /// Whether the end mark was taken.
    pub fn is_over(&self) -> bool {
        self.source.is_none() && self.ready.is_empty()
    }
}

fn mark(item: StateItem, lost: u64) -> Event {
    Event::State {
        endpoint: None,
        item,
        bypass: false,
        domain: 0,
        flags: 0,
        virt_start: 0,
        virt_end: 0,
        phys_start: 0,
        tag: 0,
        lost,
    }
}
