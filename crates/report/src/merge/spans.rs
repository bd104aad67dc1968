//! What each side says of the operations that both of them see.
//!
//! | in the guest, before | of the device, with its start and end | in the guest, after |
//! |---|---|---|
//! | `dma_iova_link`, the last that went into a request | LINK | `dma_iova_sync` |
//! | `dma_iova_sync` | the first and the last access with the LINK's tag | `dma_iova_destroy`, `dma_iova_free` |
//! | `dma_iova_unlink` | UNLINK | |
//! | `dma_iova_destroy`, `dma_iova_free` | RELEASE | |
//! | `nvme_setup_cmd` | NVMe command | `nvme_complete_rq` |

use std::collections::HashMap;

use super::clock::{Bound, Side};
use viommu_trace::{Event, GuestEvent, Stamped};
use viommu_wire::model::Model;
use viommu_wire::nvme;
use viommu_wire::request::RequestType;

/// The granule of the addresses that are compared.
const GRANULE: u64 = 4096;

/// What both sides say of an operation. It comes back in the course of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A tag, and the address behind the last one that was linked.
    Link(u64, u64),
    /// A tag, and the first address.
    Unlink(u64, u64),
    /// A tag, and the reservation's first address.
    Release(u64, u64),
    /// A command of an I/O queue of an NVMe controller.
    Command { endpoint: u32, queue: u16, cid: u16, opcode: u8, slba: u64 },
}

/// What the guest traced of an operation.
#[derive(Debug)]
pub struct GuestSpan {
    pub key: Key,
    /// Before the device began.
    pub before: Option<u64>,
    /// After the device had ended; from then on it may use what was linked.
    pub after: Option<u64>,
    /// When it does not use that any more.
    pub unused: Option<u64>,
}

/// When the device did it, and when it used what was linked first and last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSpan {
    pub start: u64,
    pub end: u64,
    used: Option<(u64, u64)>,
}

/// The device's operations.
pub struct HostSpans {
    /// In the order of the keys, those of one key in the order of their times, once all were added.
    spans: Vec<(Key, HostSpan)>,
    /// What is linked: by tag, the ranges with their LINKs' places among the spans.
    linked: HashMap<u64, Vec<(u64, u64, usize)>>,
}

impl HostSpans {
    /// None yet.
    pub fn new() -> Self {
        HostSpans { spans: Vec::new(), linked: HashMap::new() }
    }

    /// Takes note of an event. Events come in their order.
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

    /// An access through what a LINK linked. After an UNLINK with its tag nothing is known any more.
    fn access(&mut self, time: u64, iova: u64, tag: u64) -> Option<()> {
        let linked = self.linked.get(&chosen(tag)?)?;
        let (.., index) = linked.iter().rfind(|(start, end, _)| (*start..*end).contains(&iova))?;
        let (_, span) = self.spans.get_mut(*index)?;
        let (first, last) = span.used.unwrap_or((time, time));
        span.used = Some((first.min(time), last.max(time)));
        Some(())
    }

    /// All events were added.
    pub fn sort(&mut self) {
        self.linked = HashMap::new();
        self.spans.sort_unstable_by_key(|(key, span)| (*key, span.start));
    }

    /// The operations with this key, in the order of their times.
    pub fn of(&self, key: &Key) -> &[(Key, HostSpan)] {
        let first = self.spans.partition_point(|(other, _)| other < key);
        let rest = &self.spans[first..];
        // Most have few.
        let mut len = 1;
        while rest.get(len - 1).is_some_and(|(other, _)| other == key) {
            len *= 2;
        }
        let rest = &rest[..len.min(rest.len())];
        &rest[..rest.partition_point(|(other, _)| other == key)]
    }
}

/// What an event is about, and how long the device took for it.
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

/// A tag that somebody chose.
fn chosen(tag: u64) -> Option<u64> {
    (tag != 0).then_some(tag)
}

/// An event of the guest, as far as it matters.
#[derive(Clone, Copy, Debug)]
pub struct GuestStep {
    /// The guest's time, ns.
    pub at: u64,
    cpu: Option<u32>,
    step: Step,
}

/// A range of addresses: the first, and the granule behind the last.
type Range = (u64, u64);

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Something was linked.
    Link { tag: u64, range: Range },
    /// What was linked is there (`waited`), or not.
    Sync { tag: u64, range: Range, waited: bool },
    /// What was linked goes.
    Unlink { tag: u64, start: u64 },
    /// The reservation goes.
    Release { tag: u64, start: u64 },
    /// A command is sent.
    Setup(Key),
    /// A command was completed.
    Complete { endpoint: u32, queue: u16, cid: u16 },
}

impl GuestStep {
    /// `None`: the event does not matter, or lacks what it has to have.
    pub fn new(event: &GuestEvent) -> Option<Self> {
        let fields = &event.fields;
        let step = match event.name.as_str() {
            "dma_iova:dma_iova_link" if fields.ret == Some(0) => {
                let (tag, range) = range(event)?;
                Step::Link { tag, range }
            }
            "dma_iova:dma_iova_sync" => {
                let (tag, range) = range(event)?;
                Step::Sync { tag, range, waited: fields.ret == Some(0) }
            }
            "dma_iova:dma_iova_unlink" => Step::Unlink { tag: chosen(fields.tag?)?, start: granule(event)? },
            "dma_iova:dma_iova_destroy" | "dma_iova:dma_iova_free" => {
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

/// An event's tag and addresses.
fn range(event: &GuestEvent) -> Option<(u64, Range)> {
    let (tag, start) = (chosen(event.fields.tag?)?, event.fields.iova?);
    let end = start.checked_add(event.fields.size?)?.checked_next_multiple_of(GRANULE)?;
    Some((tag, (start, end)))
}

/// Where the granule of an event's address begins.
fn granule(event: &GuestEvent) -> Option<u64> {
    Some(event.fields.iova? / GRANULE * GRANULE)
}

/// A link that was not waited for yet.
struct OpenLink {
    at: u64,
    cpu: Option<u32>,
    range: Range,
}

/// Makes operations of the events of one life of the guest.
#[derive(Default)]
struct Guest {
    spans: Vec<GuestSpan>,
    /// By tag.
    links: HashMap<u64, Vec<OpenLink>>,
    /// LINKs that may be in use: by tag, where they are among the spans.
    in_use: HashMap<u64, Vec<usize>>,
    /// Commands that were sent, by endpoint, queue and identifier.
    commands: HashMap<(u32, u16, u16), GuestSpan>,
}

/// The operations of one life of the guest, in the order of their first times, from its events in the order of theirs.
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

    /// A sync comes after the answers to all links of its range. Its LINK was posted after the event of the last link in
    /// it, if no other processor was at work there: another one could have posted it before that event was written.
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

    /// What ends links is written before its request is posted.
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
        // The completion of one that is sent again was not seen.
        self.spans.extend(self.commands.insert((endpoint, queue, cid), span));
    }
}

/// What follows for the clocks if the two are one operation.
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
