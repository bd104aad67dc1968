//! A client's first line, which is its subscription, and the server's first line in return.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use crate::event::Kind;
use crate::record::{Header, NO_ENDPOINT, Record, VERSION};

/// The format in which a client gets events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One line of JSON for each event.
    #[default]
    Json,
    /// A [`Header`], then one [`Record`] for each event.
    Binary,
}

/// How many of the events before its connection a client gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backlog {
    /// At most this many: the newest of those that its subscription names.
    Count(u64),
    /// As many as are kept.
    All,
    /// None.
    #[default]
    None,
}

/// What a client asks for. The default is for a client that asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subscription {
    /// The format of the stream.
    pub format: Format,
    /// The kinds of events; if empty, all that need not be named. [`Kind::Lost`] always comes.
    pub kinds: Vec<Kind>,
    /// The endpoints whose events come; all if empty. Events about no endpoint always come.
    pub endpoints: Vec<u32>,
    /// Events from before the connection.
    pub backlog: Backlog,
    /// Whether the live state comes first. Naming [`Kind::State`] asks for it as well.
    pub state: bool,
}

/// The end of each message about a bad line: what a good one looks like.
const EXPECTED: &str = r#"expected one line like {"format":"json"|"binary","kinds":["request",...],"endpoints":[32,"00:04.0",...],"backlog":N|"all","state":true}, every member optional, or an empty line"#;

impl Subscription {
    /// Parses a client's first line.
    ///
    /// # Errors
    /// A message that says what is wrong and what is possible.
    pub fn parse(line: &[u8]) -> Result<Subscription, String> {
        if line.trim_ascii().is_empty() {
            return Ok(Subscription::default());
        }
        let value = serde_json::from_slice(line).map_err(|error| format!("Not JSON ({error}): {EXPECTED}"))?;
        let Value::Object(members) = value else {
            return Err(format!("Not a JSON object: {EXPECTED}"));
        };
        let mut subscription = Subscription::default();
        for (key, value) in &members {
            match key.as_str() {
                "format" => subscription.format = parse_format(value)?,
                "kinds" => subscription.kinds = parse_list(key, value, parse_kind)?,
                "endpoints" => subscription.endpoints = parse_list(key, value, parse_endpoint_value)?,
                "backlog" => subscription.backlog = parse_backlog(value)?,
                "state" => subscription.state = parse_state(value)?,
                _ => return Err(format!("Unknown member {key:?}: {EXPECTED}")),
            }
        }
        Ok(subscription)
    }

    /// The line that asks for this, with its newline.
    pub fn line(&self) -> String {
        let format = match self.format {
            Format::Json => "json",
            Format::Binary => "binary",
        };
        let kinds: Vec<_> = self.kinds.iter().map(|kind| kind.name()).collect();
        let backlog = match self.backlog {
            Backlog::None => json!(0),
            Backlog::Count(count) => json!(count),
            Backlog::All => json!("all"),
        };
        let mut line =
            json!({"format": format, "kinds": kinds, "endpoints": self.endpoints, "backlog": backlog, "state": self.state}).to_string();
        line.push('\n');
        line
    }

    /// The filter for the events that the subscription names.
    pub fn filter(&self) -> Filter {
        let chosen = match self.kinds.as_slice() {
            [] => Kind::DEFAULT,
            chosen => chosen.iter().fold(0, |bits, kind| bits | kind.bit()),
        };
        let state = if self.state { Kind::State.bit() } else { 0 };
        let kinds = chosen | Kind::Lost.bit() | state;
        let mut endpoints = self.endpoints.clone();
        endpoints.sort_unstable();
        endpoints.dedup();
        Filter { kinds, endpoints }
    }
}

/// The events that a client gets.
#[derive(Clone, Debug)]
pub struct Filter {
    /// The kinds: bit n is the kind with number n.
    pub kinds: u64,
    /// The endpoints, sorted; all if empty.
    endpoints: Vec<u32>,
}

impl Filter {
    /// Whether the client gets the event.
    #[inline]
    pub fn passes(&self, record: &Record) -> bool {
        if self.kinds >> record.kind.get() & 1 == 0 {
            return false;
        }
        let endpoint = record.endpoint.get();
        self.endpoints.is_empty() || endpoint == NO_ENDPOINT || self.endpoints.binary_search(&endpoint).is_ok()
    }
}

fn parse_format(value: &Value) -> Result<Format, String> {
    match value.as_str() {
        Some("json") => Ok(Format::Json),
        Some("binary") => Ok(Format::Binary),
        _ => Err(format!("Bad \"format\" {value}: expected \"json\" or \"binary\"")),
    }
}

fn parse_list<T>(key: &str, value: &Value, parse: impl Fn(&Value) -> Result<T, String>) -> Result<Vec<T>, String> {
    let Value::Array(values) = value else {
        return Err(format!("Bad {key:?} {value}: expected a list"));
    };
    values.iter().map(parse).collect()
}

fn parse_kind(value: &Value) -> Result<Kind, String> {
    value.as_str().and_then(Kind::from_name).ok_or_else(|| {
        let mut message = format!("Unknown event kind {value}: expected one of");
        for (n, kind) in Kind::ALL.iter().enumerate() {
            let _ = write!(message, "{} \"{}\"", if n == 0 { "" } else { "," }, kind.name());
        }
        message
    })
}

fn parse_endpoint_value(value: &Value) -> Result<u32, String> {
    let number = match value {
        Value::String(text) => parse_endpoint(text).ok(),
        _ => value.as_u64().and_then(|number| u32::try_from(number).ok()),
    };
    number.ok_or_else(|| format!("Bad endpoint {value}: {ENDPOINT_EXPECTED}"))
}

const ENDPOINT_EXPECTED: &str = "expected an endpoint id like 32 or \"0x20\", or a PCI address like \"00:04.0\"";

/// Parses an endpoint as people write it: an id (`32`, `0x20`) or a PCI address (`00:04.0`, `0000:00:04.0`).
///
/// # Errors
/// A message that says what is expected.
pub fn parse_endpoint(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    number.or_else(|| parse_bdf(text)).ok_or_else(|| format!("Bad endpoint {text:?}: {ENDPOINT_EXPECTED}"))
}

fn parse_bdf(text: &str) -> Option<u32> {
    let text = text.strip_prefix("0000:").unwrap_or(text);
    let (bus, rest) = text.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let part = |digits: &str, max: u32| u32::from_str_radix(digits, 16).ok().filter(|number| *number <= max);
    Some(part(bus, 0xff)? << 8 | part(device, 0x1f)? << 3 | part(function, 7)?)
}

fn parse_state(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| format!("Bad \"state\" {value}: expected true or false"))
}

fn parse_backlog(value: &Value) -> Result<Backlog, String> {
    match (value.as_u64(), value.as_str()) {
        (Some(0), _) => Ok(Backlog::None),
        (Some(count), _) => Ok(Backlog::Count(count)),
        (_, Some("all")) => Ok(Backlog::All),
        _ => Err(format!("Bad \"backlog\" {value}: expected a number of events or \"all\"")),
    }
}

#[derive(Serialize)]
struct Hello<'a> {
    kind: &'a str,
    version: u32,
    pid: u32,
    clock: &'a str,
    start: u64,
    realtime_offset_us: u64,
    format: &'a str,
    record_size: u32,
    kinds: Vec<&'a str>,
    lost: u64,
    seq: u64,
}

/// The header as the first line of a JSON stream.
pub fn hello(header: &Header) -> String {
    line(&Hello {
        kind: "hello",
        // Lines are written as this version has them, even those of records that another version wrote.
        version: VERSION,
        pid: header.pid.get(),
        clock: "CLOCK_MONOTONIC",
        start: header.start_ns.get(),
        // In microseconds, it is exact as a double.
        realtime_offset_us: header.realtime_offset_ns.get() / 1000,
        format: "json",
        record_size: size_of::<Record>() as u32,
        kinds: Kind::ALL.iter().filter(|kind| header.kinds & kind.bit() != 0).map(|kind| kind.name()).collect(),
        lost: header.lost.get(),
        seq: header.seq.get(),
    })
}

#[derive(Serialize)]
struct Refusal<'a> {
    kind: &'a str,
    version: u32,
    error: &'a str,
}

/// The line for a client that cannot be served.
pub fn refusal(message: &str) -> String {
    line(&Refusal { kind: "error", version: VERSION, error: message })
}

fn line(value: &impl Serialize) -> String {
    // Cannot fail for strings and numbers.
    let mut line = serde_json::to_string(value).unwrap_or_default();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Event;

    #[test]
    fn a_subscription_survives_its_line() {
        let subscriptions = [
            Subscription::default(),
            Subscription {
                format: Format::Binary,
                kinds: vec![Kind::Dma, Kind::Fault],
                endpoints: vec![32, u32::MAX],
                backlog: Backlog::Count(7),
                state: true,
            },
            Subscription { backlog: Backlog::All, ..Subscription::default() },
        ];
        for subscription in subscriptions {
            assert_eq!(Subscription::parse(subscription.line().as_bytes()), Ok(subscription));
        }
        assert_eq!(Subscription::parse(b"{}"), Ok(Subscription::default()));
        assert_eq!(Subscription::parse(b" \r"), Ok(Subscription::default()));
    }

    #[test]
    fn a_bad_line_says_what_is_possible() {
        for (line, expected) in [
            (&b"hello"[..], "Not JSON"),
            (b"\xff\xfe", "Not JSON"),
            (b"[]", "Not a JSON object"),
            (br#"{"format":"xml"}"#, "\"json\" or \"binary\""),
            (br#"{"kinds":"dma"}"#, "a list"),
            (br#"{"kinds":["dam"]}"#, "\"dma\", \"interrupt\""),
            (br#"{"endpoints":["4.0"]}"#, "00:04.0"),
            (br#"{"endpoints":[4294967296]}"#, "00:04.0"),
            (br#"{"endpoints":[-1]}"#, "00:04.0"),
            (br#"{"backlog":"some"}"#, "\"all\""),
            (br#"{"backlog":-5}"#, "\"all\""),
            (br#"{"state":1}"#, "true or false"),
            (br#"{"formt":"json"}"#, "Unknown member \"formt\""),
        ] {
            let message = Subscription::parse(line).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
        let deep = [b'['; 4000];
        assert!(Subscription::parse(&deep).is_err());
    }

    #[test]
    fn endpoints_are_ids_or_pci_addresses() {
        assert_eq!(parse_endpoint("32"), Ok(32));
        assert_eq!(parse_endpoint("0x20"), Ok(32));
        assert_eq!(parse_endpoint("00:04.0"), Ok(32));
        assert_eq!(parse_endpoint("0000:01:1f.7"), Ok(0x1ff));
        for bad in ["", "x", "00:20.0", "00:04.8", "100:00.0", "0001:00:04.0", "00:04", "0x"] {
            assert!(parse_endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_filter_keeps_losses_and_events_about_no_endpoint() {
        let subscription =
            Subscription { kinds: vec![Kind::Interrupt], endpoints: vec![5, 3], ..Subscription::default() };
        let filter = subscription.filter();
        let passes = |event: Event| filter.passes(&event.encode(0, 0));
        assert!(passes(Event::Interrupt { endpoint: Some(3), vector: 0 }));
        assert!(passes(Event::Interrupt { endpoint: None, vector: 0 }));
        assert!(!passes(Event::Interrupt { endpoint: Some(4), vector: 0 }));
        assert!(!passes(Event::Panic { endpoint: 3 }));
        assert!(passes(Event::Lost { place: crate::event::LossPlace::Ring, count: 1, since: 0 }));
    }
}
