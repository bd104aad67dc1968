//! The trace's binary format: a header, and then one record of fixed size for each event, little endian.
//!
//! `docs/trace.md` describes the fields of each kind.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first bytes of a binary stream.
pub const MAGIC: [u8; 8] = *b"VIOMMUTR";

/// The version of the header, of the record layout and of the meaning of the fields. A reader must not guess what
/// another version means. New kinds, and new values in fields that were 0, do not change it.
pub const VERSION: u32 = 1;

/// The first 64 bytes of a binary stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// Bytes of a [`Record`]. The header has the same size.
    pub record_size: U32,
    /// The clock of the times: 1, the number of `CLOCK_MONOTONIC`.
    pub clock: U32,
    /// The id of the traced process.
    pub pid: U32,
    /// The time when the trace was started.
    pub start_ns: U64,
    /// The offset from a time to nanoseconds since 1970 (`CLOCK_REALTIME`), as it was when the stream began.
    pub realtime_offset_ns: U64,
    /// The kinds that the client gets. Bit n is the kind with number n.
    pub kinds: U64,
    /// Events that the process lost before the stream began.
    pub lost: U64,
    /// The sequence number from which on events are new. Events of the backlog have lower ones.
    pub seq: U64,
}

/// One event.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Record {
    /// When the event was made: `CLOCK_MONOTONIC` in nanoseconds.
    pub time_ns: U64,
    /// The number of the event among the recorded events of the process, from 0 without gaps. A client sees gaps where
    /// its filter left events out, and where it read too slowly (then a `Lost` record fills the gap).
    pub seq: U64,
    /// A [`Kind`].
    pub kind: U16,
    /// Small values, whose meaning depends on the kind.
    pub small: [u8; 2],
    /// The endpoint that the event is about, or [`NO_ENDPOINT`].
    pub endpoint: U32,
    /// Values whose meaning depends on the kind.
    pub args: [U64; 5],
}

/// The [`Record::endpoint`] of an event that concerns no endpoint.
pub const NO_ENDPOINT: u32 = u32::MAX;

/// The kind of an event. The numbers are part of the format and are never reused for another kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// A peer connected or left.
    Session = 1,
    /// The driver accepted features.
    Features = 2,
    /// A region of guest memory was added or removed.
    Memory = 3,
    /// A virtqueue started or stopped.
    Queue = 4,
    /// The driver kicked a virtqueue.
    Kick = 5,
    /// A request was answered.
    Request = 6,
    /// The device, or the whole system, was reset.
    Reset = 7,
    /// An access of an endpoint faulted.
    Fault = 8,
    /// An endpoint accessed memory.
    Dma = 9,
    /// An interrupt was sent to the guest.
    Interrupt = 10,
    /// A device model completed a command.
    Command = 11,
    /// The driver wrote `bypass` in the configuration.
    Bypass = 12,
    /// A descriptor chain was no valid request.
    Malformed = 13,
    /// A device model changed its state.
    Device = 14,
    /// Events were lost.
    Lost = 15,
    /// A device model panicked, and the panic was caught.
    Panic = 16,
    /// A test had a request answered wrongly.
    Injected = 17,
    /// Pending faults were dropped, which waited for buffers of the driver.
    Undelivered = 18,
}

impl Kind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [Kind; 18] = [
        Kind::Session,
        Kind::Features,
        Kind::Memory,
        Kind::Queue,
        Kind::Kick,
        Kind::Request,
        Kind::Reset,
        Kind::Fault,
        Kind::Dma,
        Kind::Interrupt,
        Kind::Command,
        Kind::Bypass,
        Kind::Malformed,
        Kind::Device,
        Kind::Lost,
        Kind::Panic,
        Kind::Injected,
        Kind::Undelivered,
    ];

    /// The kind's bit in a set of kinds.
    pub const fn bit(self) -> u64 {
        1 << self as u16
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The kind with this number.
    pub fn from_number(number: u16) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// The name that JSON lines and filters use.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Session => "session",
            Kind::Features => "features",
            Kind::Memory => "memory",
            Kind::Queue => "queue",
            Kind::Kick => "kick",
            Kind::Request => "request",
            Kind::Reset => "reset",
            Kind::Fault => "fault",
            Kind::Dma => "dma",
            Kind::Interrupt => "interrupt",
            Kind::Command => "command",
            Kind::Bypass => "bypass",
            Kind::Malformed => "malformed",
            Kind::Device => "device",
            Kind::Lost => "lost",
            Kind::Panic => "panic",
            Kind::Injected => "injected",
            Kind::Undelivered => "undelivered",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_record_are_64_bytes() {
        assert_eq!(size_of::<Header>(), 64);
        assert_eq!(size_of::<Record>(), 64);
    }

    #[test]
    fn kinds_have_distinct_names_and_numbers() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind as u16), Some(kind));
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
            assert_eq!(Kind::ALL[kind as usize - 1], kind);
            assert_eq!(Kind::ALL.iter().filter(|k| k.name() == kind.name()).count(), 1);
        }
    }
}
