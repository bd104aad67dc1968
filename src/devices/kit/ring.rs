//! Rings of entries in guest memory: commands that the driver appends and the device consumes, and completions the other
//! way round, which have a phase bit.
//!
//! Here are their indexes, which do no DMA: [`Span`] says what is to be read or written next. Whatever a driver writes to a
//! doorbell, there is no more to do than a ring has entries.

use serde::{Deserialize, Serialize};

/// Bytes of a command.
pub const COMMAND: u64 = 64;
/// Bytes of a completion.
pub const COMPLETION: u64 = 16;
/// The most entries of a ring.
pub const ENTRIES_MAX: u32 = 1 << 16;

/// Entries of a ring that are next to each other in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where the first one is.
    pub address: u64,
    /// How many there are.
    pub entries: usize,
    /// The phase bit that completions have to have; it is another one each time that the ring has come round.
    pub phase: bool,
}

/// A ring that the driver fills and the device empties. One entry always stays free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandRing {
    base: u64,
    size: u32,
    head: u32,
    tail: u32,
}

/// A ring that the device fills and the driver empties. One entry always stays free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionRing {
    base: u64,
    size: u32,
    tail: u32,
    head: u32,
    phase: bool,
}

/// Whether a ring can have so many entries, and these indexes.
fn is_possible(size: u32, indexes: [u32; 2]) -> bool {
    (2..=ENTRIES_MAX).contains(&size) && indexes.iter().all(|index| *index < size)
}

impl CommandRing {
    /// A new, empty ring of `size` entries, or `None` if it cannot have so many.
    pub fn new(base: u64, size: u32) -> Option<Self> {
        is_possible(size, [0, 0]).then_some(CommandRing { base, size, head: 0, tail: 0 })
    }

    /// Whether one that was loaded can be like this.
    pub fn is_possible(&self) -> bool {
        is_possible(self.size, [self.head, self.tail])
    }

    /// Its entries.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Up to where commands were consumed.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// Up to where there are commands.
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// The driver says up to where there are commands. Returns whether that can be: nothing changes if not.
    pub fn set_tail(&mut self, tail: u32) -> bool {
        let possible = tail < self.size;
        if possible {
            self.tail = tail;
        }
        possible
    }

    /// The commands to fetch next, at most `max`; `None` if there are none. There may be more behind them.
    pub fn next(&self, max: usize) -> Option<Span> {
        let end = if self.tail >= self.head { self.tail } else { self.size };
        let entries = max.min((end - self.head) as usize);
        let address = self.base.wrapping_add(u64::from(self.head) * COMMAND);
        (entries > 0).then_some(Span { address, entries, phase: false })
    }

    /// Some of what [`CommandRing::next`] gave were consumed.
    pub fn consume(&mut self, entries: usize) {
        self.head = (self.head + entries as u32) % self.size;
    }
}

impl CompletionRing {
    /// A new, empty ring of `size` entries, which are zeros as yet, or `None` if it cannot have so many.
    pub fn new(base: u64, size: u32) -> Option<Self> {
        is_possible(size, [0, 0]).then_some(CompletionRing { base, size, tail: 0, head: 0, phase: true })
    }

    /// Whether one that was loaded can be like this.
    pub fn is_possible(&self) -> bool {
        is_possible(self.size, [self.head, self.tail])
    }

    /// Its entries.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Up to where completions were posted.
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// Up to where the driver has consumed them, as far as is known.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// The driver says up to where it has consumed them. Returns whether that can be: nothing changes if not.
    pub fn set_head(&mut self, head: u32) -> bool {
        let possible = head < self.size;
        if possible {
            self.head = head;
        }
        possible
    }

    /// How many completions there is room for.
    pub fn free(&self) -> usize {
        ((self.head + self.size - self.tail - 1) % self.size) as usize
    }

    /// Where the next completions go, at most `max`; `None` if there is no room. There may be more elsewhere.
    pub fn next(&self, max: usize) -> Option<Span> {
        let entries = max.min(self.free()).min((self.size - self.tail) as usize);
        let address = self.base.wrapping_add(u64::from(self.tail) * COMPLETION);
        (entries > 0).then_some(Span { address, entries, phase: self.phase })
    }

    /// Some of what [`CompletionRing::next`] gave room for were posted.
    pub fn post(&mut self, entries: usize) {
        let tail = self.tail + entries as u32;
        self.phase ^= tail >= self.size;
        self.tail = tail % self.size;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn commands_come_in_order_and_in_pieces_where_the_ring_ends() {
        let mut ring = CommandRing::new(0x1000, 4).unwrap();
        assert_eq!(ring.next(8), None);
        assert!(ring.set_tail(3));
        assert_eq!(ring.next(2), Some(Span { address: 0x1000, entries: 2, phase: false }));
        ring.consume(2);
        assert!(ring.set_tail(1));
        assert_eq!(ring.next(8), Some(Span { address: 0x1080, entries: 2, phase: false }));
        ring.consume(2);
        assert_eq!(ring.next(8), Some(Span { address: 0x1000, entries: 1, phase: false }));
        ring.consume(1);
        assert!(!ring.set_tail(4));
        assert_eq!((ring.next(8), ring.head(), ring.tail()), (None, 1, 1));
    }

    #[test]
    fn completions_have_another_phase_each_time_round() {
        let mut ring = CompletionRing::new(0, 4).unwrap();
        assert_eq!(ring.next(8), Some(Span { address: 0, entries: 3, phase: true }));
        ring.post(3);
        assert_eq!((ring.free(), ring.next(8)), (0, None));
        assert!(ring.set_head(2));
        assert_eq!(ring.next(8), Some(Span { address: 0x30, entries: 1, phase: true }));
        ring.post(1);
        assert_eq!(ring.next(8), Some(Span { address: 0, entries: 1, phase: false }));
        assert!(!ring.set_head(4));
        assert_eq!((ring.head(), ring.tail()), (2, 0));
    }

    #[test]
    fn rings_have_two_entries_at_least() {
        for size in [0, 1, ENTRIES_MAX + 1, u32::MAX] {
            assert!(CommandRing::new(0, size).is_none() && CompletionRing::new(0, size).is_none(), "{size}");
        }
        assert!(CommandRing::new(0, 2).is_some() && CompletionRing::new(u64::MAX, ENTRIES_MAX).is_some());
    }

    proptest::proptest! {
        /// Whatever a driver writes, there is never more to fetch or to post than the ring has entries, and all inside of it.
        #[test]
        fn what_is_next_lies_inside_of_the_ring(
            size in 2u32..40,
            steps in proptest::collection::vec((proptest::prelude::any::<bool>(), 0u32..50, 0usize..50), 1..60),
        ) {
            let (mut commands, mut completions) =
                (CommandRing::new(0, size).unwrap(), CompletionRing::new(0, size).unwrap());
            for (rings, value, max) in steps {
                if rings {
                    commands.set_tail(value);
                    completions.set_head(value);
                } else {
                    let command = commands.next(max);
                    let completion = completions.next(max);
                    for (span, bytes) in [(command, COMMAND), (completion, COMPLETION)] {
                        let Some(span) = span else { continue };
                        proptest::prop_assert!(span.entries <= max && span.entries > 0);
                        proptest::prop_assert!(span.address + span.entries as u64 * bytes <= u64::from(size) * bytes);
                    }
                    commands.consume(command.map_or(0, |span| span.entries));
                    completions.post(completion.map_or(0, |span| span.entries));
                }
                proptest::prop_assert!(commands.is_possible() && completions.is_possible());
                proptest::prop_assert!(completions.free() < size as usize);
            }
        }
    }
}
