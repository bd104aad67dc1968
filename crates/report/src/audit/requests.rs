//! What requests change.

use viommu_trace::Event;
use viommu_wire::request::RequestType;
use viommu_wire::split::EXTENTS_MAX;

use super::findings::{Breach, Rule};
use super::groups::Owner;
use super::lives::{How, Life, Moment, Reservation, Uses};
use super::{Adjacent, Audit, Domain};

/// Requests that were refused, of each domain, that are remembered.
const REFUSED: usize = 64;

/// The longest of these: a request for all addresses says nothing of a fault.
const REFUSED_MAX: u64 = 1 << 40;

/// Domains from which a domain without endpoints and reservations is forgotten. Until then its past may explain a fault
/// in a domain of the same id.
const PAST_MAX: usize = 1024;

/// MAPs in a row that are worth a word.
const JOINABLE: u64 = 8;

impl Audit {
    pub(super) fn request(&mut self, event: &Event, now: Moment) {
        let (number, status, domain, range, tag, ns, endpoint, flags) = match *event {
            Event::Request { endpoint, request, status, domain, virt_start, virt_end, flags, duration, .. } => {
                (request, status, domain, (virt_start, virt_end), 0, duration, endpoint, flags)
            }
            Event::Split { request, status, domain, virt_start, virt_end, tag, flags, duration, .. } => {
                (request, status, domain, (virt_start, virt_end), tag, duration, None, flags)
            }
            _ => return,
        };
        let Some(request) = RequestType::from_number(number) else { return };
        let is_range = !matches!(request, RequestType::Attach | RequestType::Detach | RequestType::Probe);
        let bytes = if is_range { range.1.saturating_sub(range.0).saturating_add(1) } else { 0 };
        let endpoint = endpoint.or_else(|| self.domains.get(&domain)?.endpoint());
        self.count(Owner { endpoint, tag, size: bytes }, |group| {
            group.request(request, status == 0, bytes, ns);
        });
        if status != 0 {
            let is_for_use = matches!(request, RequestType::Map | RequestType::Link | RequestType::Reserve);
            if let Some(domain) = self.domains.get_mut(&domain).filter(|_| is_for_use && bytes <= REFUSED_MAX) {
                if domain.refused.len() == REFUSED {
                    domain.refused.remove(0);
                }
                domain.refused.push((range.0, range.1, now));
            }
            return;
        }
        match (request, endpoint) {
            (RequestType::Attach, Some(endpoint)) => self.attach(endpoint, domain, now),
            (RequestType::Detach, Some(endpoint)) => self.leave(endpoint, now),
            _ if !is_range || range.0 > range.1 => {}
            (RequestType::Map, _) => {
                self.note_adjacent(domain, range);
                self.make(domain, range.0, Life::new(range.0, range.1, How::Mapped, 0, flags, now));
            }
            (RequestType::Link, _) => {
                self.totals.operations.linked(domain, tag, range, now);
                self.note_linked(domain, range.0);
                self.make(domain, range.0, Life::new(range.0, range.1, How::Linked, tag, flags, now));
            }
            (RequestType::Reserve, _) => self.reserve(domain, range, tag, now),
            (RequestType::Release, _) => self.release(domain, range, now),
            // UNMAP and UNLINK.
            _ => self.remove(domain, range, now),
        }
    }

    pub(super) fn attach(&mut self, endpoint: u32, domain: u32, now: Moment) {
        if self.attached.get(&endpoint) == Some(&domain) {
            return;
        }
        self.leave(endpoint, now);
        self.attached.insert(endpoint, domain);
        self.domains.entry(domain).or_default().endpoints.push(endpoint);
    }

    /// An endpoint leaves its domain. With the last endpoint all that was mapped ends.
    fn leave(&mut self, endpoint: u32, now: Moment) {
        let Some(id) = self.attached.remove(&endpoint) else { return };
        let Some(mut domain) = self.domains.remove(&id) else { return };
        if domain.endpoints == [endpoint] {
            self.join(std::mem::take(&mut domain.adjacent));
            self.end_mappings(&mut domain, now, |life| life.how == How::Mapped);
        }
        domain.endpoints.retain(|other| *other != endpoint);
        if !domain.is_over() || self.domains.len() < PAST_MAX {
            self.domains.insert(id, domain);
        }
    }

    /// Something is linked in the reservation that has this address.
    pub(super) fn note_linked(&mut self, domain: u32, address: u64) {
        let Some(space) = self.domains.get_mut(&domain).map(|domain| &mut domain.space) else { return };
        if let Some((start, _)) = space.reservation_at(address)
            && let Some(reservation) = space.reservations.get_mut(&start)
        {
            reservation.linked = true;
        }
    }

    /// A range becomes accessible.
    pub(super) fn make(&mut self, domain: u32, start: u64, mut life: Life) {
        // Nothing is there, unless the trace has a gap.
        self.remove(domain, (start, life.end), life.made);
        life.owner.endpoint = self.domains.get(&domain).and_then(Domain::endpoint);
        let (owner, how) = (life.owner, life.how);
        self.count(owner, |group| group.made(how, owner.size));
        self.domains.entry(domain).or_default().space.live.insert(start, life);
    }

    /// All that is accessible in a range ends.
    fn remove(&mut self, domain: u32, (start, end): (u64, u64), now: Moment) {
        let Some(space) = self.domains.get_mut(&domain).map(|domain| &mut domain.space) else { return };
        let before = space.live.len();
        let mut ended = Vec::new();
        space.remove(start, end, now, |first, life| ended.push((first, life.clone())));
        // What lives on at the ends of the range: one piece more at each, at most.
        let pieces = (space.live.len() + ended.len()).saturating_sub(before);
        let ends = [ended.first(), ended.last()].map(|found| found.map(|(_, life)| (life.owner, life.how)));
        for (first, life) in &ended {
            self.ended(domain, *first, life, now);
        }
        for (owner, how) in ends.into_iter().flatten().take(pieces) {
            self.count(owner, |group| group.split(how));
        }
    }

    /// Those of a domain's lives end for which `ends` is true, since their domain does.
    pub(super) fn end_mappings(&mut self, domain: &mut Domain, now: Moment, ends: impl Fn(&Life) -> bool) {
        let ending = domain.space.live.iter().filter(|(_, life)| ends(life));
        let ranges: Vec<_> = ending.map(|(start, life)| (*start, life.end)).collect();
        for (start, end) in ranges {
            let mut ended = None;
            domain.space.remove(start, end, now, |_, life| ended = Some(life.clone()));
            if let Some(life) = ended {
                self.count(life.owner, |group| group.ended(start, &life, now.time_ns));
            }
        }
    }

    /// All reservations of a domain end with it.
    pub(super) fn end_reservations(&mut self, domain: &mut Domain, now: Moment) {
        for reservation in std::mem::take(&mut domain.space.reservations).into_values() {
            self.count_released(&reservation, now);
        }
    }

    fn count_released(&mut self, reservation: &Reservation, now: Moment) {
        let lifetime = now.time_ns.saturating_sub(reservation.made.time_ns);
        self.count(reservation.owner, |group| group.released(reservation.owner.size, lifetime));
    }

    /// Counts a life that ended by a request, and looks whether it was of use.
    fn ended(&mut self, domain: u32, start: u64, life: &Life, now: Moment) {
        self.count(life.owner, |group| group.ended(start, life, now.time_ns));
        self.totals.operations.unlinked(domain, life.owner.tag, now);
        let Some(served) = life.uses.once() else { return };
        let (end, endpoint) = (life.end, life.owner.endpoint);
        if life.how == How::Mapped && served.first {
            self.totals.operations.untagged(domain, (start, end), life.made, served, now);
        }
        if life.runs == 0 && !life.is_old {
            self.findings.add(Rule::NeverAccessed, endpoint, || Breach {
                text: format!(
                    "{start:#x} to {end:#x} in domain {domain} was {} and not accessed",
                    life.how.participle()
                ),
                evidence: vec![life.made.seq, served.completed.seq, now.seq],
                tag: life.owner.tag,
            });
        }
        let late = now.time_ns.saturating_sub(served.completed.time_ns);
        if late > self.settings.late_ns {
            self.findings.add(Rule::UnlinkedLate, endpoint, || Breach {
                text: format!("{start:#x} to {end:#x} in domain {domain}: {} us after its command", late / 1000),
                evidence: vec![served.completed.seq, now.seq],
                tag: life.owner.tag,
            });
        }
    }

    pub(super) fn reserve(&mut self, domain: u32, (start, end): (u64, u64), tag: u64, now: Moment) {
        if start > end {
            return;
        }
        let endpoint = self.domains.get(&domain).and_then(Domain::endpoint);
        let owner = Owner { endpoint, tag, size: (end - start).saturating_add(1) };
        self.count(owner, |group| group.reserved(owner.size));
        self.totals.operations.reserved(domain, tag, (start, end), now);
        let reservation = Reservation { end, made: now, linked: false, owner, uses: Uses::default() };
        self.domains.entry(domain).or_default().space.reservations.insert(start, reservation);
    }

    fn release(&mut self, domain: u32, (start, end): (u64, u64), now: Moment) {
        self.remove(domain, (start, end), now);
        let Some(entry) = self.domains.get_mut(&domain) else { return };
        let Some(reservation) = entry.space.reservations.remove(&start) else { return };
        if entry.is_over() && self.domains.len() > PAST_MAX {
            self.domains.remove(&domain);
        }
        self.count_released(&reservation, now);
        self.totals.operations.released(domain, reservation.owner.tag, now);
        if !reservation.linked {
            self.findings.add(Rule::NeverLinked, reservation.owner.endpoint, || Breach {
                text: format!("{start:#x} to {end:#x} in domain {domain}"),
                evidence: vec![reservation.made.seq, now.seq],
                tag: reservation.owner.tag,
            });
        }
    }

    /// Notes whether a MAP continues the one before it.
    fn note_adjacent(&mut self, domain: u32, (start, end): (u64, u64)) {
        let kicks = self.totals.kicks;
        let adjacent = &mut self.domains.entry(domain).or_default().adjacent;
        let before = *adjacent;
        let continues = before.count > 0 && before.last.checked_add(1) == Some(start);
        *adjacent = Adjacent { last: end, count: 1, kicks, kicked: 0 };
        if continues {
            adjacent.count += before.count;
            adjacent.kicked = before.kicked + u64::from(kicks > before.kicks);
        } else {
            self.join(before);
        }
    }

    /// Counts adjacent MAPs.
    pub(super) fn join(&mut self, Adjacent { count, kicked, .. }: Adjacent) {
        if count >= JOINABLE {
            self.joinable.0 += count;
            self.joinable.1 += count.div_ceil(EXTENTS_MAX as u64);
            self.joinable.2 += kicked;
        }
    }

    /// What could have cost less.
    pub(super) fn look_at_costs(&mut self) {
        let (maps, links, kicked) = self.joinable;
        if maps > 0 {
            self.findings.add(Rule::PageAtATime, None, || Breach {
                text: format!("{maps} MAPs of adjacent addresses; LINKs that could have carried them: {links}"),
                evidence: Vec::new(),
                tag: 0,
            });
        }
        if kicked > 0 && kicked * 2 >= maps {
            self.findings.add(Rule::KickPerMapping, None, || Breach {
                text: format!("{kicked} of {maps} MAPs of adjacent addresses had a kick of their own"),
                evidence: Vec::new(),
                tag: 0,
            });
        }
    }
}
