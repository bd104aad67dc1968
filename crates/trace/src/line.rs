//! Events as lines: of JSON, and of text for people.

use std::io::Write;

use crate::codec::{CodecError, MemberError};
use crate::event::{Event, Kind, key};
use crate::members::Members;
use crate::put;
use crate::record::Record;

/// An event with its time and sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamped {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub time_ns: u64,
    /// Its sequence number.
    pub seq: u64,
    /// What happened.
    pub event: Event,
}

/// Why a line is not an event.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// It is not a JSON object.
    #[error("it is not a JSON object ({0})")]
    Json(#[from] serde_json::Error),
    /// It lacks a member that every event has.
    #[error("it has no member {0:?}")]
    NoMember(&'static str),
    /// Its kind is unknown.
    #[error("the kind {0:?} is unknown")]
    Kind(String),
    /// Its members are not those of its kind.
    #[error(transparent)]
    Member(#[from] MemberError),
}

impl Stamped {
    /// The event of a record.
    ///
    /// # Errors
    /// The record is of another version, or damaged.
    pub fn decode(record: &Record) -> Result<Self, CodecError> {
        let event = Event::decode(record)?;
        Ok(Stamped { time_ns: record.time_ns.get(), seq: record.seq.get(), event })
    }

    /// Its record.
    pub fn encode(&self) -> Record {
        self.event.encode(self.time_ns, self.seq)
    }

    /// The event of a line of JSON.
    ///
    /// # Errors
    /// The line is not an event of this version.
    pub fn read(members: &Members<'_>) -> Result<Self, LineError> {
        let number = |key| members.number(key).ok_or(LineError::NoMember(key));
        let name = members.text(key::KIND).ok_or(LineError::NoMember(key::KIND))?;
        let kind = Kind::from_name(name).ok_or_else(|| LineError::Kind(name.chars().take(64).collect()))?;
        let (time_ns, seq) = (number(key::TIME)?, number(key::SEQ)?);
        let id = members.number(key::ENDPOINT).and_then(|id| u32::try_from(id).ok());
        Ok(Stamped { time_ns, seq, event: Event::read(kind, id, members)? })
    }

    /// Appends it as one line of JSON.
    pub fn put_json(&self, out: &mut Vec<u8>) {
        put_key("{\"", key::TIME, "\":", out);
        put::number(self.time_ns, out);
        put_key(",\"", key::SEQ, "\":", out);
        put::number(self.seq, out);
        put_key(",\"", key::KIND, "\":\"", out);
        put_key(self.event.kind().name(), "\"", "", out);
        if let Some(id) = self.event.endpoint() {
            put_key(",\"", key::ENDPOINT, "\":", out);
            put::number(id.into(), out);
            if let Ok(id) = u16::try_from(id) {
                put_key(",\"", key::BDF, "\":\"", out);
                put::bdf(id, out);
                out.push(b'"');
            }
        }
        self.event.put_json(out);
        out.extend_from_slice(b"}\n");
    }

    /// Appends it as one line for people: seconds since boot, kind, endpoint, and `field=value` as in the kernel's trace
    /// events.
    pub fn put_text(&self, out: &mut Vec<u8>) {
        put_head(self.time_ns, self.event.kind().name(), self.event.endpoint(), out);
        self.event.put_text(out);
        out.push(b'\n');
    }
}

#[inline]
pub(crate) fn put_key(before: &str, key: &str, after: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(before.as_bytes());
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(after.as_bytes());
}

/// Appends the beginning of a line for people: seconds, kind and endpoint.
pub(crate) fn put_head(time: u64, kind: &str, endpoint: Option<u32>, out: &mut Vec<u8>) {
    let name = endpoint.map_or_else(|| "-".to_owned(), endpoint_text);
    let (seconds, rest) = (time / 1_000_000_000, time % 1_000_000_000);
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{seconds:5}.{rest:09} {kind:<9} {name:<8}");
}

/// An endpoint for people: a PCI function by bus, device and function, any other by its id.
pub fn endpoint_text(id: u32) -> String {
    let mut name = Vec::with_capacity(16);
    match u16::try_from(id) {
        Ok(id) => put::bdf(id, &mut name),
        Err(_) => put::hex(id.into(), &mut name),
    }
    String::from_utf8_lossy(&name).into_owned()
}

/// Appends the record as one line of JSON. On an error nothing is appended.
pub fn json(record: &Record, out: &mut Vec<u8>) -> Result<(), CodecError> {
    Stamped::decode(record)?.put_json(out);
    Ok(())
}

/// Appends the record as one line for people. On an error nothing is appended.
pub fn text(record: &Record, out: &mut Vec<u8>) -> Result<(), CodecError> {
    Stamped::decode(record)?.put_text(out);
    Ok(())
}
