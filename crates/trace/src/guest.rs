//! Lines of the guest's trace agent, one for each event of the guest's kernel, and the same lines in a merged trace.

use crate::event::key;
use crate::line::{put_head, put_key};
use crate::members::{Members, Value};
use crate::put;

/// The version of the guest's lines that this version reads.
pub const GUEST_VERSION: u32 = 1;

/// The kinds of the guest's lines, and their members other than an event's own fields.
pub mod guest_key {
    /// The first line of a stream; [`SOURCE`] distinguishes the guest's from the device's.
    pub const HELLO: &str = "hello";
    /// An event of the guest's kernel.
    pub const GUEST: &str = "guest";
    /// Of a hello: which side wrote it.
    pub const SOURCE: &str = "source";
    /// Of a hello: the version of the lines.
    pub const VERSION: &str = "version";
    /// Of an event: `SYSTEM:NAME`.
    pub const EVENT: &str = "event";
    /// Of an event: the CPU.
    pub const CPU: &str = "cpu";
    /// Of a loss: where it happened, which is [`GUEST`].
    pub const PLACE: &str = "place";
    /// In a merged trace: the kind of a line that says how the guest's clock is tied from there on.
    pub const CLOCK: &str = "clock";
    /// In a merged trace: how far the time may be off, ns.
    pub const TIME_ERROR: &str = "t_error";
    /// In a merged trace: the guest's own time, ns.
    pub const GUEST_TIME: &str = "guest_t";
    /// Of a clock: host time - guest time, ns.
    pub const OFFSET: &str = "offset_ns";
    /// Of a clock: the number of pairs of events that tie it.
    pub const PAIRS: &str = "pairs";
}

/// Declares the fields of the guest's events that are read, and their names. An event has some of them.
macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident [$($key:literal),+]: $type:ty as $read:expr;)*) => {
        /// Fields of an event of the guest.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct GuestFields {
            $($(#[$doc])* pub $name: Option<$type>,)*
        }

        impl GuestFields {
            fn read(members: &Members<'_>) -> Self {
                $(
                    let read: fn(&Value<'_>) -> Option<$type> = $read;
                    let $name = [$($key),+].iter().find_map(|key| members.get(key)).and_then(read);
                )*
                GuestFields { $($name),* }
            }
        }
    };
}

fn number<T: TryFrom<u64>>(value: &Value<'_>) -> Option<T> {
    value.number()?.try_into().ok()
}

fn signed(value: &Value<'_>) -> Option<i64> {
    if let Value::Negative(number) = value { Some(*number) } else { number(value) }
}

fields! {
    /// The tag of an allocation, as for the split protocol's requests; 0 for none.
    tag ["tag"]: u64 as |value| value.hex();
    /// An I/O virtual address. Linux 7.3 has the second name in its events that have a physical address too, and the
    /// third name in the others.
    iova ["iova", "dma_addr", "addr"]: u64 as |value| value.hex();
    /// A length in bytes.
    size ["size"]: u64 as number;
    /// The return value of the function.
    ret ["ret", "error"]: i64 as signed;
    /// The index of a controller's queue.
    qid ["qid"]: u16 as number;
    /// A command's identifier.
    cid ["cid"]: u16 as number;
    /// A command's opcode.
    opcode ["opcode"]: u8 as number;
    /// A command's first logical block.
    slba ["slba"]: u64 as number;
}

/// An event of the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestEvent {
    /// The guest's `CLOCK_MONOTONIC`, ns; in a merged trace the host's.
    pub time_ns: u64,
    /// Its name, `SYSTEM:NAME`.
    pub name: String,
    /// The CPU.
    pub cpu: Option<u32>,
    /// The endpoint that the event is about.
    pub endpoint: Option<u32>,
    /// Its fields.
    pub fields: GuestFields,
}

impl GuestEvent {
    /// The event of a line; `None` if the line lacks a member that every event has.
    pub(crate) fn read(members: &Members<'_>) -> Option<GuestEvent> {
        let small = |key| members.get(key).and_then(number);
        Some(GuestEvent {
            time_ns: members.number(key::TIME)?,
            name: members.text(guest_key::EVENT)?.to_owned(),
            cpu: small(guest_key::CPU),
            endpoint: small(key::ENDPOINT),
            fields: GuestFields::read(members),
        })
    }

    /// Appends it as one line for people.
    pub fn put_text(&self, out: &mut Vec<u8>) {
        put_head(self.time_ns, guest_key::GUEST, self.endpoint, out);
        put_key(" ", guest_key::EVENT, "=", out);
        // The guest must not be able to make lines of its own.
        out.extend(self.name.chars().map(|c| if c.is_ascii_graphic() { c as u8 } else { b'?' }));
        if let Some(cpu) = self.cpu {
            put_key(" ", guest_key::CPU, "=", out);
            put::number(cpu.into(), out);
        }
        out.push(b'\n');
    }
}

/// The time that a line begins with, and the rest of the line after the comma; `None` if the time is not the first
/// member.
pub fn split_time(line: &[u8]) -> Option<(u64, &[u8])> {
    let rest = line.strip_prefix(b"{\"")?.strip_prefix(key::TIME.as_bytes())?.strip_prefix(b"\":")?;
    let comma = rest.iter().position(|byte| *byte == b',')?;
    Some((std::str::from_utf8(&rest[..comma]).ok()?.trim().parse().ok()?, &rest[comma + 1..]))
}

/// A time of the guest on the host's clock.
#[derive(Clone, Copy, Debug)]
pub struct GuestTime {
    /// On the host's clock, ns.
    pub time_ns: i64,
    /// How far it may be off, ns; `None` if that is not known.
    pub error_ns: Option<u64>,
    /// On the guest's clock, ns.
    pub guest_ns: u64,
}

impl GuestTime {
    fn put(&self, out: &mut Vec<u8>) {
        put_key("{\"", key::TIME, "\":", out);
        put::signed(self.time_ns, out);
        put_key(",\"", guest_key::TIME_ERROR, "\":", out);
        match self.error_ns {
            Some(error) => put::number(error, out),
            None => out.extend_from_slice(b"null"),
        }
        put_key(",\"", guest_key::GUEST_TIME, "\":", out);
        put::number(self.guest_ns, out);
    }

    /// Appends a line of the guest with this time. `rest` is the line after its own time, as [`split_time`] returns it.
    pub fn put_line(&self, rest: &[u8], out: &mut Vec<u8>) {
        self.put(out);
        out.push(b',');
        out.extend_from_slice(rest);
    }
}

/// A line of a merged trace that says how the guest's clock is tied from a moment on.
#[derive(Clone, Copy, Debug)]
pub struct ClockLine {
    /// That moment.
    pub time: GuestTime,
    /// Host time - guest time, ns.
    pub offset_ns: i64,
    /// The number of pairs of events that tie the clocks.
    pub pairs: u64,
}

impl ClockLine {
    /// Appends it as a line of JSON.
    pub fn put_line(&self, out: &mut Vec<u8>) {
        self.time.put(out);
        put_key(",\"", key::KIND, "\":\"", out);
        put_key(guest_key::CLOCK, "\",\"", guest_key::OFFSET, out);
        out.extend_from_slice(b"\":");
        put::signed(self.offset_ns, out);
        put_key(",\"", guest_key::PAIRS, "\":", out);
        put::number(self.pairs, out);
        out.extend_from_slice(b"}\n");
    }
}
