//! What the guest's trace agent writes: an event of the guest's kernel a line.

use crate::event::key;
use crate::members::{Members, Value};

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
}
