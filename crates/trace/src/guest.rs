//! What the guest's trace agent writes: an event of the guest's kernel a line; and what such lines are in a merged trace.

use crate::event::key;
use crate::line::{put_head, put_key};
use crate::members::{Members, Value};
use crate::put;

/// The version of the guest's lines that is read.
pub const GUEST_VERSION: u32 = 1;

/// The kinds of the guest's lines, and the members that they have beside an event's own fields.
pub mod guest_key {
    /// The first line of a stream; [`SOURCE`] tells the guest's from the device's.
    pub const HELLO: &str = "hello";
    /// An event.
    pub const GUEST: &str = "guest";
    /// Of a hello: who wrote it.
    pub const SOURCE: &str = "source";
    /// Of a hello: the version of the lines.
    pub const VERSION: &str = "version";
    /// Of an event: `SYSTEM:NAME`.
    pub const EVENT: &str = "event";
    /// Of an event: the processor.
    pub const CPU: &str = "cpu";
    /// Of a loss: where, which is [`GUEST`].
    pub const PLACE: &str = "place";
    /// The kind of a line of a merged trace that says what the guest's clock is from there on.
    pub const CLOCK: &str = "clock";
    /// In a merged trace: how far the time may be off, ns.
    pub const TIME_ERROR: &str = "t_error";
    /// In a merged trace: the guest's own time, ns.
    pub const GUEST_TIME: &str = "guest_t";
    /// Of a clock: host time - guest time, ns.
    pub const OFFSET: &str = "offset_ns";
    /// Of a clock: the pairs of events that tie it.
    pub const PAIRS: &str = "pairs";
}

/// Fields of the guest's events that are looked at. An event has some of them.
macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident: $type:ty as $read:expr;)*) => {
        /// Fields of an event of the guest, as the kernel names them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct GuestFields {
            $($(#[$doc])* pub $name: Option<$type>,)*
        }

        impl GuestFields {
            fn read(members: &Members<'_>) -> Self {
                $(
                    let read: fn(&Value<'_>) -> Option<$type> = $read;
                    let $name = members.get(stringify!($name)).and_then(read);
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
    /// What somebody chose to call an allocation.
    tag: u64 as |value| value.hex();
    /// An I/O virtual address.
    iova: u64 as |value| value.hex();
    /// Bytes.
    size: u64 as number;
    /// What the function returned.
    ret: i64 as signed;
    /// A controller's queue.
    qid: u16 as number;
    /// A command's identifier.
    cid: u16 as number;
    /// A command's operation.
    opcode: u8 as number;
    /// A command's first block.
    slba: u64 as number;
}

/// An event of the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestEvent {
    /// The guest's `CLOCK_MONOTONIC`, ns; in a merged trace the host's.
    pub time_ns: u64,
    /// `SYSTEM:NAME`
    pub name: String,
    /// The processor.
    pub cpu: Option<u32>,
    /// The endpoint that it is about.
    pub endpoint: Option<u32>,
    /// Its fields.
    pub fields: GuestFields,
}

impl GuestEvent {
    /// What a line says; `None` if it lacks what every event has.
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
        // What a guest wrote must not make other lines.
        out.extend(self.name.chars().map(|c| if c.is_ascii_graphic() { c as u8 } else { b'?' }));
        if let Some(cpu) = self.cpu {
            put_key(" ", guest_key::CPU, "=", out);
            put::number(cpu.into(), out);
        }
        out.push(b'\n');
    }
}

/// The time that a line begins with, and what follows its comma; `None` if something else stands first.
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
    /// How far it may be off, ns; `None`: nobody knows.
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

    /// Appends a line of the guest, of which `rest` is what followed its time, with this time.
    pub fn put_line(&self, rest: &[u8], out: &mut Vec<u8>) {
        self.put(out);
        out.push(b',');
        out.extend_from_slice(rest);
    }
}

/// What the guest's clock is in a merged trace from a moment on.
#[derive(Clone, Copy, Debug)]
pub struct ClockLine {
    /// That moment.
    pub time: GuestTime,
    /// Host time - guest time, ns.
    pub offset_ns: i64,
    /// The pairs of events that tie the clocks.
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
