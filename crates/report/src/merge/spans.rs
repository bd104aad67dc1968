//! The operations that both the guest and the device trace, as each side saw them.
//!
//! | in the guest, before | of the device, with its start and end | in the guest, after |
//! |---|---|---|
//! | `dma_iova_link`, the last that went into a request | LINK | `dma_iova_sync` |
//! | `dma_iova_sync` | the first and the last access with the LINK's tag | `dma_iova_destroy`, `dma_iova_free` |
//! | `dma_iova_unlink` | UNLINK | |
//! | `dma_iova_destroy`, `dma_iova_free` | RELEASE | |
//! | `nvme_setup_cmd` | NVMe command | `nvme_complete_rq` |
//!
//! The events of the two-step API are in the group `dma_iova` of Linux 6.12 with the series, and in the group `dma` of
//! Linux 7.3 with the series.

use std::collections::HashMap;

use super::clock::{Bound, Side};
use viommu_trace::{Event, GuestEvent, Stamped};
use viommu_wire::model::Model;
use viommu_wire::nvme;
use viommu_wire::request::RequestType;

/// The granule to which addresses are rounded before they are compared.
const GRANULE: u64 = 4096;

/// What identifies an operation on both sides. The same key may occur several times in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A tag, and the address behind the last byte that was linked.
    Link(u64, u64),
    /// A tag, and the first address.
    Unlink(u64, u64),
    /// A tag, and the reservation's first address.
    Release(u64, u64),
    /// A command of an I/O queue of an NVMe controller.
    Command { endpoint: u32, queue: u16, cid: u16, opcode: u8, slba: u64 },
}

/// An operation as the guest traced it. Times are of the guest's clock, ns.
#[derive(Debug)]
pub struct GuestSpan {
    pub key: Key,
    /// A time before the device began.
    pub before: Option<u64>,
    /// A time after the device had ended. From then on it may use what was linked.
    pub after: Option<u64>,
    /// A time after which the device no longer uses what was linked.
    pub unused: Option<u64>,
}

/// An operation as the device traced it. Times are of the host's clock, ns; `used` are the first and the last access to
/// what was linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSpan {
    pub start: u64,
    pub end: u64,
    used: Option<(u64, u64)>,
}

/// The device's operations.
pub struct HostSpans {
    /// Sorted by key, then by start, once [`HostSpans::sort`] was called.
    spans: Vec<(Key, HostSpan)>,
    /// The ranges that are linked, by tag, each with the index of its LINK in `spans`.
    linked: HashMap<u64, Vec<(u64, u64, usize)>>,
}

impl HostSpans {
    /// None yet.
    pub fn new() -> Self {
        HostSpans { spans: Vec::new(), linked: HashMap::new() }
    }

    /// Adds an event. Events must be added in the order of the trace.
    pub fn add(&mut self, &Stamped { time_ns, event, .. }: &Stamped) {
        if let Event::Dma { iova, tag, .. } = event {
            self.access(time_ns, iova, tag);
            return;
        }
        let Some((key, duration)) = key(&event) else { return };
        match (key, event) {
            (Key::Link(tag, end), Event::Split { virt_start, .. }) => {
                self.linked.entry(tag).or_default().push((virt_start, end, self.spans.len()));
            }
            (Key::Unlink(tag, _) | Key::Release(tag, _), _) => drop(self.linked.remove(&tag)),
            _ => {}
        }
        self.spans.push((key, HostSpan { start: time_ns.saturating_sub(duration), end: time_ns, used: None }));
    }

    /// Notes an access through a range that a LINK linked. After an UNLINK with the tag no range of the tag is known.
    fn access(&mut self, time: u64, iova: u64, tag: u64) -> Option<()> {
        let linked = self.linked.get(&chosen(tag)?)?;
        let (.., index) = linked.iter().rfind(|(start, end, _)| (*start..*end).contains(&iova))?;
        let (_, span) = self.spans.get_mut(*index)?;
        let (first, last) = span.used.unwrap_or((time, time));
        span.used = Some((first.min(time), last.max(time)));
        Some(())
    }

    /// Ends the adding of events, and makes [`HostSpans::of`] usable.
    pub fn sort(&mut self) {
        self.linked = HashMap::new();
        self.spans.sort_unstable_by_key(|(key, span)| (*key, span.start));
    }

    /// The operations with this key, in the order of their starts.
    pub fn of(&self, key: &Key) -> &[(Key, HostSpan)] {
        let first = self.spans.partition_point(|(other, _)| other < key);
        let rest = &self.spans[first..];
        // Most keys have few operations, so the end is searched in growing steps.
        let mut len = 1;
        while rest.get(len - 1).is_some_and(|(other, _)| other == key) {
            len *= 2;
        }
        let rest = &rest[..len.min(rest.len())];
        &rest[..rest.partition_point(|(other, _)| other == key)]
    }
}

/// The key of the operation that an event reports, and how long the device took for it, ns.
fn key(event: &Event) -> Option<(Key, u64)> {
    match *event {
        Event::Split { request, virt_start, virt_end, tag, duration, .. } => {
            let tag = chosen(tag)?;
            let key = match RequestType::from_number(request)? {
                RequestType::Link => Key::Link(tag, virt_end.wrapping_add(1)),
                RequestType::Unlink => Key::Unlink(tag, virt_start),
                RequestType::Release => Key::Release(tag, virt_start),
                _ => return None,
            };
            Some((key, duration))
        }
        Event::Command { endpoint, model: Model::Nvme, queue, opcode, id, part, duration, .. } if queue != 0 => {
            let (queue, cid) = (queue.try_into().ok()?, id.try_into().ok()?);
            let slba = nvme::Command::from(part).slba;
            Some((Key::Command { endpoint, queue, cid, opcode, slba }, duration))
        }
        _ => None,
    }
}

/// The tag, or `None` for 0, which stands for no tag.
fn chosen(tag: u64) -> Option<u64> {
    (tag != 0).then_some(tag)
}

/// An event of the guest that is part of an operation.
#[derive(Clone, Copy, Debug)]
pub struct GuestStep {
    /// On the guest's clock, ns.
    pub at: u64,
    cpu: Option<u32>,
    step: Step,
}

/// A range of addresses: the first one, and the end of the last granule.
type Range = (u64, u64);

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A range was linked.
    Link { tag: u64, range: Range },
    /// The links of a range were synchronized. `waited`: the device has done them.
    Sync { tag: u64, range: Range, waited: bool },
    /// The guest is about to unlink what was linked.
    Unlink { tag: u64, start: u64 },
    /// The guest is about to release the reservation.
    Release { tag: u64, start: u64 },
    /// A command is about to be sent.
    Setup(Key),
    /// A command was completed.
    Complete { endpoint: u32, queue: u16, cid: u16 },
}

impl GuestStep {
    /// `None` if the event is part of no operation, or lacks a field that such an event has.
    pub fn new(event: &GuestEvent) -> Option<Self> {
        let fields = &event.fields;
        let step = match event.name.as_str() {
            "dma_iova:dma_iova_link" | "dma:dma_iova_link" if fields.ret == Some(0) => {
                let (tag, range) = range(event)?;
                Step::Link { tag, range }
            }
            "dma_iova:dma_iova_sync" | "dma:dma_iova_sync" => {
                let (tag, range) = range(event)?;
                Step::Sync { tag, range, waited: fields.ret == Some(0) }
            }
            "dma_iova:dma_iova_unlink" | "dma:dma_iova_unlink" => {
                Step::Unlink { tag: chosen(fields.tag?)?, start: granule(event)? }
            }
            "dma_iova:dma_iova_destroy" | "dma:dma_iova_destroy" | "dma_iova:dma_iova_free" | "dma:dma_iova_free" => {
                Step::Release { tag: chosen(fields.tag?)?, start: granule(event)? }
            }
            "nvme:nvme_setup_cmd" if fields.qid? != 0 => Step::Setup(Key::Command {
                endpoint: event.endpoint?,
                queue: fields.qid?,
                cid: fields.cid?,
                opcode: fields.opcode?,
                slba: fields.slba?,
            }),
            "nvme:nvme_complete_rq" => {
                Step::Complete { endpoint: event.endpoint?, queue: fields.qid?, cid: fields.cid? }
            }
            _ => return None,
        };
        Some(GuestStep { at: event.time_ns, cpu: event.cpu, step })
    }
}

/// The tag and the addresses of an event.
fn range(event: &GuestEvent) -> Option<(u64, Range)> {
    let (tag, start) = (chosen(event.fields.tag?)?, event.fields.iova?);
    let end = start.checked_add(event.fields.size?)?.checked_next_multiple_of(GRANULE)?;
    Some((tag, (start, end)))
}

/// The start of the granule that an event's address is in.
fn granule(event: &GuestEvent) -> Option<u64> {
    Some(event.fields.iova? / GRANULE * GRANULE)
}

/// A link that no sync has covered yet.
struct OpenLink {
    at: u64,
    cpu: Option<u32>,
    range: Range,
}

/// Collects the operations of one boot of the guest from its events.
#[derive(Default)]
struct Guest {
    spans: Vec<GuestSpan>,
    /// By tag.
    links: HashMap<u64, Vec<OpenLink>>,
    /// LINKs that may be in use: their indexes in `spans`, by tag.
    in_use: HashMap<u64, Vec<usize>>,
    /// Commands that were sent and did not complete yet, by endpoint, queue and command identifier.
    commands: HashMap<(u32, u16, u16), GuestSpan>,
}

/// The operations of one boot of the guest, in the order of their first times. `events` must be in the order of time.
pub fn guest_spans(events: impl IntoIterator<Item = GuestStep>) -> Vec<GuestSpan> {
    let mut guest = Guest::default();
    for event in events {
        guest.add(event);
    }
    let Guest { mut spans, commands, .. } = guest;
    spans.extend(commands.into_values());
    spans.sort_unstable_by_key(|span| (span.before.or(span.after), span.key));
    spans
}

impl Guest {
    fn add(&mut self, GuestStep { at, cpu, step }: GuestStep) {
        match step {
            Step::Link { tag, range } => self.links.entry(tag).or_default().push(OpenLink { at, cpu, range }),
            Step::Sync { tag, range, waited } => self.sync(at, cpu, tag, range, waited),
            Step::Unlink { tag, start } => self.end(at, tag, Key::Unlink(tag, start)),
            Step::Release { tag, start } => self.end(at, tag, Key::Release(tag, start)),
            Step::Setup(key) => self.setup(at, key),
            Step::Complete { endpoint, queue, cid } => {
                if let Some(span) = self.commands.remove(&(endpoint, queue, cid)) {
                    self.spans.push(GuestSpan { after: Some(at), ..span });
                }
            }
        }
    }

    /// A sync comes after the answers to all links of its range. Their LINK was posted after the event of the last of
    /// these links, if all of them were made on the sync's CPU. Another CPU could have posted the LINK before that
    /// event was written.
    fn sync(&mut self, at: u64, cpu: Option<u32>, tag: u64, (start, end): Range, waited: bool) {
        let Some(open) = self.links.remove(&tag) else { return };
        let alone = open.iter().all(|link| link.cpu == cpu);
        let (covered, rest): (Vec<_>, Vec<_>) =
            open.into_iter().partition(|link| link.range.0 >= start && link.range.1 <= end);
        for link in covered {
            let (before, after) = (alone.then_some(link.at), waited.then_some(at));
            self.in_use.entry(tag).or_default().push(self.spans.len());
            self.spans.push(GuestSpan { key: Key::Link(tag, link.range.1), before, after, unused: None });
        }
        if !rest.is_empty() {
            self.links.insert(tag, rest);
        }
    }

    /// The events that end links are written before the request is posted.
    fn end(&mut self, at: u64, tag: u64, key: Key) {
        self.links.remove(&tag);
        for index in self.in_use.remove(&tag).unwrap_or_default() {
            // After an UNLINK the rest of its tag may still be in use.
            if let (Key::Release(..), Some(span)) = (key, self.spans.get_mut(index)) {
                span.unused = Some(at);
            }
        }
        self.spans.push(GuestSpan { key, before: Some(at), after: None, unused: None });
    }

    fn setup(&mut self, at: u64, key: Key) {
        let Key::Command { endpoint, queue, cid, .. } = key else { return };
        let span = GuestSpan { key, before: Some(at), after: None, unused: None };
        // If a command with the same identifier was pending, its completion was not traced.
        self.spans.extend(self.commands.insert((endpoint, queue, cid), span));
    }
}

/// The bounds on the clocks' difference that hold if `span` and `host` are the same operation.
pub fn bounds(span: &GuestSpan, host: &HostSpan) -> impl Iterator<Item = Bound> {
    let bound = |at: Option<u64>, time: u64, side| {
        let offset = i64::try_from(i128::from(time) - i128::from(at?)).ok()?;
        Some(Bound { at: at?, side, offset })
    };
    let (first, last) = host.used.unzip();
    [
        bound(span.before, host.start, Side::AtMost),
        bound(span.after, host.end, Side::AtLeast),
        first.and_then(|first| bound(span.after, first, Side::AtMost)),
        last.and_then(|last| bound(span.unused, last, Side::AtLeast)),
    ]
    .into_iter()
    .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu_trace::{Item, TraceFile};

    fn steps(lines: &str) -> Vec<String> {
        let mut file = TraceFile::new(lines.as_bytes()).unwrap();
        let items = std::iter::from_fn(|| Some(file.next_entry().unwrap()?.item));
        let step = |item: Item| match item {
            Item::Guest(event) => format!("{:?}", GuestStep::new(&event).unwrap()),
            other => panic!("{other:?}"),
        };
        items.map(step).collect()
    }

    #[test]
    fn the_events_of_linux_6_12_and_7_3_are_the_same_steps() {
        let lines = |group: &str, link: &str, other: &str, result: &str| {
            let line = |(name, rest): (&str, String)| {
                format!(
                    "{{\"t\":1,\"kind\":\"guest\",\"event\":\"{group}:dma_iova_{name}\",\"cpu\":0,{rest},\"size\":8192,\"tag\":\"0x7\"}}\n"
                )
            };
            let events = [
                ("link", format!("\"phys_addr\":\"0x5000\",\"{link}\":\"0xf000\",\"{result}\":0")),
                ("sync", format!("\"{other}\":\"0xf000\",\"{result}\":-5")),
                ("unlink", format!("\"{other}\":\"0xf000\"")),
                ("free", format!("\"{other}\":\"0xf000\"")),
                ("destroy", format!("\"{other}\":\"0xf000\"")),
            ];
            events.map(line).concat()
        };
        let found = steps(&lines("dma", "dma_addr", "addr", "error"));
        assert_eq!(found.len(), 5);
        assert_eq!(found, steps(&lines("dma_iova", "iova", "iova", "ret")));
    }
}
