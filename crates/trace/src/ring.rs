//! How events leave the thread that made them: a ring for each thread, and one sequence of numbers for all.
//!
//! A ring has one producer and one consumer. Its slots are arrays of relaxed atomics, and the positions order the
//! accesses to them. A mistake here could at worst show a torn event, but is never undefined behaviour.

use std::sync::Arc;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Keeps what different threads write on different cache lines: two lines, since CPUs prefetch them in pairs.
#[repr(align(128))]
struct Apart<T>(T);

/// A ring of slots of `WORDS` 64-bit words. Positions count from 0 and are taken modulo the number of slots.
struct Ring<const WORDS: usize> {
    slots: Box<[[AtomicU64; WORDS]]>,
    /// The consumer has read everything before this position.
    head: Apart<AtomicUsize>,
    /// The producer has written everything before this position.
    tail: Apart<AtomicUsize>,
    /// Events that found the ring full, and that no `lost` event reports yet.
    lost: Apart<AtomicU64>,
    /// The time at which the first of them was lost.
    lost_since: AtomicU64,
}

/// The writing end, owned by one thread at a time.
pub struct Producer<const WORDS: usize> {
    ring: Arc<Ring<WORDS>>,
    tail: usize,
    /// `head` as it was last read. The real one is this or later.
    head: usize,
}

/// The reading end, owned by the collector.
pub struct Consumer<const WORDS: usize> {
    ring: Arc<Ring<WORDS>>,
    head: usize,
    /// `tail` as it was last read. The real one is this or later.
    tail: usize,
}

/// A number of events that were lost in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The number of events.
    pub count: u64,
    /// The time at which the first of them was lost, as passed to [`Producer::lose`].
    pub since: u64,
}

/// Makes a ring of `slots` slots, a power of two of at least 2.
pub fn ring<const WORDS: usize>(slots: usize) -> (Producer<WORDS>, Consumer<WORDS>) {
    assert!(slots.is_power_of_two() && slots >= 2, "A ring has a power of two of slots, not {slots}");
    let ring = Arc::new(Ring {
        slots: (0..slots).map(|_| std::array::from_fn(|_| AtomicU64::new(0))).collect(),
        head: Apart(AtomicUsize::new(0)),
        tail: Apart(AtomicUsize::new(0)),
        lost: Apart(AtomicU64::new(0)),
        lost_since: AtomicU64::new(0),
    });
    (Producer { ring: ring.clone(), tail: 0, head: 0 }, Consumer { ring, head: 0, tail: 0 })
}

impl<const WORDS: usize> Ring<WORDS> {
    fn slot(&self, position: usize) -> &[AtomicU64; WORDS] {
        &self.slots[position & (self.slots.len() - 1)]
    }

    fn take_loss(&self) -> Option<Loss> {
        if self.lost.0.load(Ordering::Relaxed) == 0 {
            return None;
        }
        // Pairs with the release in `lose`. The producer sets `lost_since` before it makes `lost` nonzero again, so a
        // consumer that takes the count can at worst read the time of an even newer loss.
        let since = self.lost_since.load(Ordering::Relaxed);
        match self.lost.0.swap(0, Ordering::AcqRel) {
            0 => None,
            count => Some(Loss { count, since }),
        }
    }
}

impl<const WORDS: usize> Producer<WORDS> {
    /// Whether the ring can take `wanted` more events.
    #[inline]
    pub fn room(&mut self, wanted: usize) -> bool {
        let slots = self.ring.slots.len();
        if slots - self.tail.wrapping_sub(self.head) >= wanted {
            return true;
        }
        // Acquire: the consumer's reads of a slot come before our next write to it.
        self.head = self.ring.head.0.load(Ordering::Acquire);
        slots - self.tail.wrapping_sub(self.head) >= wanted
    }

    /// How many more events the ring can take now.
    pub fn free(&mut self) -> usize {
        self.head = self.ring.head.0.load(Ordering::Acquire);
        self.ring.slots.len() - self.tail.wrapping_sub(self.head)
    }

    /// Writes one event. The caller must know from [`Producer::room`] that there is room for it.
    #[inline]
    pub fn push(&mut self, event: [u64; WORDS]) {
        for (word, value) in self.ring.slot(self.tail).iter().zip(event) {
            word.store(value, Ordering::Relaxed);
        }
        self.tail = self.tail.wrapping_add(1);
        // Release: whoever sees the new position sees the event.
        self.ring.tail.0.store(self.tail, Ordering::Release);
    }

    /// Whether the last event made the ring half full or fuller, so that the consumer is to be woken. It is checked
    /// once in a quarter of a ring, so that it costs next to nothing.
    #[inline]
    pub fn is_filling(&mut self) -> bool {
        let slots = self.ring.slots.len();
        if self.tail & (slots / 4).max(1).wrapping_sub(1) != 0 {
            return false;
        }
        self.head = self.ring.head.0.load(Ordering::Acquire);
        self.tail.wrapping_sub(self.head) >= slots / 2
    }

    /// Whether everything in the ring was taken, and each loss.
    pub fn is_idle(&mut self) -> bool {
        self.free() == self.ring.slots.len() && !self.has_loss()
    }

    /// Whether there is a loss that neither end has taken.
    #[inline]
    pub fn has_loss(&self) -> bool {
        self.ring.lost.0.load(Ordering::Relaxed) != 0
    }

    /// Counts an event for which there was no room, at the time `now`.
    #[cold]
    pub fn lose(&mut self, now: u64) {
        if self.ring.lost.0.load(Ordering::Relaxed) == 0 {
            self.ring.lost_since.store(now, Ordering::Relaxed);
        }
        self.ring.lost.0.fetch_add(1, Ordering::Release);
    }

    /// Takes the events lost since the last loss was taken, by either end.
    #[inline]
    pub fn take_loss(&mut self) -> Option<Loss> {
        self.ring.take_loss()
    }
}

impl<const WORDS: usize> Consumer<WORDS> {
    /// Whether nobody has the writing end any more.
    pub fn is_abandoned(&self) -> bool {
        Arc::strong_count(&self.ring) == 1
    }

    /// Looks for new events.
    pub fn refresh(&mut self) {
        // Acquire: pairs with the release in `push`.
        self.tail = self.ring.tail.0.load(Ordering::Acquire);
    }

    /// One word of the oldest event that the last [`Consumer::refresh`] found, without taking the event.
    pub fn peek(&self, word: usize) -> Option<u64> {
        (self.head != self.tail).then(|| self.ring.slot(self.head)[word].load(Ordering::Relaxed))
    }

    /// Takes the oldest event that the last [`Consumer::refresh`] found. Its slot stays occupied until
    /// [`Consumer::release`].
    pub fn pop(&mut self) -> Option<[u64; WORDS]> {
        if self.head == self.tail {
            return None;
        }
        let slot = self.ring.slot(self.head);
        let event = std::array::from_fn(|word| slot[word].load(Ordering::Relaxed));
        self.head = self.head.wrapping_add(1);
        Some(event)
    }

    /// Returns the slots of all events taken so far to the producer.
    pub fn release(&mut self) {
        // Release: our reads come before the producer's next writes. Pairs with `room`.
        self.ring.head.0.store(self.head, Ordering::Release);
    }

    /// Takes the events that the producer lost since its last event, if it has not reported them itself. The ring must
    /// be empty, since events in it are older than the loss.
    pub fn take_loss(&mut self) -> Option<Loss> {
        self.ring.take_loss()
    }
}

/// The number of the next event. The top bit says whether the collector sleeps until it is woken.
///
/// Both are in one word, so that a producer, which takes a number for each event anyway, learns at no cost whether to
/// wake the collector. If it takes its number before the collector wants to sleep, the collector sees that an event is
/// on its way. If it takes it after that, the producer sees that the collector sleeps.
pub struct Sequence(Apart<AtomicU64>);

const ASLEEP: u64 = 1 << 63;

impl Sequence {
    /// A sequence that starts at 0, with the collector awake.
    pub fn new() -> Self {
        Sequence(Apart(AtomicU64::new(0)))
    }

    /// Takes a number. Also returns whether the collector must be woken once the event is in its ring.
    #[inline]
    pub fn take(&self) -> (u64, bool) {
        let word = self.0.0.fetch_add(1, Ordering::Relaxed);
        (word & !ASLEEP, word & ASLEEP != 0)
    }

    /// The number of numbers that were taken.
    pub fn count(&self) -> u64 {
        self.0.0.load(Ordering::Relaxed) & !ASLEEP
    }

    /// Puts the collector, which has all events before `next`, to sleep. Returns false if it must not sleep, since an
    /// event is on its way.
    pub fn try_sleep(&self, next: u64) -> bool {
        self.0.0.compare_exchange(next, next | ASLEEP, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Ends the collector's sleep. Returns true to the one caller that ended it, which then has to wake it.
    pub fn end_sleep(&self) -> bool {
        self.0.0.fetch_and(!ASLEEP, Ordering::Relaxed) & ASLEEP != 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_as_they_went_in_and_a_full_ring_has_no_room() {
        let (mut producer, mut consumer) = ring::<2>(4);
        for round in 0..10u64 {
            for n in 0..4 {
                assert!(producer.room(1));
                producer.push([round, n]);
            }
            assert!(!producer.room(1));
            consumer.refresh();
            assert_eq!(consumer.peek(0), Some(round));
            for n in 0..4 {
                assert_eq!(consumer.pop(), Some([round, n]));
            }
            assert_eq!(consumer.pop(), None);
            assert!(!producer.room(1), "slots are given back by release only");
            consumer.release();
            assert!(producer.room(4));
            assert!(!producer.room(5));
        }
    }

    #[test]
    fn a_loss_is_taken_once() {
        let (mut producer, mut consumer) = ring::<1>(2);
        assert_eq!(consumer.take_loss(), None);
        producer.lose(70);
        producer.lose(80);
        assert_eq!(consumer.take_loss(), Some(Loss { count: 2, since: 70 }));
        assert_eq!(producer.take_loss(), None);
        producer.lose(90);
        assert_eq!(producer.take_loss(), Some(Loss { count: 1, since: 90 }));
        assert_eq!(consumer.take_loss(), None);
    }

    #[test]
    fn the_consumer_is_called_when_the_ring_fills_and_only_then() {
        let (mut producer, mut consumer) = ring::<1>(16);
        let mut calls = Vec::new();
        for n in 0..16 {
            producer.push([n]);
            if producer.is_filling() {
                calls.push(n);
            }
        }
        assert_eq!(calls, [7, 11, 15]);
        consumer.refresh();
        while consumer.pop().is_some() {}
        consumer.release();
        assert!(producer.room(1));
        producer.push([0]);
        assert!(!producer.is_filling());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Mutex;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    /// More events than slots, two words each: no event is torn, none comes twice or out of order, and every one is
    /// either received or counted as lost.
    #[test]
    fn loom_ring_delivers_or_counts() {
        loom::model(|| {
            let (mut producer, mut consumer) = ring::<2>(2);
            let sender = thread::spawn(move || {
                for n in 1..=3u64 {
                    if producer.room(1) {
                        producer.push([n, !n]);
                    } else {
                        producer.lose(n);
                    }
                }
            });
            let mut received = Vec::new();
            let drain = |consumer: &mut Consumer<2>, received: &mut Vec<u64>| {
                consumer.refresh();
                while let Some([n, check]) = consumer.pop() {
                    assert_eq!(check, !n, "a torn event");
                    received.push(n);
                }
                consumer.release();
            };
            drain(&mut consumer, &mut received);
            sender.join().unwrap();
            drain(&mut consumer, &mut received);
            assert!(received.is_sorted_by(|a, b| a < b));
            let lost = consumer.take_loss().map_or(0, |loss| loss.count);
            assert_eq!(received.len() as u64 + lost, 3);
        });
    }

    /// Both ends take losses, and each loss is taken by exactly one of them.
    #[test]
    fn loom_losses_are_taken_once() {
        loom::model(|| {
            let (mut producer, mut consumer) = ring::<1>(2);
            let sender = thread::spawn(move || {
                producer.lose(1);
                producer.lose(2);
                producer.take_loss().map_or(0, |loss| loss.count)
            });
            let mut taken = consumer.take_loss().map_or(0, |loss| loss.count);
            taken += sender.join().unwrap();
            taken += consumer.take_loss().map_or(0, |loss| loss.count);
            assert_eq!(taken, 2);
        });
    }

    /// A thread that ends hands its end of the ring on to the next. The consumer sees all events, in ascending order.
    #[test]
    fn loom_a_ring_is_handed_on() {
        loom::model(|| {
            let sequence = Arc::new(Sequence::new());
            let (producer, mut consumer) = ring::<2>(2);
            let idle = Arc::new(Mutex::new(Some(producer)));
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (sequence, idle) = (sequence.clone(), idle.clone());
                    thread::spawn(move || {
                        // While the other thread has it, this one does without, like a thread that finds no ring.
                        let Some(mut producer) = idle.lock().unwrap().take() else { return 0 };
                        let mut emitted = 0;
                        if producer.room(1) {
                            let (number, _) = sequence.take();
                            producer.push([number, !number]);
                            emitted = 1;
                        }
                        *idle.lock().unwrap() = Some(producer);
                        emitted
                    })
                })
                .collect();
            let mut received = Vec::new();
            let mut drain = || {
                consumer.refresh();
                while let Some([number, check]) = consumer.pop() {
                    assert_eq!(check, !number, "a torn event");
                    received.push(number);
                }
                consumer.release();
            };
            drain();
            let emitted: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
            drain();
            assert_eq!(received, (0..emitted).collect::<Vec<_>>());
        });
    }

    /// The collector never sleeps through an event: some thread wakes it.
    #[test]
    fn loom_no_wake_is_missed() {
        loom::model(|| {
            let sequence = Arc::new(Sequence::new());
            let woken = Arc::new(AtomicBool::new(false));
            let senders: Vec<_> = (0..2)
                .map(|_| {
                    let (mut producer, consumer) = ring::<1>(2);
                    let (sequence, woken) = (sequence.clone(), woken.clone());
                    let sender = thread::spawn(move || {
                        let (number, wake) = sequence.take();
                        producer.push([number]);
                        if wake && sequence.end_sleep() {
                            woken.store(true, Ordering::Release);
                        }
                    });
                    (sender, consumer)
                })
                .collect();
            let (threads, mut consumers): (Vec<_>, Vec<_>) = senders.into_iter().unzip();
            let mut seen = 0;
            let mut drain = |seen: &mut u64| {
                for consumer in &mut consumers {
                    consumer.refresh();
                    *seen += consumer.pop().is_some() as u64;
                }
            };
            drain(&mut seen);
            let asleep = sequence.try_sleep(seen);
            for thread in threads {
                thread.join().unwrap();
            }
            let before = seen;
            drain(&mut seen);
            assert_eq!(seen, 2);
            if asleep && seen != before {
                assert!(woken.load(Ordering::Acquire), "asleep with events in the rings");
            }
        });
    }
}
