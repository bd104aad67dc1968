//! Rings of entries in guest memory. The driver appends commands and the device consumes them. The device appends
//! completions, which have a phase bit, and the driver consumes them.
//!
//! This module keeps the indexes and does no DMA. A [`RingSpan`] says what to read or write next. Whatever a driver
//! writes to a doorbell, there is never more to do than the ring has entries.

use serde::{Deserialize, Serialize};

/// Bytes of a command.
pub const COMMAND: u64 = 64;
/// Bytes of a completion.
pub const COMPLETION: u64 = 16;
/// The most entries of a ring.
pub const ENTRIES_MAX: u32 = 1 << 16;

/// Entries of a ring that are adjacent in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSpan {
    /// The address of the first one.
    pub address: u64,
    /// The number of entries.
    pub entries: usize,
    /// The phase bit of completions. It flips each time that the ring wraps.
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

/// Whether a ring of `size` entries with these indexes is possible.
fn is_possible(size: u32, indexes: [u32; 2]) -> bool {
    (2..=ENTRIES_MAX).contains(&size) && indexes.iter().all(|index| *index < size)
}

impl CommandRing {
    /// A new, empty ring of `size` entries at `base`; `None` unless `size` is 2 to [`ENTRIES_MAX`].
    pub fn new(base: u64, size: u32) -> Option<Self> {
        is_possible(size, [0, 0]).then_some(CommandRing { base, size, head: 0, tail: 0 })
    }

    /// Whether a ring that was loaded is possible.
    pub fn is_possible(&self) -> bool {
        is_possible(self.size, [self.head, self.tail])
    }

    /// The number of its entries.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The index of the next command to consume.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// The index after the last command.
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// The driver sets the tail. Returns false, and changes nothing, if the ring has no such index.
    pub fn set_tail(&mut self, tail: u32) -> bool {
        let possible = tail < self.size;
        if possible {
            self.tail = tail;
        }
        possible
    }

    /// The commands to fetch next, at most `max`; `None` if there are none. More may follow at the start of the ring.
    pub fn next(&self, max: usize) -> Option<RingSpan> {
        let end = if self.tail >= self.head { self.tail } else { self.size };
        let entries = max.min((end - self.head) as usize);
        let address = self.base.wrapping_add(u64::from(self.head) * COMMAND);
        (entries > 0).then_some(RingSpan { address, entries, phase: false })
    }

    /// Notes that the first `entries` of what [`CommandRing::next`] returned were consumed.
    pub fn consume(&mut self, entries: usize) {
        self.head = (self.head + entries as u32) % self.size;
    }
}

impl CompletionRing {
    /// A new, empty ring of `size` entries at `base`, which the driver has zeroed; `None` unless `size` is 2 to
    /// [`ENTRIES_MAX`].
    pub fn new(base: u64, size: u32) -> Option<Self> {
        is_possible(size, [0, 0]).then_some(CompletionRing { base, size, tail: 0, head: 0, phase: true })
    }

    /// Whether a ring that was loaded is possible.
    pub fn is_possible(&self) -> bool {
        is_possible(self.size, [self.head, self.tail])
    }

    /// The number of its entries.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The index of the next completion to post.
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// The index of the next completion that the driver consumes, as far as it has told.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// The driver sets the head. Returns false, and changes nothing, if the ring has no such index.
    pub fn set_head(&mut self, head: u32) -> bool {
        let possible = head < self.size;
        if possible {
            self.head = head;
        }
        possible
    }

    /// The number of completions for which there is room.
    pub fn free(&self) -> usize {
        ((self.head + self.size - self.tail - 1) % self.size) as usize
    }

    /// The entries for the next completions, at most `max`; `None` if there is no room. More may follow at the start of
    /// the ring.
    pub fn next(&self, max: usize) -> Option<RingSpan> {
        let entries = max.min(self.free()).min((self.size - self.tail) as usize);
        let address = self.base.wrapping_add(u64::from(self.tail) * COMPLETION);
        (entries > 0).then_some(RingSpan { address, entries, phase: self.phase })
    }

    /// Notes that the first `entries` of what [`CompletionRing::next`] returned were posted.
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
        assert_eq!(ring.next(2), Some(RingSpan { address: 0x1000, entries: 2, phase: false }));
        ring.consume(2);
        assert!(ring.set_tail(1));
        assert_eq!(ring.next(8), Some(RingSpan { address: 0x1080, entries: 2, phase: false }));
        ring.consume(2);
        assert_eq!(ring.next(8), Some(RingSpan { address: 0x1000, entries: 1, phase: false }));
        ring.consume(1);
        assert!(!ring.set_tail(4));
        assert_eq!((ring.next(8), ring.head(), ring.tail()), (None, 1, 1));
    }

    #[test]
    fn the_phase_of_completions_flips_at_each_wrap() {
        let mut ring = CompletionRing::new(0, 4).unwrap();
        assert_eq!(ring.next(8), Some(RingSpan { address: 0, entries: 3, phase: true }));
        ring.post(3);
        assert_eq!((ring.free(), ring.next(8)), (0, None));
        assert!(ring.set_head(2));
        assert_eq!(ring.next(8), Some(RingSpan { address: 0x30, entries: 1, phase: true }));
        ring.post(1);
        assert_eq!(ring.next(8), Some(RingSpan { address: 0, entries: 1, phase: false }));
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
        /// Whatever a driver writes, there is never more to fetch or to post than the ring has entries, and all of it
        /// is inside the ring.
        #[test]
        fn the_next_entries_are_inside_the_ring(
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
