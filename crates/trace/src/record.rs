//! The trace's binary format: a header, then one record of the same size for each event, little endian.
//!
//! `event` declares where in the record the fields of each kind are, and `docs/trace.md` shows it.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first bytes of a binary stream.
pub const MAGIC: [u8; 8] = *b"VIOMMUTR";

/// The version of the header, the layout of records and the meaning of fields. A reader must not guess at another
/// version. New kinds, and new values in fields that were 0, do not change the version.
pub const VERSION: u32 = 2;

/// The number of 64-bit words of a record.
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
    /// The clock of all times: 1, the number of `CLOCK_MONOTONIC`.
    pub clock: U32,
    /// The id of the process that is traced.
    pub pid: U32,
    /// The time at which the trace was started, ns.
    pub start_ns: U64,
    /// The difference `CLOCK_REALTIME` - `CLOCK_MONOTONIC`, ns, when the stream began: a time plus this is nanoseconds
    /// since 1970.
    pub realtime_offset_ns: U64,
    /// The kinds that the client gets: bit n is the kind with number n.
    pub kinds: U64,
    /// The number of events that the process had lost before the stream began.
    pub lost: U64,
    /// The sequence number of the first new event. Events of the backlog have lower ones.
    pub seq: U64,
}

impl Header {
    /// The same header in this version.
    pub fn upgrade(self) -> Header {
        Header { version: VERSION.into(), record_size: (size_of::<Record>() as u32).into(), ..self }
    }
}

/// The record of one event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Record {
    /// `CLOCK_MONOTONIC` in nanoseconds, taken when the event was made.
    pub time_ns: U64,
    /// The sequence number: the recorded events of the process, counted from 0 without gaps. A client sees gaps where
    /// its filter left events out, and where it read too slowly; then a `Lost` record stands in the gap.
    pub seq: U64,
    /// The number of a [`Kind`](crate::Kind).
    pub kind: U16,
    /// Fields of the kind: `s0` and `s1` of `docs/trace.md`.
    pub small: [u8; 2],
    /// The endpoint that the event is about, or [`NO_ENDPOINT`].
    pub endpoint: U32,
    /// Fields of the kind: `a0` to `a5` of `docs/trace.md`.
    pub args: [U64; 6],
}

/// [`Record::endpoint`] of an event about no endpoint.
pub const NO_ENDPOINT: u32 = u32::MAX;

impl Record {
    /// The record's words.
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
    /// Kinds whose layout has changed since, with their numbers in version 1.
    const FAULT: u16 = 8;
    const COMMAND: u16 = 11;

    /// The same record in this version.
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
                // Queue, identifier and status had 16 bits each. A pointer type of 3 meant plain addresses.
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
