//! The collector: merges the threads' rings in the order of the sequence numbers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use crate::Event;
use crate::event::LossPlace;
use crate::record::{Record, WORDS};
use crate::ring::Consumer;
use crate::tracer::{Lane, TraceShared, now_ns};

/// The index of the sequence number among a record's words.
const SEQ_WORD: usize = std::mem::offset_of!(Record, seq) / 8;

/// The most events that one call of [`Collector::drain`] takes, so that clients and sockets are served in between.
const DRAIN_MAX: usize = 8192;

/// How often to poll for an event that has its number but is not in its ring yet. Its thread writes it within
/// nanoseconds, unless the kernel preempted the thread.
const LOOKS: usize = 200;

/// The result of [`Collector::drain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// All events were taken that had a number when the call returned, as far as this thread can see.
    All,
    /// There are more events.
    More,
    /// The next event has its number but is not in its ring yet.
    Waiting,
}

/// The one consumer of all rings of a trace.
pub struct Collector {
    shared: Arc<TraceShared>,
    rings: Vec<Consumer<WORDS>>,
    /// The number of the oldest event of each ring that is not empty, with the ring's index. Rebuilt in each round.
    oldest: BinaryHeap<Reverse<(u64, usize)>>,
    /// The collector's own lane: it must be able to report losses even when all other lanes are taken.
    own: Lane,
    /// The sequence number of the next event to take. A thread takes a number only if there is room for the event, so
    /// an event with that number always comes.
    next: u64,
}

impl Collector {
    /// A collector that has taken nothing yet.
    pub fn new(shared: Arc<TraceShared>) -> Self {
        let own = shared.own_lane();
        Collector { shared, rings: Vec::new(), oldest: BinaryHeap::new(), own, next: 0 }
    }

    /// The sequence number of the next event to take.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Passes events to `take` in the order of their numbers.
    pub fn drain(&mut self, mut take: impl FnMut(Record)) -> Drained {
        let mut left = DRAIN_MAX;
        let mut looks = 0;
        loop {
            let before = left;
            self.drain_once(&mut left, &mut take);
            if left == 0 {
                return Drained::More;
            }
            if self.shared.sequence.count() == self.next {
                if self.report_losses() {
                    continue;
                }
                self.end_idle_rings();
                return Drained::All;
            }
            if left == before {
                looks += 1;
                if looks > LOOKS {
                    return Drained::Waiting;
                }
                std::hint::spin_loop();
            }
        }
    }

    /// Ends rings that are not needed any more. All events were taken.
    fn end_idle_rings(&mut self) {
        self.shared.end_idle_rings();
        self.rings.retain(|ring| !ring.is_abandoned());
    }

    /// Takes all events up to the first whose number is missing, but at most `left`, which it counts down.
    fn drain_once(&mut self, left: &mut usize, take: &mut impl FnMut(Record)) {
        self.rings.extend(self.shared.new_rings());
        self.oldest.clear();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            ring.refresh();
            self.oldest.extend(number(ring).map(|number| Reverse((number, index))));
        }
        while let Some(Reverse((oldest, index))) = self.oldest.pop()
            && oldest == self.next
            && *left > 0
        {
            let ring = &mut self.rings[index];
            while *left > 0 && number(ring) == Some(self.next) {
                let Some(words) = ring.pop() else { break };
                take(Record::from_words(words));
                self.next += 1;
                *left -= 1;
            }
            ring.release();
            self.oldest.extend(number(ring).map(|number| Reverse((number, index))));
        }
    }

    /// Reports the losses of threads that have emitted nothing since. A thread reports its losses itself with its next
    /// event. Returns whether there were any.
    fn report_losses(&mut self) -> bool {
        let Collector { shared, rings, own, .. } = self;
        let mut any = false;
        let mut report = |count, since| {
            own.emit(shared, &Event::Lost { place: LossPlace::Ring, count, since });
            any = true;
            own.has_room()
        };
        // Without room for more, the rest is reported once these reports were taken.
        for ring in rings {
            ring.refresh();
            if number(ring).is_none()
                && let Some(loss) = ring.take_loss()
                && !report(loss.count, loss.since)
            {
                return true;
            }
        }
        let unreported = shared.take_unreported();
        if unreported > 0 {
            report(unreported, now_ns());
        }
        any
    }
}

/// The number of the oldest event in a ring; `None` if the ring is empty.
fn number(ring: &Consumer<WORDS>) -> Option<u64> {
    ring.peek(SEQ_WORD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tracer;
    use crate::event::Kind;

    fn all(collector: &mut Collector) -> Vec<Record> {
        let mut records = Vec::new();
        while collector.drain(|record| records.push(record)) != Drained::All {}
        records
    }

    /// The sums that a reader would get: events received, and events lost according to the Lost events.
    fn add_up(records: &[Record]) -> (u64, u64) {
        records.iter().fold((0, 0), |(received, lost), record| match Event::decode(record).unwrap() {
            Event::Lost { count, .. } => (received, lost + count),
            _ => (received + 1, lost),
        })
    }

    #[test]
    fn threads_are_merged_in_the_order_of_the_numbers() {
        let shared = TraceShared::new(1 << 12).unwrap();
        let mut collector = Collector::new(shared.clone());
        let threads: Vec<_> = (0..4u32)
            .map(|endpoint| {
                let tracer = Tracer::new(shared.clone());
                std::thread::spawn(move || {
                    for vector in 0..1000 {
                        tracer.emit(Event::Interrupt { endpoint: Some(endpoint), vector });
                    }
                })
            })
            .collect();
        let mut records = all(&mut collector);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        records.extend(all(&mut collector));
        assert!(records.iter().enumerate().all(|(n, record)| record.seq.get() == n as u64));
        for endpoint in 0..4 {
            let mine = records.iter().filter(|record| record.endpoint.get() == endpoint);
            assert!(mine.map(|record| record.args[0].get()).eq(0..1000));
        }
        let stats = shared.stats();
        assert_eq!((stats.emitted(), stats.of(Kind::Interrupt), stats.lost), (4000, 4000, 0));
    }

    #[test]
    fn a_thread_that_ends_leaves_its_ring_to_the_next() {
        let shared = TraceShared::new(1 << 12).unwrap();
        let mut collector = Collector::new(shared.clone());
        let emit = |endpoint| {
            let shared = shared.clone();
            std::thread::spawn(move || shared.emit(&Event::Panic { endpoint })).join().unwrap();
        };
        // First without taking the events in between, then with.
        (0..1000).for_each(emit);
        let mut records = all(&mut collector);
        for endpoint in 1000..2000 {
            emit(endpoint);
            records.extend(all(&mut collector));
        }
        assert_eq!(collector.rings.len(), 2, "the collector's and one more");
        assert!(records.iter().map(|record| record.endpoint.get()).eq(0..2000));
        assert_eq!((shared.stats().emitted(), shared.stats().lost), (2000, 0));
    }

    /// As without a client: the collector sleeps until a ring fills.
    #[test]
    fn threads_that_come_and_go_share_a_ring_though_nobody_watches() {
        let shared = TraceShared::new(64).unwrap();
        let mut collector = Collector::new(shared.clone());
        let (mut received, mut woken) = (0, 0);
        for _ in 0..1000 {
            let shared = shared.clone();
            let thread = std::thread::spawn({
                let shared = shared.clone();
                move || (0..5).for_each(|endpoint| shared.emit(&Event::Panic { endpoint }))
            });
            thread.join().unwrap();
            if shared.wake.read().is_ok() {
                woken += 1;
                received += all(&mut collector).len();
            }
        }
        received += all(&mut collector).len();
        assert_eq!((received, shared.stats().lost), (5000, 0));
        assert_eq!(collector.rings.len(), 2, "the collector's and one more");
        assert!(woken < 1000 / 5, "woken {woken} times");
    }

    #[test]
    fn rings_of_many_threads_go_when_they_have_ended() {
        let shared = TraceShared::new(64).unwrap();
        let mut collector = Collector::new(shared.clone());
        let many = |count: u32| {
            let at_once = std::sync::Barrier::new(count as usize);
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..count)
                    .map(|endpoint| {
                        let (shared, at_once) = (&shared, &at_once);
                        scope.spawn(move || {
                            shared.emit(&Event::Panic { endpoint });
                            at_once.wait();
                        })
                    })
                    .collect();
                // The end of the scope does not wait for the destructors of thread locals.
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            });
        };
        many(8);
        // Their events are still to be taken, then the rings can go.
        assert_eq!(all(&mut collector).len(), 8);
        assert_eq!(collector.rings.len(), 3, "the collector's and two for threads to come");
        many(4);
        assert_eq!(all(&mut collector).len(), 4);
        assert_eq!(collector.rings.len(), 3);
        let stats = shared.stats();
        assert_eq!((stats.emitted(), stats.of(Kind::Panic), stats.lost), (12, 12, 0));
    }

    /// While all lanes are taken, other threads lose their events, and the losses are reported. A thread that ends
    /// frees its lane.
    #[test]
    fn rings_have_a_limit() {
        // A ring of this size is a quarter of the limit. The collector's own is one of the four.
        let shared = TraceShared::new(1 << 20).unwrap();
        let mut collector = Collector::new(shared.clone());
        let (begin, end) = (std::sync::Barrier::new(6), std::sync::Barrier::new(6));
        std::thread::scope(|scope| {
            let threads = [0, 1, 2, 3, 4].map(|endpoint| {
                let (shared, begin, end) = (&shared, &begin, &end);
                scope.spawn(move || {
                    shared.emit(&Event::Panic { endpoint });
                    begin.wait();
                    end.wait();
                })
            });
            begin.wait();
            let records = all(&mut collector);
            assert_eq!((collector.rings.len(), add_up(&records)), (4, (3, 2)));
            end.wait();
            // The end of the scope does not wait for the destructors of thread locals.
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        shared.emit(&Event::Panic { endpoint: 5 });
        assert_eq!(add_up(&all(&mut collector)), (1, 0));
        let stats = shared.stats();
        assert_eq!((stats.emitted(), stats.lost), (6, 2));
    }

    #[test]
    fn a_loss_is_reported_where_it_happened_and_adds_up() {
        let shared = TraceShared::new(8).unwrap();
        let tracer = Tracer::new(shared.clone());
        let mut collector = Collector::new(shared.clone());
        let emit = |vectors: std::ops::Range<u16>| {
            vectors.for_each(|vector| tracer.emit(Event::Interrupt { endpoint: None, vector }));
        };
        emit(0..11);
        // The thread emits nothing after the loss, so the collector reports it.
        let first = all(&mut collector);
        assert_eq!(add_up(&first), (8, 3));
        assert!(matches!(Event::decode(&first[8]).unwrap(), Event::Lost { place: LossPlace::Ring, count: 3, .. }));
        assert!(all(&mut collector).is_empty());

        // The thread emits another event as soon as there is room, so it reports the loss itself, where the gap is.
        emit(11..21);
        let mut second = Vec::new();
        collector.drain_once(&mut 3, &mut |record| second.push(record));
        emit(21..22);
        second.extend(all(&mut collector));
        assert_eq!(second.len(), 8 + 1 + 1);
        assert!(matches!(Event::decode(&second[8]).unwrap(), Event::Lost { place: LossPlace::Ring, count: 2, .. }));
        assert_eq!(second[9].args[0].get(), 21);
        assert!(second.iter().map(|record| record.seq.get()).eq(9..19));
        let stats = shared.stats();
        assert_eq!((stats.emitted(), stats.lost), (22, 5));
    }

    #[test]
    fn an_event_of_a_thread_at_its_end_is_counted() {
        struct Last(std::cell::RefCell<Option<Tracer>>);
        impl Drop for Last {
            fn drop(&mut self) {
                if let Some(tracer) = self.0.take() {
                    tracer.emit(Event::Panic { endpoint: 1 });
                }
            }
        }
        thread_local!(static LAST: Last = const { Last(std::cell::RefCell::new(None)) });
        let shared = TraceShared::new(8).unwrap();
        let tracer = Tracer::new(shared.clone());
        let thread = std::thread::spawn(move || {
            // The order in which the thread's locals are destroyed is not fixed. In both orders the event is recorded
            // or counted.
            LAST.with(|last| *last.0.borrow_mut() = Some(tracer.clone()));
            tracer.emit(Event::Panic { endpoint: 0 });
        });
        thread.join().unwrap();
        let mut collector = Collector::new(shared.clone());
        let mut records = all(&mut collector);
        records.extend(all(&mut collector));
        let (received, lost) = add_up(&records);
        assert_eq!(received + lost, 2);
        assert_eq!(shared.stats().emitted(), 2);
        assert_eq!(shared.stats().lost, lost);
    }

    #[test]
    fn one_thread_may_emit_to_several_traces() {
        let traces: Vec<_> = (0..3).map(|_| TraceShared::new(16).unwrap()).collect();
        for n in 0..5 {
            for shared in &traces {
                shared.emit(&Event::Panic { endpoint: n });
            }
        }
        for shared in traces {
            let mut collector = Collector::new(shared);
            assert_eq!(all(&mut collector).len(), 5);
        }
    }
}
