//! What an event says, field by field: the one source of the JSON lines and of the text.

use std::io::Write;

use crate::event::{DataPointer, Event, Model};
use crate::{CodecError, names};
use viommu_wire::split::request_type as split_type;
use viommu_wire::trace::Record;
use viommu_wire::virtio_iommu::request_type;

/// Takes the fields of an event in their order.
trait Fields {
    /// A number: a count, an id, bytes.
    fn number(&mut self, key: &str, value: u64);
    /// An address or a bit mask.
    fn hex(&mut self, key: &str, value: u64);
    /// A name: printable ASCII without quotes and backslashes.
    fn name(&mut self, key: &str, value: &str);
    /// A yes or no.
    fn flag(&mut self, key: &str, value: bool);
    /// A time span in nanoseconds.
    fn duration(&mut self, key: &str, value: u64);
    /// The bytes from `start` to `end`, both inclusive.
    fn size(&mut self, start: u64, end: u64);
    /// Names, as many as there are.
    fn list<S: AsRef<str>>(&mut self, key: &str, values: impl Iterator<Item = S>);
}

/// The endpoint that an event is about.
fn endpoint(event: &Event) -> Option<u32> {
    match *event {
        Event::Session { endpoint, .. }
        | Event::Memory { endpoint, .. }
        | Event::Request { endpoint, .. }
        | Event::Reset { endpoint, .. }
        | Event::Interrupt { endpoint, .. } => endpoint,
        Event::Fault { endpoint, .. }
        | Event::Dma { endpoint, .. }
        | Event::Command { endpoint, .. }
        | Event::Device { endpoint, .. }
        | Event::Panic { endpoint } => Some(endpoint),
        Event::Features { .. }
        | Event::Split { .. }
        | Event::Queue { .. }
        | Event::Kick { .. }
        | Event::Bypass { .. }
        | Event::Malformed { .. }
        | Event::Lost { .. }
        | Event::Injected { .. }
        | Event::Undelivered { .. } => None,
    }
}

/// The event's own fields, without kind and endpoint.
fn describe(event: &Event, to: &mut impl Fields) {
    match *event {
        Event::Session { channel, connected, .. } => {
            to.name("channel", channel.name());
            to.flag("connected", connected);
        }
        Event::Features { offered, accepted } => {
            to.hex("offered", offered);
            to.hex("accepted", accepted);
            to.list("accepted_names", names::features(accepted));
        }
        Event::Memory { channel, added, gpa, len, writable, .. } => {
            to.name("channel", channel.name());
            to.flag("added", added);
            to.hex("gpa", gpa);
            to.number("len", len);
            to.flag("writable", writable);
        }
        Event::Queue { queue, started, index, size } => {
            to.name("virtqueue", &names::queue(queue));
            to.flag("started", started);
            to.number("index", index.into());
            to.number("size", size.into());
        }
        Event::Kick { queue, requests } => {
            to.name("virtqueue", &names::queue(queue));
            to.number("requests", requests.into());
        }
        Event::Request { .. } => describe_request(event, to),
        Event::Split { .. } => describe_split(event, to),
        Event::Reset { reset, .. } => to.name("reset", reset.name()),
        Event::Fault { reason, access, address, domain, dropped, .. } => {
            to.name("reason", &names::fault_reason(reason));
            to.name("access", access.name());
            to.hex("address", address);
            if let Some(domain) = domain {
                to.number("domain", domain.into());
            }
            to.flag("dropped", dropped);
        }
        Event::Dma { access, route, failed, iova, gpa, len, domain, tag, .. } => {
            to.name("access", access.name());
            to.name("route", route.name());
            to.flag("failed", failed);
            to.hex("iova", iova);
            to.hex("gpa", gpa);
            to.number("len", len.into());
            to.number("domain", domain.into());
            to.hex("tag", tag);
        }
        Event::Interrupt { vector, .. } => to.number("vector", vector.into()),
        Event::Command { .. } => describe_command(event, to),
        Event::Bypass { value } => to.number("value", value.into()),
        Event::Malformed { queue, head, readable, writable, used } => {
            to.name("virtqueue", &names::queue(queue));
            to.number("head", head.into());
            to.number("readable", readable.into());
            to.number("writable", writable.into());
            to.number("used", used.into());
        }
        Event::Device { model, state, .. } => {
            to.name("model", model.name());
            match model {
                Model::Nvme => {
                    to.hex("cc", state & 0xffff_ffff);
                    to.hex("csts", state >> 32);
                }
                Model::Ioat => {
                    to.hex("chansts", state & 0xffff_ffff);
                    to.hex("chanerr", state >> 32);
                }
            }
        }
        Event::Lost { place, count, since } => {
            to.name("place", place.name());
            to.number("count", count);
            to.number("since", since);
        }
        Event::Panic { .. } => {}
        Event::Injected { request, answer, number } => {
            to.name("type", &names::request(request));
            to.name("answer", answer.name());
            to.number("number", number);
        }
        Event::Undelivered { count } => to.number("count", count),
    }
}

/// The fields that the request's type has; all of them for a type that is not known.
fn describe_request(event: &Event, to: &mut impl Fields) {
    let Event::Request { request, status, domain, flags, virt_start, virt_end, phys_start, duration, .. } = *event
    else {
        return;
    };
    to.name("type", &names::request(request));
    to.name("status", &names::status(status));
    if request != request_type::PROBE {
        to.number("domain", domain.into());
    }
    if !matches!(request, request_type::ATTACH | request_type::DETACH | request_type::PROBE) {
        to.hex("virt_start", virt_start);
        to.hex("virt_end", virt_end);
        to.size(virt_start, virt_end);
    }
    match request {
        request_type::ATTACH => to.name("flags", &names::attach_flags(flags)),
        request_type::DETACH | request_type::UNMAP | request_type::PROBE => {}
        request_type::MAP => {
            to.hex("phys_start", phys_start);
            to.name("flags", &names::map_flags(flags));
        }
        _ => {
            to.hex("phys_start", phys_start);
            to.hex("flags", flags.into());
        }
    }
    to.duration("duration_ns", duration);
}

/// The fields of a request of the split protocol.
fn describe_split(event: &Event, to: &mut impl Fields) {
    let Event::Split { request, status, domain, flags, virt_start, virt_end, tag, count, duration } = *event else {
        return;
    };
    to.name("type", &names::request(request));
    to.name("status", &names::status(status));
    to.number("domain", domain.into());
    to.hex("virt_start", virt_start);
    to.hex("virt_end", virt_end);
    to.size(virt_start, virt_end);
    to.hex("tag", tag);
    match request {
        split_type::RESERVE => {}
        split_type::LINK => to.number("extents", count.into()),
        _ => to.number("granules", count.into()),
    }
    if request == split_type::LINK {
        to.name("flags", &names::map_flags(flags));
    } else if flags != 0 {
        to.hex("flags", flags.into());
    }
    to.duration("duration_ns", duration);
}

fn describe_command(event: &Event, to: &mut impl Fields) {
    let Event::Command { model, opcode, queue, id, status, pointer, address, data, len, duration, .. } = *event else {
        return;
    };
    to.name("model", model.name());
    to.name("opcode", &names::opcode(model, queue, opcode));
    to.number("queue", queue.into());
    match model {
        Model::Nvme => {
            to.number("cid", id.into());
            to.hex("status", status.into());
            if queue != 0 {
                to.number("slba", address);
            }
            to.number("len", len.into());
            to.name("pointer", pointer.name());
            if pointer != DataPointer::None {
                to.hex("data", data);
            }
        }
        Model::Ioat => {
            to.number("id", id.into());
            to.hex("status", status.into());
            to.hex("src", address);
            to.hex("dst", data);
            to.number("len", len.into());
        }
    }
    to.duration("duration_ns", duration);
}

/// Bus, device and function as `lspci` writes them, for an endpoint id that is one.
struct Bdf(u16);

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.0 >> 8, self.0 >> 3 & 0x1f, self.0 & 7)
    }
}

/// `write!` to a `Vec`, which cannot fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{
        let _ = write!($out, $($arg)*);
    }};
}

struct Json<'a>(&'a mut Vec<u8>);

impl Fields for Json<'_> {
    fn number(&mut self, key: &str, value: u64) {
        put!(self.0, ",\"{key}\":{value}");
    }

    fn hex(&mut self, key: &str, value: u64) {
        put!(self.0, ",\"{key}\":\"{value:#x}\"");
    }

    fn name(&mut self, key: &str, value: &str) {
        put!(self.0, ",\"{key}\":\"{value}\"");
    }

    fn flag(&mut self, key: &str, value: bool) {
        put!(self.0, ",\"{key}\":{value}");
    }

    fn duration(&mut self, key: &str, value: u64) {
        self.number(key, value);
    }

    fn size(&mut self, start: u64, end: u64) {
        // A guest may ask for a range that ends before it starts, and for all 2^64 bytes.
        put!(self.0, ",\"size\":{}", size(start, end));
    }

    fn list<S: AsRef<str>>(&mut self, key: &str, values: impl Iterator<Item = S>) {
        put!(self.0, ",\"{key}\":[");
        for (n, value) in values.enumerate() {
            put!(self.0, "{}\"{}\"", if n == 0 { "" } else { "," }, value.as_ref());
        }
        self.0.push(b']');
    }
}

struct Text<'a>(&'a mut Vec<u8>);

impl Fields for Text<'_> {
    fn number(&mut self, key: &str, value: u64) {
        put!(self.0, " {key}={value}");
    }

    fn hex(&mut self, key: &str, value: u64) {
        put!(self.0, " {key}={value:#x}");
    }

    fn name(&mut self, key: &str, value: &str) {
        put!(self.0, " {key}={value}");
    }

    fn flag(&mut self, key: &str, value: bool) {
        put!(self.0, " {key}={}", u8::from(value));
    }

    fn duration(&mut self, key: &str, value: u64) {
        let key = key.trim_end_matches("_ns");
        put!(self.0, " {key}={}.{:03}us", value / 1000, value % 1000);
    }

    fn size(&mut self, start: u64, end: u64) {
        put!(self.0, " size={:#x}", size(start, end));
    }

    fn list<S: AsRef<str>>(&mut self, key: &str, values: impl Iterator<Item = S>) {
        put!(self.0, " {key}=");
        for (n, value) in values.enumerate() {
            put!(self.0, "{}{}", if n == 0 { "" } else { "," }, value.as_ref());
        }
    }
}

/// Bytes of an inclusive range, 0 when it ends before it starts.
fn size(start: u64, end: u64) -> u128 {
    (u128::from(end) + 1).saturating_sub(u128::from(start))
}

/// Appends the record as one JSON line. On an error nothing is appended.
pub fn json(record: &Record, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let event = Event::decode(record)?;
    put!(out, "{{\"t\":{},\"seq\":{},\"kind\":\"{}\"", record.time_ns, record.seq, event.kind().name());
    let mut to = Json(out);
    if let Some(id) = endpoint(&event) {
        to.number("endpoint", id.into());
        if let Ok(bdf) = u16::try_from(id) {
            put!(to.0, ",\"bdf\":\"{}\"", Bdf(bdf));
        }
    }
    describe(&event, &mut to);
    out.extend(b"}\n");
    Ok(())
}

/// Appends the record as one line for people: seconds since boot, kind, endpoint, and `field=value` as in the kernel's
/// trace events. On an error nothing is appended.
pub fn text(record: &Record, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let event = Event::decode(record)?;
    let time = record.time_ns.get();
    put!(out, "{:5}.{:09} {:<9}", time / 1_000_000_000, time % 1_000_000_000, event.kind().name());
    match endpoint(&event) {
        None => put!(out, " {:<8}", "-"),
        Some(id) => match u16::try_from(id) {
            Ok(bdf) => put!(out, " {:<8}", Bdf(bdf).to_string()),
            Err(_) => put!(out, " {id:<#8x}"),
        },
    }
    describe(&event, &mut Text(out));
    out.push(b'\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::tests::any_event;
    use proptest::prelude::*;
    use serde_json::Value;

    fn json_of(event: &Event) -> Value {
        let mut line = Vec::new();
        json(&event.encode(5, 7), &mut line).unwrap();
        assert_eq!(line.pop(), Some(b'\n'));
        assert!(!line.contains(&b'\n'));
        serde_json::from_slice(&line).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&line)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn every_event_is_one_line_of_json_and_one_of_text(event in any_event()) {
            let value = json_of(&event);
            prop_assert_eq!(&value["t"], 5);
            prop_assert_eq!(&value["seq"], 7);
            prop_assert_eq!(&value["kind"], event.kind().name());
            let mut line = Vec::new();
            text(&event.encode(5, 7), &mut line).unwrap();
            let line = String::from_utf8(line).unwrap();
            prop_assert_eq!(line.lines().count(), 1);
            prop_assert!(line.ends_with('\n'));
        }
    }

    #[test]
    fn a_range_has_its_exact_size() {
        assert_eq!(size(0, 0xfff), 0x1000);
        assert_eq!(size(0, u64::MAX), 1 << 64);
        assert_eq!(size(0x2000, 0xfff), 0);
        assert_eq!(size(u64::MAX, 0), 0);
    }

    #[test]
    fn endpoints_that_are_no_pci_function_have_no_bdf() {
        assert_eq!(json_of(&Event::Panic { endpoint: 0x20 })["bdf"], "00:04.0");
        assert_eq!(json_of(&Event::Panic { endpoint: 0x01ff })["bdf"], "01:1f.7");
        assert_eq!(json_of(&Event::Panic { endpoint: 0x1_0000 })["bdf"], Value::Null);
    }

    #[test]
    fn a_record_of_another_version_is_refused() {
        let mut record = Event::Panic { endpoint: 1 }.encode(0, 0);
        record.kind = 999.into();
        let mut out = Vec::new();
        assert_eq!(json(&record, &mut out), Err(CodecError::Kind(999)));
        assert_eq!(text(&record, &mut out), Err(CodecError::Kind(999)));
        assert!(out.is_empty());
    }
}
