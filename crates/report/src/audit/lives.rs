//! What was mapped, linked and reserved in a domain, by whom, and what became of it.

use std::collections::{BTreeMap, VecDeque};

use super::GRANULE;
use super::groups::Owner;

/// How many ended lives a domain remembers, so that a fault can be explained by the last life of its address.
const REMEMBERED: usize = 1 << 14;

/// The most pages of a life whose accesses are told apart. Of a longer one only the bytes count.
const PAGES_MAX: u64 = 1 << 12;

/// An event of the trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Its number.
    pub seq: u64,
    /// Its time, ns.
    pub time_ns: u64,
}

/// By what addresses became accessible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// By a MAP.
    Mapped,
    /// By a LINK.
    Linked,
}

/// A range of addresses that was accessible.
#[derive(Clone, Debug)]
pub struct Life {
    /// The last address.
    pub end: u64,
    pub how: How,
    /// `VIRTIO_IOMMU_MAP_F_*`
    pub flags: u32,
    /// The MAP or LINK, or the item of the live state.
    pub made: Moment,
    /// Whom it belongs to, as long as it lives, with the tag of the LINK.
    pub owner: Owner,
    /// Whether it was there before the trace, so that what happened to it is not known.
    pub is_old: bool,
    /// The pages that were accessed, a bit each, from `first_page` on; empty if none was.
    pages: Vec<u64>,
    first_page: u64,
    /// Accesses.
    pub runs: u64,
    /// The commands that it served.
    pub uses: Uses,
}

/// The commands whose data had all pages of a range.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uses {
    first: Option<Served>,
    count: u32,
}

impl Uses {
    /// Notes a command whose data are from `data.0` to `data.1`, if the range from `start` to `end` has nothing but pages
    /// of them.
    fn note(&mut self, (start, end): (u64, u64), data: (u64, u64), completed: Moment, ns: u64) {
        if start >= data.0 / GRANULE * GRANULE && end <= data.1 | (GRANULE - 1) {
            self.count += 1;
            self.first.get_or_insert(Served { completed, ns, first: start <= data.0 });
        }
    }

    /// The only one.
    pub fn once(&self) -> Option<Served> {
        self.first.filter(|_| self.count == 1)
    }
}

/// A command that a range was made for.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    /// Its completion.
    pub completed: Moment,
    /// The time from fetching to completing it, ns.
    pub ns: u64,
    /// Whether the command's data begin here.
    pub first: bool,
}

impl Life {
    /// One of this trace. Its owner has the tag, and is still to be completed.
    pub fn new(start: u64, end: u64, how: How, tag: u64, flags: u32, made: Moment) -> Life {
        let owner = Owner { tag, size: (end - start).saturating_add(1), endpoint: None };
        let first_page = start / GRANULE;
        Life {
            end,
            how,
            flags,
            made,
            owner,
            is_old: false,
            pages: Vec::new(),
            first_page,
            runs: 0,
            uses: Uses::default(),
        }
    }

    /// Notes an access to these addresses, which are in the range.
    pub fn access(&mut self, start: u64, len: u64) {
        self.runs += 1;
        let pages = self.end / GRANULE - self.first_page + 1;
        if pages > PAGES_MAX || len == 0 {
            return;
        }
        if self.pages.is_empty() {
            self.pages = vec![0; pages.div_ceil(64) as usize];
        }
        let first = (start / GRANULE).saturating_sub(self.first_page);
        let last = (start.saturating_add(len - 1) / GRANULE).saturating_sub(self.first_page).min(pages - 1);
        for page in first..=last {
            self.pages[page as usize / 64] |= 1 << (page % 64);
        }
    }

    /// Pages that were accessed, if they were told apart.
    pub fn accessed_pages(&self) -> u64 {
        self.pages.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The part from `start` on, as a life of its own. This one keeps what is before.
    fn split_off(&mut self, own_start: u64, start: u64) -> Life {
        let mut rest = Life::new(start, self.end, self.how, self.owner.tag, self.flags, self.made);
        (rest.owner, rest.is_old, rest.uses) = (self.owner, self.is_old, self.uses);
        let accessed: Vec<u64> = (0..self.pages.len() as u64 * 64)
            .filter(|page| self.pages[*page as usize / 64] >> (page % 64) & 1 == 1)
            .map(|page| (self.first_page + page) * GRANULE)
            .collect();
        self.end = start - 1;
        let runs = self.runs;
        (self.pages, self.first_page) = (Vec::new(), own_start / GRANULE);
        for page in accessed {
            if page < start { self.access(page, 1) } else { rest.access(page, 1) }
        }
        (self.runs, rest.runs) = (runs, runs);
        rest
    }
}

/// A life that ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// The last address.
    pub end: u64,
    pub how: How,
    pub tag: u64,
    pub made: Moment,
    /// The request that ended it.
    pub removed: Moment,
}

/// A reserved range.
#[derive(Clone, Debug)]
pub struct Reservation {
    /// The last address.
    pub end: u64,
    /// The RESERVE, or the item of the live state.
    pub made: Moment,
    /// Whether anything was ever linked in it.
    pub linked: bool,
    /// Whom it belongs to, as long as it lives, with its tag.
    pub owner: Owner,
    /// The commands that it served.
    pub uses: Uses,
}

/// The addresses of a domain.
#[derive(Debug, Default)]
pub struct Space {
    /// By the first address. None overlaps another.
    pub live: BTreeMap<u64, Life>,
    pub reservations: BTreeMap<u64, Reservation>,
    ended: BTreeMap<u64, Ended>,
    /// The first addresses of `ended` with the events that ended them, oldest first.
    order: VecDeque<(u64, u64)>,
}

/// The entry of a map of ranges that has `address`.
fn at<T>(ranges: &BTreeMap<u64, T>, address: u64, end: impl Fn(&T) -> u64) -> Option<(u64, &T)> {
    let (start, found) = ranges.range(..=address).next_back()?;
    (end(found) >= address).then_some((*start, found))
}

impl Space {
    /// What is live at an address, with its first address.
    pub fn live_at(&self, address: u64) -> Option<(u64, &Life)> {
        at(&self.live, address, |life| life.end)
    }

    /// Notes an access, which may go over the end of one range into the next.
    pub fn access(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len.saturating_sub(1));
        let first = self.live_at(start).map_or(start, |(first, _)| first);
        for (own_start, life) in self.live.range_mut(first..=end) {
            let from = start.max(*own_start);
            life.access(from, life.end.min(end).saturating_sub(from).saturating_add(u64::from(len > 0)));
        }
    }

    /// The reservation that has an address.
    pub fn reservation_at(&self, address: u64) -> Option<(u64, &Reservation)> {
        at(&self.reservations, address, |reservation| reservation.end)
    }

    /// The last life of an address that ended, if it is remembered.
    pub fn ended_at(&self, address: u64) -> Option<(u64, &Ended)> {
        // Ended ranges may overlap: a later, shorter one may begin between the start of an earlier one and the address.
        let before = self.ended.range(..=address).rev().take(64);
        let having = before.filter(|(_, ended)| ended.end >= address);
        having.max_by_key(|(_, ended)| ended.removed.seq).map(|(start, ended)| (*start, ended))
    }

    /// Notes a command whose data are from `start` to `end`, if all of that is live. A command may name the address of a
    /// list of addresses instead, which does not show.
    pub fn serve(&mut self, start: u64, end: u64, completed: Moment, ns: u64) {
        let Some((first, _)) = self.live_at(start) else { return };
        let mut next = Some(first);
        for (own_start, life) in self.live.range(first..=end) {
            if next != Some(*own_start) {
                return;
            }
            next = life.end.checked_add(1);
        }
        if next.is_some_and(|next| next <= end) {
            return;
        }
        for (own_start, life) in self.live.range_mut(first..=end) {
            life.uses.note((*own_start, life.end), (start, end), completed, ns);
        }
        for (own_start, reservation) in self.reservations.range_mut(start / GRANULE * GRANULE..=end) {
            reservation.uses.note((*own_start, reservation.end), (start, end), completed, ns);
        }
    }

    /// The live ranges next to an address: below and above it.
    pub fn neighbours(&self, address: u64) -> [Option<(u64, &Life)>; 2] {
        let below = self.live.range(..address).next_back();
        let above = self.live.range(address..).next();
        [below, above].map(|found| found.map(|(start, life)| (*start, life)))
    }

    /// Removes what is live in a range, parts of longer ranges included, and remembers it. `each` gets the first address
    /// and the life of what ended.
    pub fn remove(&mut self, start: u64, end: u64, removed: Moment, mut each: impl FnMut(u64, &Life)) {
        if let Some((own_start, life)) = self.live.range_mut(..start).next_back()
            && life.end >= start
        {
            let rest = life.split_off(*own_start, start);
            self.live.insert(start, rest);
        }
        while let Some((&first, _)) = self.live.range(start..=end).next() {
            let Some(mut life) = self.live.remove(&first) else { break };
            if life.end > end {
                let rest = life.split_off(first, end + 1);
                self.live.insert(end + 1, rest);
            }
            each(first, &life);
            self.remember(first, &life, removed);
        }
    }

    fn remember(&mut self, start: u64, life: &Life, removed: Moment) {
        self.ended.insert(start, Ended { end: life.end, how: life.how, tag: life.owner.tag, made: life.made, removed });
        self.order.push_back((start, removed.seq));
        while self.order.len() > REMEMBERED {
            let Some((start, seq)) = self.order.pop_front() else { break };
            // Another life may have ended there since.
            if self.ended.get(&start).is_some_and(|ended| ended.removed.seq == seq) {
                self.ended.remove(&start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = GRANULE;

    fn moment(seq: u64) -> Moment {
        Moment { seq, time_ns: seq * 10 }
    }

    #[test]
    fn a_part_of_a_range_ends_and_the_rest_lives_on_with_its_accesses() {
        let mut space = Space::default();
        let mut life = Life::new(0x1000, 0x8fff, How::Linked, 7, 3, moment(1));
        life.access(0x1ff0, 0x20);
        life.access(0x7000, 1);
        space.live.insert(0x1000, life);
        let mut ended = Vec::new();
        space.remove(0x2000, 0x3fff, moment(9), |start, life| ended.push((start, life.end, life.accessed_pages())));
        assert_eq!(ended, [(0x2000, 0x3fff, 1)]);
        let live: Vec<_> = space.live.iter().map(|(start, life)| (*start, life.end, life.accessed_pages())).collect();
        assert_eq!(live, [(0x1000, 0x1fff, 1), (0x4000, 0x8fff, 1)]);
        assert!(space.live_at(0x2000).is_none() && space.live_at(0x4000).is_some());
        let (start, last) = space.ended_at(0x3abc).unwrap();
        assert_eq!((start, last.tag, last.made, last.removed), (0x2000, 7, moment(1), moment(9)));
        assert!(space.ended_at(0x4000).is_none());
    }

    #[test]
    fn the_last_life_of_an_address_is_found_among_overlapping_ones() {
        let mut space = Space::default();
        for (seq, start, end) in [(1, 0, 16 * PAGE - 1), (2, PAGE, 2 * PAGE - 1), (3, 4 * PAGE, 5 * PAGE - 1)] {
            space.live.insert(start, Life::new(start, end, How::Mapped, 0, 3, moment(seq)));
            space.remove(start, end, moment(seq + 10), |_, _| ());
        }
        assert_eq!(space.ended_at(PAGE).unwrap().1.made, moment(2));
        assert_eq!(space.ended_at(3 * PAGE).unwrap().1.made, moment(1));
        assert_eq!(space.ended_at(4 * PAGE + 5).unwrap().1.made, moment(3));
    }

    #[test]
    fn old_lives_are_forgotten() {
        let mut space = Space::default();
        for n in 0..REMEMBERED as u64 + 100 {
            space.live.insert(n * PAGE, Life::new(n * PAGE, n * PAGE + PAGE - 1, How::Mapped, 0, 3, moment(n)));
            space.remove(n * PAGE, n * PAGE + PAGE - 1, moment(n), |_, _| ());
        }
        assert!(space.ended_at(99 * PAGE).is_none() && space.ended_at(100 * PAGE).is_some());
        assert_eq!(space.ended.len(), REMEMBERED);
    }
}
