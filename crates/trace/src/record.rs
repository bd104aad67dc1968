//! The trace's binary format: a header, then one record of the same size for each event, little endian.
//!
//! `event` declares where in the record the fields of each kind are, and `docs/trace.md` shows it.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a binary stream starts with.
pub const MAGIC: [u8; 8] = *b"VIOMMUTR";

/// The version of the header, of the record layout and of the meaning of the fields. A reader that is told another
/// version must not guess. New kinds, and new values in fields that were 0, do not change it.
pub const VERSION: u32 = 2;

/// 64-bit words of a record.
pub const WORDS: usize = size_of::<Record>() / 8;

/// The first 64 bytes of a binary stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// Bytes of a [`Record`].
    pub record_size: U32,
    /// Which clock the times are of: 1, the number of `CLOCK_MONOTONIC`.
    pub clock: U32,
    /// The process that is traced.
    pub pid: U32,
    /// When the trace was started.
    pub start_ns: U64,
    /// What to add to a time to get nanoseconds since 1970 (`CLOCK_REALTIME`), as it was when the stream began.
    pub realtime_offset_ns: U64,
    /// The kinds that the client gets: bit n is the kind with number n.
    pub kinds: U64,
    /// Events that the process lost before the stream began.
    pub lost: U64,
    /// The sequence number from which on the client gets new events; those of the backlog have lower ones.
    pub seq: U64,
}

impl Header {
    /// The header of this version that says the same.
    pub fn upgrade(self) -> Header {
        Header { version: VERSION.into(), record_size: (size_of::<Record>() as u32).into(), ..self }
    }
}

/// One event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Record {
    /// `CLOCK_MONOTONIC` in nanoseconds, taken when the event was made.
    pub time_ns: U64,
    /// Counts the recorded events of the process from 0, without gaps. A client sees gaps where its filter left events
    /// out and where it read too slowly (then a `Lost` record fills the gap).
    pub seq: U64,
    /// A [`Kind`](crate::Kind).
    pub kind: U16,
    /// Small values of the kind.
    pub small: [u8; 2],
    /// The endpoint that the event is about, or [`NO_ENDPOINT`].
    pub endpoint: U32,
    /// Values of the kind.
    pub args: [U64; 6],
}

/// [`Record::endpoint`] of an event that is about no endpoint.
pub const NO_ENDPOINT: u32 = u32::MAX;

impl Record {
    /// Its words, each as a number.
    #[inline]
    pub(crate) fn words(self) -> [u64; WORDS] {
        let words: [U64; WORDS] = zerocopy::transmute!(self);
        words.map(U64::get)
    }

    /// The record of these words.
    #[inline]
    pub(crate) fn from_words(words: [u64; WORDS]) -> Record {
        let words: [U64; WORDS] = words.map(U64::new);
        zerocopy::transmute!(words)
    }
}

/// A record of version 1: 64 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Record1 {
    time_ns: U64,
    seq: U64,
    kind: U16,
    small: [u8; 2],
    endpoint: U32,
    args: [U64; 5],
}

impl Record1 {
    /// The numbers of the kinds whose layout changed. As they are of version 1, they are not those of the declaration.
    const FAULT: u16 = 8;
    const COMMAND: u16 = 11;

    /// The record of this version that says the same.
    pub fn upgrade(self) -> Record {
        let Record1 { time_ns, seq, kind, mut small, endpoint, args } = self;
        let [a, b, c, d, e] = args.map(U64::get);
        let args = match kind.get() {
            Self::FAULT => {
                let has_domain = u64::from(small[1] >> 7);
                small[1] &= 0x7f;
                [a, b & 0xffff_ffff | has_domain << 32, c, d, e, 0]
            }
            Self::COMMAND => {
                // Queue, identifier and status had 16 bits each. A pointer of 3 said that what follows are plain addresses.
                let (queue, id, status) = (a & 0xffff, a >> 16 & 0xffff, a >> 32 & 0xffff);
                let pointer = Some(a >> 48 & 0xff).filter(|pointer| *pointer != 3).unwrap_or(0);
                [id, queue | status << 32, e, d & 0xffff_ffff | pointer << 32, b, c]
            }
            _ => [a, b, c, d, e, 0],
        };
        Record { time_ns, seq, kind, small, endpoint, args: args.map(U64::new) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_are_those_of_the_format() {
        assert_eq!((size_of::<Header>(), size_of::<Record>(), size_of::<Record1>()), (64, 72, 64));
        assert_eq!(WORDS, 9);
    }
}
