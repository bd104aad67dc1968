//! Matches operations of the guest with operations of the device, and derives the guest's clock from that.
//!
//! Both sides give each operation a key, but keys repeat in the course of a trace. Two operations whose key occurs once
//! on each side are the same. From such a pair the clock is followed, forwards and backwards: the pairs that are known
//! leave so little uncertainty that only one operation of the device with the right key is possible. Where no key is
//! unique, as with a queue that is kept full with the same few commands, a first clock is searched: only the durations
//! of the operations tell where the two traces fit.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::Range;
use std::ptr;

use super::clock::{Bound, Clock, Interval};
use super::spans::{GuestSpan, HostSpan, HostSpans, Key, bounds};

/// The clock counts as lost after this many operations without a possible partner.
const LOST: usize = 64;

/// The fewest operations without a partner, in a row, among which a clock is searched.
const STRETCH: usize = 32;

/// How often a stretch in which a clock was searched is halved, to search in both halves.
const CUTS: u32 = 4;

/// The most operations that vote.
const VOTERS: usize = 256;

/// About the most operations of the device that all voters together look at.
const PARTNERS: usize = 200_000;

/// The most clocks that are tried.
const CANDIDATES: usize = 4096;

/// The most operations that are looked at in one comparison of clocks. Each clock looks at all operations nearby.
const LOOKS: usize = 1 << 25;

/// The number of pairs that were found in a boot of the guest, and the clock that they give.
pub struct Tied {
    pub pairs: usize,
    pub clock: Clock,
}

/// Finds the clock of each boot of the guest; `None` for a boot in which no operation could be tied. The operations of
/// each boot must be in the order of their first times.
pub fn tie(boots: &[Vec<GuestSpan>], host: &HostSpans) -> Vec<Option<Tied>> {
    let mut keys: Vec<Key> = boots.iter().flatten().map(|span| span.key).collect();
    keys.sort_unstable();
    let is_unique = |key: &Key| keys.get(keys.partition_point(|other| other < key) + 1) != Some(key);
    boots.iter().map(|spans| tie_boot(spans, host, is_unique)).collect()
}

fn tie_boot(spans: &[GuestSpan], host: &HostSpans, is_unique: impl Fn(&Key) -> bool) -> Option<Tied> {
    let unique = |span: &GuestSpan| match host.of(&span.key) {
        [(_, one)] if is_unique(&span.key) => Some(one),
        _ => None,
    };
    let mut boot = Boot { spans, host, partners: spans.iter().map(unique).collect() };
    boot.follow();
    boot.search(0..spans.len(), CUTS);
    let pairs = spans.iter().zip(&boot.partners).filter_map(|(span, partner)| Some((span, (*partner)?)));
    let clock = Clock::new(pairs.clone().flat_map(|(span, partner)| bounds(span, partner)).collect())?;
    Some(Tied { pairs: pairs.count(), clock })
}

/// The first time of an operation, on the guest's clock.
fn begin(span: &GuestSpan) -> u64 {
    span.before.or(span.after).unwrap_or(0)
}

/// Whether both times are known, so that the time tells which partner is right.
fn is_whole(span: &GuestSpan) -> bool {
    span.before.is_some() && span.after.is_some()
}

/// The possible offsets at a moment of the guest's clock.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    at: u64,
    interval: Interval,
}

/// The operations of the device that an operation of the guest may be.
enum Possible<'a> {
    None,
    One(&'a HostSpan),
    Several,
}

impl Cursor {
    /// The offsets that one pair allows.
    fn new(span: &GuestSpan, partner: &HostSpan) -> Self {
        let start = Cursor { at: begin(span), interval: Interval::ALL };
        start.with(span, partner).unwrap_or(start)
    }

    fn at(&self, time: u64) -> Interval {
        self.interval.away(time.abs_diff(self.at))
    }

    /// The cursor moved to this operation and tightened by its pair's bounds; `None` if they contradict it.
    fn with(&self, span: &GuestSpan, partner: &HostSpan) -> Option<Self> {
        let at = begin(span);
        let alone = |bound: Bound| Interval::of(&bound).away(bound.at.abs_diff(at));
        let interval = bounds(span, partner).fold(self.at(at), |interval, bound| interval.and(alone(bound)));
        (!interval.is_empty()).then_some(Cursor { at, interval })
    }

    /// Which of `several`, all with the operation's key, it can be.
    fn possible<'a>(&self, span: &GuestSpan, several: &'a [(Key, HostSpan)]) -> Possible<'a> {
        let (Some(before), Some(after)) = (span.before, span.after) else { return Possible::Several };
        let (Some(least), Some(most)) = (self.at(before).least, self.at(after).most) else { return Possible::Several };
        let earliest = i128::from(before) + i128::from(least);
        let latest = i128::from(after) + i128::from(most);
        let first = several.partition_point(|(_, host)| i128::from(host.start) < earliest);
        let mut possible = several[first..]
            .iter()
            .map(|(_, host)| host)
            .take_while(|host| i128::from(host.start) <= latest)
            .filter(|host| i128::from(host.end) <= latest);
        match (possible.next(), possible.next()) {
            (None, _) => Possible::None,
            (Some(one), None) => Possible::One(one),
            _ => Possible::Several,
        }
    }
}

/// A boot of the guest, with the pairs that are known.
struct Boot<'a> {
    spans: &'a [GuestSpan],
    host: &'a HostSpans,
    partners: Vec<Option<&'a HostSpan>>,
}

impl<'a> Boot<'a> {
    /// Finds partners for operations near others that have one.
    fn follow(&mut self) {
        for backwards in [false, true] {
            let mut found = Vec::new();
            let all = 0..self.spans.len();
            let note = |index, partner| found.push((index, partner));
            match backwards {
                false => self.walk(all, None, note),
                true => self.walk(all.rev(), None, note),
            };
            self.tie(found);
        }
    }

    fn tie(&mut self, found: Vec<(usize, &'a HostSpan)>) {
        for (index, partner) in found {
            self.partners[index] = Some(partner);
        }
    }

    /// Goes from one operation to the next, keeps track of the possible offsets, and passes each partner that it finds
    /// to `found`. Returns the possible offsets at the end.
    fn walk(
        &self,
        order: impl Iterator<Item = usize>,
        mut cursor: Option<Cursor>,
        mut found: impl FnMut(usize, &'a HostSpan),
    ) -> Option<Cursor> {
        let mut missed = 0;
        for index in order {
            let span = &self.spans[index];
            if let Some(partner) = self.partners[index] {
                // A contradiction means that the clock was set or stood still: start again from this pair.
                let next = cursor.and_then(|cursor| cursor.with(span, partner));
                cursor = next.or_else(|| Some(Cursor::new(span, partner)));
                missed = 0;
                continue;
            }
            let Some(known) = cursor else { continue };
            match known.possible(span, self.host.of(&span.key)) {
                Possible::One(partner) => {
                    if let Some(next) = known.with(span, partner) {
                        found(index, partner);
                        cursor = Some(next);
                        missed = 0;
                    }
                }
                Possible::None => missed += 1,
                Possible::Several => {}
            }
            if missed > LOST {
                cursor = None;
            }
        }
        cursor
    }

    /// Searches for a clock where no operation has a partner.
    fn search(&mut self, within: Range<usize>, cuts: u32) {
        for stretch in self.untied(within) {
            if let Some((middle, seed)) = self.seed(&stretch) {
                let mut found = Vec::new();
                self.walk(middle..stretch.end, Some(seed), |index, partner| found.push((index, partner)));
                self.walk((stretch.start..middle).rev(), Some(seed), |index, partner| found.push((index, partner)));
                if self.are_free(&found) {
                    self.tie(found);
                    self.follow();
                }
            }
            if cuts > 0 {
                let middle = stretch.start + stretch.len() / 2;
                self.search(stretch.start..middle, cuts - 1);
                self.search(middle..stretch.end, cuts - 1);
            }
        }
    }

    /// Whether most of these partners are still free. Where the device's trace lacks a part, an earlier part may look
    /// the same.
    fn are_free(&self, found: &[(usize, &HostSpan)]) -> bool {
        let taken: HashSet<*const HostSpan> =
            self.partners.iter().flatten().map(|partner| ptr::from_ref(*partner)).collect();
        found.iter().filter(|(_, partner)| taken.contains(&ptr::from_ref(*partner))).count() * 2 < found.len()
    }

    /// The stretches in which many operations in a row have no partner.
    fn untied(&self, within: Range<usize>) -> Vec<Range<usize>> {
        let mut stretches = Vec::new();
        let (mut start, mut count) = (within.start, 0);
        for index in within.start..=within.end {
            if index < within.end && self.partners[index].is_none() {
                count += usize::from(is_whole(&self.spans[index]));
                continue;
            }
            if count >= STRETCH {
                stretches.push(start..index);
            }
            (start, count) = (index + 1, 0);
        }
        stretches
    }

    /// The middle of a stretch, and the possible offsets there. Each operation nearby votes for every offset that would
    /// match it with one of the device. Then the clocks with nearly as many votes as the best are followed and
    /// compared.
    fn seed(&self, stretch: &Range<usize>) -> Option<(usize, Cursor)> {
        let middle = stretch.start + stretch.len() / 2;
        let at = begin(&self.spans[middle]);
        let votes = self.votes(stretch, middle);
        let rivals = candidates(votes).into_iter().map(|interval| Cursor { at, interval }).collect();
        Some((middle, self.best(stretch, middle, rivals)?))
    }

    /// The votes of operations around the middle: for each, the offsets that would match it with one of the device, as
    /// disjoint ranges.
    fn votes(&self, stretch: &Range<usize>, middle: usize) -> Vec<Vec<(i64, i64)>> {
        let at = begin(&self.spans[middle]);
        let nearest =
            (0..stretch.len()).flat_map(|distance| [middle.checked_sub(distance + 1), Some(middle + distance)]);
        let nearest = nearest.flatten().filter(|index| stretch.contains(index));
        let mut votes: Vec<Vec<(i64, i64)>> = Vec::new();
        let mut looks = 0;
        for span in nearest.map(|index| &self.spans[index]).filter(|span| is_whole(span)) {
            if looks >= PARTNERS {
                break;
            }
            let partners = self.host.of(&span.key);
            looks += partners.len();
            let mut possible: Vec<(i64, i64)> = partners
                .iter()
                .filter_map(|(_, host)| {
                    let Cursor { interval, .. } = Cursor { at, interval: Interval::ALL }.with(span, host)?;
                    let interval = interval.away(begin(span).abs_diff(at));
                    interval.least.zip(interval.most)
                })
                .collect();
            // Some have no partner at all: a LINK carries all pieces of a buffer, and is found by the first.
            if possible.is_empty() {
                continue;
            }
            possible.sort_unstable();
            possible.dedup_by(|next, last| {
                let touches = next.0 <= last.1;
                last.1 = if touches { last.1.max(next.1) } else { last.1 };
                touches
            });
            votes.push(possible);
            if votes.len() >= VOTERS {
                break;
            }
        }
        votes
    }

    /// The rival that is clearly better than all others: with it the times between operations fit best, and it ties the
    /// most operations. `None` if there is none, or if too many rivals stay equal for too long.
    fn best(&self, stretch: &Range<usize>, middle: usize, mut rivals: Vec<Cursor>) -> Option<Cursor> {
        let mut reach = 1 << 10;
        loop {
            let (first, last) = (stretch.start.max(middle.saturating_sub(reach)), stretch.end.min(middle + reach));
            if rivals.len().saturating_mul(last - first) > LOOKS {
                return None;
            }
            let mut fits: Vec<Fit> = rivals.iter().map(|seed| self.fit(*seed, first, middle, last)).collect();
            let most = fits.iter().map(|fit| fit.pairs).max()?;
            fits.retain(|fit| fit.pairs >= STRETCH / 2 && fit.pairs * 4 >= most);
            let (misfit, pairs) = fits.iter().map(|fit| (fit.misfit, fit.pairs)).min()?;
            // Five times the deviation that a median of so many values has by chance.
            let limit = misfit.saturating_add(misfit.saturating_mul(5) / pairs.isqrt() as u64);
            fits.retain(|fit| fit.misfit <= limit);
            let most = fits.iter().map(|fit| fit.pairs).max()?;
            fits.retain(|fit| fit.pairs * 10 > most * 9);
            // Two rivals that ended at the same offset are one.
            fits.dedup_by(|one, other| match (one.end, other.end) {
                (Some(one), Some(other)) => !one.at(other.at).and(other.interval).is_empty(),
                _ => false,
            });
            match fits[..] {
                [Fit { seed, .. }] => return Some(seed),
                _ if first == stretch.start && last == stretch.end => return None,
                _ => rivals = fits.into_iter().map(|fit| fit.seed).collect(),
            }
            reach *= 8;
        }
    }

    /// Follows a clock from the middle to both ends, and says how well it fits.
    fn fit(&self, seed: Cursor, first: usize, middle: usize, last: usize) -> Fit {
        let mut misfits = Vec::new();
        let mut previous: Option<(u64, u64)> = None;
        let mut note = |index: usize, partner: &HostSpan| {
            let Some(after) = self.spans[index].after else { return };
            if let Some((last_after, last_end)) = previous {
                let (guest, host) =
                    (i128::from(after) - i128::from(last_after), i128::from(partner.end) - i128::from(last_end));
                misfits.push(u64::try_from((guest - host).abs()).unwrap_or(u64::MAX));
            }
            previous = Some((after, partner.end));
        };
        let end = self.walk(middle..last, Some(seed), &mut note);
        self.walk((first..middle).rev(), Some(seed), &mut note);
        let pairs = misfits.len();
        let misfit = if pairs == 0 { u64::MAX } else { *misfits.select_nth_unstable(pairs / 2).1 };
        Fit { seed, pairs, misfit, end }
    }
}

/// How well a clock fits the operations.
struct Fit {
    seed: Cursor,
    /// The number of operations that it ties.
    pairs: usize,
    /// The median, over all pairs, of how much the time since the end of the pair before differs between the guest and
    /// the device, ns.
    misfit: u64,
    /// The possible offsets at the last operation.
    end: Option<Cursor>,
}

/// The offsets with nearly as many votes as the best. None, if the best has less than half of all voters.
fn candidates(votes: Vec<Vec<(i64, i64)>>) -> Vec<Interval> {
    let voters = votes.len();
    // Ranges include their ends, and the sort puts a start before an end at the same offset.
    let mut edges: Vec<(i64, bool)> =
        votes.into_iter().flatten().flat_map(|(least, most)| [(least, false), (most, true)]).collect();
    edges.sort_unstable();
    let counts = || {
        edges.iter().scan(0_usize, |count, &(offset, ends)| {
            *count = if ends { *count - 1 } else { *count + 1 };
            Some((offset, *count))
        })
    };
    let most = counts().map(|(_, count)| count).max().unwrap_or(0);
    if most < 2 || most * 2 < voters {
        return Vec::new();
    }
    let mut found: Vec<(usize, Interval)> = Vec::new();
    let mut open: Option<(usize, i64)> = None;
    for (offset, count) in counts() {
        let is_high = count * 10 >= most * 9;
        match open {
            None if is_high => open = Some((count, offset)),
            Some((high, least)) if is_high => open = Some((high.max(count), least)),
            Some((high, least)) => {
                found.push((high, Interval { least: Some(least), most: Some(offset) }));
                open = None;
            }
            None => {}
        }
    }
    // Too many are as good as the best. To pick some would be a guess.
    if found.iter().filter(|(high, _)| *high == most).count() > CANDIDATES {
        return Vec::new();
    }
    found.sort_by_key(|(high, _)| Reverse(*high));
    found.truncate(CANDIDATES);
    found.into_iter().map(|(_, interval)| interval).collect()
}

#[cfg(test)]
mod tests;
