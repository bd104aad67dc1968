//! Which events of the guest and of the device belong together, and what follows for their clocks.
//!
//! | in the guest, before | of the device, with its start and end | in the guest, after |
//! |---|---|---|
//! | `dma_iova_link`, the last that went into a request | LINK | `dma_iova_sync` |
//! | `dma_iova_sync` | the first and the last access with the LINK's tag | `dma_iova_destroy`, `dma_iova_free` |
//! | `dma_iova_unlink` | UNLINK | |
//! | `dma_iova_destroy`, `dma_iova_free` | RELEASE | |
//! | `nvme_setup_cmd` | NVMe command | `nvme_complete_rq` |
//!
//! They are found by what both sides say: tag and I/O virtual address, or queue, command identifier, opcode and first
//! block. Both come back in the course of a trace. So first come those that are unique in the whole of it; with the clock
//! that these make, the others are found among those that are possible at that time.

use std::collections::HashMap;

use serde::Deserialize;

use super::clock::{Bound, Clock, Side};
use crate::trace::nvme_opcode;

/// The granule of the addresses that are compared.
const GRANULE: u64 = 4096;

/// What both sides say of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// A tag, and the address behind the last one that was linked.
    Link(u64, u64),
    /// A tag, and the first address.
    Unlink(u64, u64),
    /// A tag, and the reservation's first address.
    Release(u64, u64),
    /// Endpoint, queue, command identifier, opcode and first block.
    Command(u32, u16, u16, String, u64),
}

/// What the guest traced of an operation.
#[derive(Debug)]
struct GuestSpan {
    key: Key,
    /// Before the device began.
    before: Option<u64>,
    /// After the device had ended; from then on it may use what was linked.
    after: Option<u64>,
    /// When it does not use that any more.
    unused: Option<u64>,
}

/// When the device did it, and when it used what was linked first and last.
#[derive(Clone, Copy, Debug)]
struct HostSpan {
    start: u64,
    end: u64,
    used: Option<(u64, u64)>,
}

/// The members of the host's lines that matter here.
#[derive(Deserialize)]
pub struct HostLine<'a> {
    pub t: u64,
    kind: &'a str,
    #[serde(default)]
    duration_ns: u64,
    #[serde(rename = "type")]
    request: Option<&'a str>,
    tag: Option<&'a str>,
    virt_start: Option<&'a str>,
    virt_end: Option<&'a str>,
    iova: Option<&'a str>,
    endpoint: Option<u32>,
    model: Option<&'a str>,
    opcode: Option<&'a str>,
    queue: Option<u16>,
    cid: Option<u16>,
    slba: Option<u64>,
}

/// The members of the guest's lines that matter here.
#[derive(Debug, Deserialize)]
pub struct GuestLine<'a> {
    pub t: u64,
    pub kind: &'a str,
    event: Option<&'a str>,
    cpu: Option<u32>,
    tag: Option<&'a str>,
    iova: Option<&'a str>,
    size: Option<u64>,
    ret: Option<i64>,
    endpoint: Option<u32>,
    qid: Option<u16>,
    cid: Option<u16>,
    opcode: Option<u8>,
    slba: Option<u64>,
    /// Of a `hello`.
    pub version: Option<u32>,
}

/// `"0x104b2000"`
fn number(text: Option<&str>) -> Option<u64> {
    u64::from_str_radix(text?.strip_prefix("0x")?, 16).ok()
}

/// A tag that somebody chose.
fn tag(text: Option<&str>) -> Option<u64> {
    number(text).filter(|tag| *tag != 0)
}

/// The device's operations, by what is known of them.
#[derive(Default)]
pub struct HostSpans {
    spans: HashMap<Key, Vec<HostSpan>>,
    /// What is linked: by tag, the ranges with the keys of their LINKs.
    linked: HashMap<u64, Vec<(u64, Key)>>,
}

impl HostSpans {
    /// Takes note of an event. Events come in their order.
    pub fn add(&mut self, line: &HostLine) {
        if line.kind == "dma" {
            self.access(line);
            return;
        }
        let Some(key) = host_key(line) else { return };
        match key {
            Key::Link(tag, _) => {
                let start = number(line.virt_start).unwrap_or(0);
                self.linked.entry(tag).or_default().push((start, key.clone()));
            }
            Key::Unlink(tag, _) | Key::Release(tag, _) => drop(self.linked.remove(&tag)),
            Key::Command(..) => {}
        }
        let span = HostSpan { start: line.t.saturating_sub(line.duration_ns), end: line.t, used: None };
        self.spans.entry(key).or_default().push(span);
    }

    /// An access through what a LINK linked. After an UNLINK with its tag nothing is known any more.
    fn access(&mut self, line: &HostLine) -> Option<()> {
        let iova = number(line.iova)?;
        let linked = self.linked.get(&tag(line.tag)?)?;
        let contains = |(start, key): &&(u64, Key)| matches!(key, Key::Link(_, end) if (*start..*end).contains(&iova));
        let (_, key) = linked.iter().rfind(contains)?;
        let span = self.spans.get_mut(key)?.last_mut()?;
        let (first, last) = span.used.unwrap_or((line.t, line.t));
        span.used = Some((first.min(line.t), last.max(line.t)));
        Some(())
    }
}

fn host_key(line: &HostLine) -> Option<Key> {
    match line.kind {
        "request" => {
            let (tag, start) = (tag(line.tag)?, number(line.virt_start)?);
            match line.request? {
                "LINK" => Some(Key::Link(tag, number(line.virt_end)?.wrapping_add(1))),
                "UNLINK" => Some(Key::Unlink(tag, start)),
                "RELEASE" => Some(Key::Release(tag, start)),
                _ => None,
            }
        }
        "command" if line.model == Some("nvme") && line.queue != Some(0) => {
            Some(Key::Command(line.endpoint?, line.queue?, line.cid?, line.opcode?.into(), line.slba?))
        }
        _ => None,
    }
}

/// Links that were not waited for yet, by tag.
type OpenLinks = HashMap<u64, Vec<OpenLink>>;

struct OpenLink {
    at: u64,
    cpu: Option<u32>,
    start: u64,
    end: u64,
}

/// A command that the guest has sent: when, and its opcode and first block.
type OpenCommands = HashMap<(u32, u16, u16), GuestSpan>;

/// The operations of one life of the guest, whose events are in the order of their times.
fn guest_spans<'a>(lines: impl Iterator<Item = &'a GuestLine<'a>>) -> Vec<GuestSpan> {
    let (mut links, mut commands) = (OpenLinks::new(), OpenCommands::new());
    // Those that may be in use: by tag, where they are in the list.
    let mut in_use: HashMap<u64, Vec<usize>> = HashMap::new();
    let mut spans = Vec::new();
    for line in lines {
        // A line that lacks what its event has to have says nothing.
        let _ = match line.event {
            Some("dma_iova:dma_iova_link") => link(line, &mut links),
            Some("dma_iova:dma_iova_sync") => sync(line, &mut links, &mut in_use, &mut spans),
            Some("dma_iova:dma_iova_unlink") => end(line, &mut links, &mut in_use, &mut spans, Key::Unlink),
            Some("dma_iova:dma_iova_destroy" | "dma_iova:dma_iova_free") => {
                end(line, &mut links, &mut in_use, &mut spans, Key::Release)
            }
            Some("nvme:nvme_setup_cmd") => setup(line, &mut commands, &mut spans),
            Some("nvme:nvme_complete_rq") => complete(line, &mut commands, &mut spans),
            _ => None,
        };
    }
    spans.extend(commands.into_values());
    spans
}

/// An event's tag, and its addresses from the first to the granule behind the last.
fn range(line: &GuestLine) -> Option<(u64, u64, u64)> {
    let (tag, start) = (tag(line.tag)?, number(line.iova)?);
    let end = start.checked_add(line.size?)?.checked_next_multiple_of(GRANULE)?;
    Some((tag, start, end))
}

fn link(line: &GuestLine, links: &mut OpenLinks) -> Option<()> {
    let (tag, start, end) = range(line)?;
    if line.ret == Some(0) {
        links.entry(tag).or_default().push(OpenLink { at: line.t, cpu: line.cpu, start, end });
    }
    Some(())
}

/// A sync comes after the answers to all links of its range. Its LINK was posted after the event of the last link in it,
/// if no other processor was at work there: another one could have posted it before that event was written.
fn sync(
    line: &GuestLine,
    links: &mut OpenLinks,
    in_use: &mut HashMap<u64, Vec<usize>>,
    spans: &mut Vec<GuestSpan>,
) -> Option<()> {
    let (tag, start, end) = range(line)?;
    let waited = line.ret == Some(0);
    let open = links.remove(&tag)?;
    let alone = open.iter().all(|link| link.cpu == line.cpu);
    let (covered, rest): (Vec<_>, Vec<_>) = open.into_iter().partition(|link| link.start >= start && link.end <= end);
    for link in covered {
        let (before, after) = (alone.then_some(link.at), waited.then_some(line.t));
        in_use.entry(tag).or_default().push(spans.len());
        spans.push(GuestSpan { key: Key::Link(tag, link.end), before, after, unused: None });
    }
    if !rest.is_empty() {
        links.insert(tag, rest);
    }
    Some(())
}

/// What ends links is written before its request is posted.
fn end(
    line: &GuestLine,
    links: &mut OpenLinks,
    in_use: &mut HashMap<u64, Vec<usize>>,
    spans: &mut Vec<GuestSpan>,
    key: fn(u64, u64) -> Key,
) -> Option<()> {
    let (tag, start) = (tag(line.tag)?, number(line.iova)?);
    links.remove(&tag);
    let key = key(tag, start / GRANULE * GRANULE);
    for at in in_use.remove(&tag).unwrap_or_default() {
        // After an UNLINK the rest of its tag may still be in use.
        if let (Key::Release(..), Some(span)) = (&key, spans.get_mut(at)) {
            span.unused = Some(line.t);
        }
    }
    spans.push(GuestSpan { key, before: Some(line.t), after: None, unused: None });
    Some(())
}

fn setup(line: &GuestLine, commands: &mut OpenCommands, spans: &mut Vec<GuestSpan>) -> Option<()> {
    let (endpoint, queue, cid) = (line.endpoint?, line.qid?, line.cid?);
    let key = Key::Command(endpoint, queue, cid, nvme_opcode(queue, line.opcode?), line.slba?);
    let span = GuestSpan { key, before: Some(line.t), after: None, unused: None };
    spans.extend(commands.insert((endpoint, queue, cid), span));
    Some(())
}

fn complete(line: &GuestLine, commands: &mut OpenCommands, spans: &mut Vec<GuestSpan>) -> Option<()> {
    let mut span = commands.remove(&(line.endpoint?, line.qid?, line.cid?))?;
    span.after = Some(line.t);
    spans.push(span);
    Some(())
}

/// How many pairs were found in a life of the guest, and the clock that follows.
pub struct Tied {
    pub pairs: usize,
    pub clock: Clock,
}

/// Finds the clock of each life of the guest; `None` for one in which nothing could be tied. The events of each are in
/// the order of their times.
pub fn tie(lives: &[Vec<GuestLine>], host: &HostSpans) -> Vec<Option<Tied>> {
    let lives: Vec<Vec<GuestSpan>> = lives.iter().map(|lines| guest_spans(lines.iter())).collect();
    let mut uses: HashMap<&Key, usize> = HashMap::new();
    for span in lives.iter().flatten() {
        *uses.entry(&span.key).or_default() += 1;
    }
    let is_unique = |span: &GuestSpan| uses.get(&span.key) == Some(&1);
    lives.iter().map(|spans| tie_life(spans, host, is_unique)).collect()
}

fn tie_life(spans: &[GuestSpan], host: &HostSpans, is_unique: impl Fn(&GuestSpan) -> bool) -> Option<Tied> {
    let mut pairs = Vec::new();
    let mut ambiguous = Vec::new();
    for span in spans {
        match host.spans.get(&span.key).map(Vec::as_slice) {
            Some([one]) if is_unique(span) => pairs.push((span, *one)),
            Some(several) => ambiguous.push((span, several)),
            None => {}
        }
    }
    let coarse = Clock::new(pairs.iter().flat_map(|(span, host)| bounds(span, host)).collect())?;
    pairs.extend(
        ambiguous.into_iter().filter_map(|(span, several)| Some((span, only_possible(span, several, &coarse)?))),
    );
    let clock = Clock::new(pairs.iter().flat_map(|(span, host)| bounds(span, host)).collect())?;
    Some(Tied { pairs: pairs.len(), clock })
}

/// The one of several that a clock leaves possible.
fn only_possible(span: &GuestSpan, several: &[HostSpan], clock: &Clock) -> Option<HostSpan> {
    let (before, after) = (i128::from(span.before?), i128::from(span.after?));
    let (first, last) = (clock.offset(span.before?), clock.offset(span.after?));
    let earliest = before + i128::from(first.value) - i128::from(first.error?);
    let latest = after + i128::from(last.value) + i128::from(last.error?);
    let mut possible =
        several.iter().filter(|host| i128::from(host.start) >= earliest && i128::from(host.end) <= latest);
    let found = possible.next()?;
    possible.next().is_none().then_some(*found)
}

fn bounds(span: &GuestSpan, host: &HostSpan) -> impl Iterator<Item = Bound> {
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

    /// A world in which the host's clock is 1 s ahead. Each I/O takes 100 µs and uses the same tag, address and command
    /// identifier; blocks differ, but for the first two.
    fn lines(count: u64) -> (Vec<String>, Vec<String>) {
        let (mut host, mut guest) = (Vec::new(), Vec::new());
        for n in 0..count {
            let t = 1_000_000 + n * 100_000;
            let (tag, iova, block) = ("0x100000000000007", "0xfffd0000", if n < 2 { 0 } else { n * 8 });
            let mut say =
                |after: u64, text: String| guest.push(format!("{{\"t\":{},\"kind\":\"guest\",{text}}}", t + after));
            say(
                0,
                format!(
                    "\"event\":\"nvme:nvme_setup_cmd\",\"endpoint\":32,\"qid\":1,\"cid\":9,\"opcode\":2,\"slba\":{block}"
                ),
            );
            let range = format!("\"cpu\":0,\"iova\":\"{iova}\",\"size\":8192,\"tag\":\"{tag}\"");
            say(5_000, format!("\"event\":\"dma_iova:dma_iova_link\",{range},\"ret\":0"));
            say(9_000, format!("\"event\":\"dma_iova:dma_iova_sync\",{range},\"ret\":0"));
            say(60_000, "\"event\":\"nvme:nvme_complete_rq\",\"endpoint\":32,\"qid\":1,\"cid\":9".into());
            say(70_000, format!("\"event\":\"dma_iova:dma_iova_destroy\",{range}"));
            let mut say =
                |after: u64, text: String| host.push(format!("{{\"t\":{},{text}}}", t + 1_000_000_000 + after));
            let range =
                format!("\"kind\":\"request\",\"virt_start\":\"{iova}\",\"virt_end\":\"0xfffd1fff\",\"tag\":\"{tag}\"");
            say(8_000, format!("{range},\"type\":\"LINK\",\"duration_ns\":2000"));
            say(
                50_000,
                format!(
                    "\"kind\":\"command\",\"endpoint\":32,\"model\":\"nvme\",\"queue\":1,\"cid\":9,\"opcode\":\"read\",\"slba\":{block},\"duration_ns\":30000"
                ),
            );
            say(90_000, format!("{range},\"type\":\"RELEASE\",\"duration_ns\":1000"));
        }
        (host, guest)
    }

    fn tied(host: &[String], guest: &[String]) -> Option<Tied> {
        let mut spans = HostSpans::default();
        host.iter().for_each(|line| spans.add(&serde_json::from_str(line).unwrap()));
        let life = guest.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        tie(&[life], &spans).pop().unwrap()
    }

    #[test]
    fn unique_pairs_make_a_clock_with_which_the_others_are_found() {
        let (host, guest) = lines(20);
        let Tied { pairs, clock } = tied(&host, &guest).unwrap();
        // 18 commands are unique; with them 2 commands and 20 LINKs. A RELEASE has no later bound.
        assert_eq!(pairs, 18 + 2 + 20);
        assert_eq!(clock.breaks().count(), 0);
        // From 1 µs after the link to 1 µs before the sync's return, and some for the drift.
        let offset = clock.offset(1_000_000 + 10 * 100_000 + 5_000);
        assert!(offset.value.abs_diff(1_000_000_000) <= 10 && offset.error.unwrap() <= 1_010, "{offset:?}");
    }

    #[test]
    fn a_tag_that_is_unique_is_enough_and_without_anything_there_is_no_clock() {
        let (host, guest) = lines(1);
        let is_dma = |line: &&String| line.contains("tag");
        let only = |lines: &[String]| lines.iter().filter(is_dma).cloned().collect::<Vec<_>>();
        let Tied { pairs, clock } = tied(&only(&host), &only(&guest)).unwrap();
        assert_eq!(pairs, 2);
        assert_eq!(clock.offset(1_005_000).error, Some(1_002));
        assert!(tied(&host, &[]).is_none());
        let (other, _) = lines(3);
        assert!(tied(&other[3..6], &only(&guest)).is_some());
        let untagged: Vec<_> = only(&guest).iter().map(|line| line.replace("0x100000000000007", "0x0")).collect();
        assert!(tied(&host, &untagged).is_none());
    }

    #[test]
    fn a_link_that_another_processor_may_have_posted_bounds_one_side_only() {
        let (host, guest) = lines(1);
        let guest: Vec<_> = guest
            .iter()
            .filter(|line| line.contains("link") || line.contains("sync"))
            .map(|line| if line.contains("sync") { line.replace("\"cpu\":0", "\"cpu\":1") } else { line.clone() })
            .collect();
        assert_eq!(tied(&host, &guest).unwrap().clock.offset(1_005_000).error, None);
    }
}
