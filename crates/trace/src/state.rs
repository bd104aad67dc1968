//! The live state, for a client that asks for it: `state` events between two marks, among the other events.

use std::cell::Cell;
use std::collections::VecDeque;

use crate::Event;
use crate::event::StateItem;
use crate::record::Record;
use crate::tracer::now_ns;

/// Reads the live state for one client, step by step.
pub trait StateSource: Send {
    /// Passes the next items to `take`: a few, or none. Returns whether there is more. `now` returns the number of
    /// events made so far. The source calls it at the instant that the first items show, before it reads later ones,
    /// and at the end, when the trace has all that the items show. Each item comes with the result of the last call.
    ///
    /// Must not wait, since all clients of the trace would. A step that would have to wait calls neither, and is tried
    /// again.
    fn step(&mut self, now: &dyn Fn() -> u64, take: &mut dyn FnMut(u64, Event)) -> bool;
}

/// Makes a source for each client.
pub type MakeState = Box<dyn Fn() -> Box<dyn StateSource> + Send>;

/// The source of a trace for which none was set: nothing is live.
pub struct Nothing;

impl StateSource for Nothing {
    fn step(&mut self, now: &dyn Fn() -> u64, _: &mut dyn FnMut(u64, Event)) -> bool {
        now();
        false
    }
}

/// A client's progress with the live state.
pub struct Snapshot {
    /// `None` once everything was read.
    source: Option<Box<dyn StateSource>>,
    /// Everything was read, and the end mark is not made yet.
    ending: bool,
    /// Records that were read and not sent. They are of one step, so that a client that does not read takes little
    /// memory.
    ready: VecDeque<Record>,
    /// The position that the client must reach before it gets `ready`.
    until: u64,
    /// The number of events before the first instant; `None` before the first step.
    begin: Option<u64>,
    /// The number of events since then that the client has missed.
    lost: u64,
}

impl Snapshot {
    /// A snapshot of which nothing was read yet.
    pub fn new(source: Box<dyn StateSource>) -> Self {
        Snapshot { source: Some(source), ending: false, ready: VecDeque::new(), until: 0, begin: None, lost: 0 }
    }

    /// Whether the next step is due: there is more to read, and everything that was read is sent.
    pub fn is_to_read(&self) -> bool {
        self.source.is_some() && self.ready.is_empty()
    }

    /// Reads a step. Returns false if that was not possible now. `made` gives the number of events made so far, and
    /// `wanted` whether the client gets a record.
    pub fn read(&mut self, made: impl Fn() -> u64, wanted: impl Fn(&Record) -> bool) -> bool {
        let Some(source) = &mut self.source else { return false };
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
        // The source did not call `now`: it would have had to wait.
        let Some(last) = last.get() else { return false };
        self.until = last;
        if self.begin.is_none() {
            self.begin = Some(last);
            self.ready.push_front(mark(StateItem::Begin, 0).encode(time, last));
        }
        if !more {
            self.source = None;
            self.ending = true;
        }
        true
    }

    /// Whether everything was read and [`Snapshot::end`] is to be called.
    pub fn is_ending(&self) -> bool {
        self.ending
    }

    /// Makes the end mark, if everything was read. The history must have the first `made` events, and `lost` events for
    /// all losses before that: a thread's loss is reported only with its next event, or when its ring is found empty.
    pub fn end(&mut self, made: u64) {
        if std::mem::take(&mut self.ending) {
            self.until = made;
            self.ready.push_back(mark(StateItem::End, 0).encode(now_ns(), made));
        }
    }

    /// The position at which the client gets the records that are ready; `None` if none are.
    pub fn until(&self) -> Option<u64> {
        (!self.ready.is_empty()).then_some(self.until)
    }

    /// Takes the next ready record for a client that has all events before `position`.
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

    /// Notes that the client has missed `count` events, the last of which has the number `seq`.
    pub fn lose(&mut self, seq: u64, count: u64) {
        if self.begin.is_some_and(|begin| seq >= begin) {
            self.lost += count;
        }
    }

    /// Whether the end mark was taken.
    pub fn is_over(&self) -> bool {
        self.source.is_none() && !self.ending && self.ready.is_empty()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_mark_waits_for_the_news_of_losses() {
        let item = |record: Record| match Event::decode(&record).unwrap() {
            Event::State { item, lost, .. } => (item, lost, record.seq.get()),
            other => panic!("{other:?}"),
        };
        let mut snapshot = Snapshot::new(Box::new(Nothing));
        assert!(snapshot.read(|| 5, |_| true));
        assert_eq!(snapshot.next(5).map(item), Some((StateItem::Begin, 0, 5)));
        assert!(snapshot.next(5).is_none() && snapshot.is_ending() && !snapshot.is_over());
        snapshot.lose(6, 3);
        snapshot.end(7);
        assert!(snapshot.next(6).is_none(), "before the news of the loss");
        assert_eq!(snapshot.next(7).map(item), Some((StateItem::End, 3, 7)));
        assert!(snapshot.is_over());
    }
}
