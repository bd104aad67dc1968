//! What requests change.

use viommu_trace::Event;
use viommu_wire::request::RequestType;
use viommu_wire::split::EXTENTS_MAX;

use super::findings::{Breach, Rule};
use super::groups::Owner;
use super::lives::{How, Life, Moment, Reservation};
use super::{Audit, Domain};

/// Requests that were refused, of each domain, that are remembered.
const REFUSED: usize = 64;

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
        self.count(Owner { endpoint, tag, size: bytes, flow: None }, |group| {
            group.request(request, status == 0, bytes, ns);
        });
        if status != 0 {
            if matches!(request, RequestType::Map | RequestType::Link | RequestType::Reserve) {
                let refused = &mut self.domains.entry(domain).or_default().refused;
                if refused.len() == REFUSED {
                    refused.remove(0);
                }
                refused.push((range.0, range.1, now));
            }
            return;
        }
        match request {
            RequestType::Attach => {
                if let Some(endpoint) = endpoint {
                    self.attach(endpoint, domain, now);
                }
            }
            RequestType::Detach => {
                if let Some(endpoint) = endpoint {
                    self.leave(endpoint, now);
                }
            }
            RequestType::Map => {
                self.note_adjacent(domain, range);
                self.make(domain, range, Life::new(range.0, range.1, How::Mapped, 0, flags, now));
            }
            RequestType::Link => {
                self.operations.linked(domain, tag, range, now);
                let space = &mut self.domains.entry(domain).or_default().space;
                if let Some((start, _)) = space.reservation_at(range.0)
                    && let Some(reservation) = space.reservations.get_mut(&start)
                {
                    reservation.linked = true;
                }
                self.make(domain, range, Life::new(range.0, range.1, How::Linked, tag, flags, now));
            }
            RequestType::Unmap | RequestType::Unlink => self.remove(domain, range, now),
            RequestType::Reserve => self.reserve(domain, range, tag, now),
            RequestType::Release => self.release(domain, range, now),
            RequestType::Probe => {}
        }
    }

    /// The owner of a range of a domain.
    fn owner(&self, domain: u32, tag: u64, (start, end): (u64, u64)) -> Owner {
        let endpoint = self.domains.get(&domain).and_then(Domain::endpoint);
        Owner { endpoint, tag, size: (end - start).saturating_add(1), flow: None }
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
            self.look_for_leaks(id, &domain, now);
            self.join(std::mem::take(&mut domain.adjacent).1);
            self.end_mappings(&mut domain, now, |life| life.how == How::Mapped);
        }
        domain.endpoints.retain(|other| *other != endpoint);
        if !domain.endpoints.is_empty() || !domain.space.reservations.is_empty() {
            self.domains.insert(id, domain);
        }
    }

    /// A range becomes accessible.
    pub(super) fn make(&mut self, domain: u32, (start, end): (u64, u64), life: Life) {
        if start > end {
            return;
        }
        // Nothing is there, unless the trace has a gap.
        self.remove(domain, (start, end), life.made);
        let (owner, how) = (self.owner(domain, life.tag, (start, end)), life.how);
        self.count(owner, |group| group.made(how, owner.size));
        self.domains.entry(domain).or_default().space.live.insert(start, life);
    }

    /// All that is accessible in a range ends.
    fn remove(&mut self, domain: u32, (start, end): (u64, u64), now: Moment) {
        let Some(space) = self.domains.get_mut(&domain).map(|domain| &mut domain.space) else { return };
        if start > end {
            return;
        }
        let before = space.live.len();
        let mut ended = Vec::new();
        space.remove(start, end, now, |first, life| ended.push((first, life.clone())));
        let splits = (space.live.len() + ended.len()).saturating_sub(before);
        let endpoint = self.domains.get(&domain).and_then(Domain::endpoint);
        for (first, life) in &ended {
            let owner = Owner { endpoint, tag: life.tag, size: (life.end - first).saturating_add(1), flow: None };
            if splits > 0 {
                self.count(owner, |group| group.split(life.how));
            }
            self.ended(domain, owner, *first, life, now);
        }
    }

    /// Those of a domain's lives end for which `ends` is true, since their domain does.
    pub(super) fn end_mappings(&mut self, domain: &mut Domain, now: Moment, ends: impl Fn(&Life) -> bool) {
        let endpoint = domain.endpoint();
        let starts: Vec<_> =
            domain.space.live.iter().filter(|(_, life)| ends(life)).map(|(start, life)| (*start, life.end)).collect();
        for (start, end) in starts {
            let mut ended = None;
            domain.space.remove(start, end, now, |_, life| ended = Some(life.clone()));
            if let Some(life) = ended {
                let owner = Owner { endpoint, tag: life.tag, size: (end - start).saturating_add(1), flow: None };
                self.count(owner, |group| group.ended(start, &life, now.time_ns));
            }
        }
    }

    /// All reservations of a domain end with it.
    pub(super) fn end_reservations(&mut self, domain: &mut Domain, now: Moment) {
        let endpoint = domain.endpoint();
        for (start, reservation) in std::mem::take(&mut domain.space.reservations) {
            let size = (reservation.end - start).saturating_add(1);
            let lifetime = now.time_ns.saturating_sub(reservation.made.time_ns);
            self.count(Owner { endpoint, tag: reservation.tag, size, flow: None }, |group| {
                group.released(size, lifetime);
            });
        }
    }

    /// Counts a life that ended by a request, and looks whether it was of use.
    fn ended(&mut self, domain: u32, owner: Owner, start: u64, life: &Life, now: Moment) {
        self.count(owner, |group| group.ended(start, life, now.time_ns));
        let Some(served) = life.served_once() else { return };
        let end = life.end;
        if life.tag == 0 && served.first {
            self.operations.untagged(domain, (start, end), life.made, served, now);
        }
        if life.runs == 0 {
            self.findings.add(Rule::NeverAccessed, owner.endpoint, || Breach {
                text: format!(
                    "{start:#x} to {end:#x} in domain {domain} was {} and not accessed",
                    life.how.participle()
                ),
                evidence: vec![life.made.seq, served.completed.seq, now.seq],
                tag: life.tag,
            });
        }
        let late = now.time_ns.saturating_sub(served.completed.time_ns);
        if late > self.settings.late_ns {
            self.findings.add(Rule::UnlinkedLate, owner.endpoint, || Breach {
                text: format!("{start:#x} to {end:#x} in domain {domain}: {} us after its command", late / 1000),
                evidence: vec![served.completed.seq, now.seq],
                tag: life.tag,
            });
        }
    }

    pub(super) fn reserve(&mut self, domain: u32, (start, end): (u64, u64), tag: u64, now: Moment) {
        if start > end {
            return;
        }
        let owner = self.owner(domain, tag, (start, end));
        self.count(owner, |group| group.reserved(owner.size));
        self.operations.reserved(domain, tag, (start, end), now);
        let reservation = Reservation { end, tag, made: now, linked: false, completed: None };
        self.domains.entry(domain).or_default().space.reservations.insert(start, reservation);
    }

    fn release(&mut self, domain: u32, (start, end): (u64, u64), now: Moment) {
        self.remove(domain, (start, end), now);
        let Some(entry) = self.domains.get_mut(&domain) else { return };
        let endpoint = entry.endpoint();
        let Some(reservation) = entry.space.reservations.remove(&start) else { return };
        if entry.endpoints.is_empty() && entry.space.reservations.is_empty() {
            self.domains.remove(&domain);
        }
        let size = (end.saturating_sub(start)).saturating_add(1);
        let lifetime = now.time_ns.saturating_sub(reservation.made.time_ns);
        let owner = Owner { endpoint, tag: reservation.tag, size, flow: None };
        self.count(owner, |group| group.released(size, lifetime));
        self.operations.released(domain, reservation.tag, now);
        if !reservation.linked {
            self.findings.add(Rule::NeverLinked, endpoint, || Breach {
                text: format!("{start:#x} to {end:#x} in domain {domain}"),
                evidence: vec![reservation.made.seq, now.seq],
                tag: reservation.tag,
            });
        }
    }

    /// Notes whether a MAP continues the one before it.
    fn note_adjacent(&mut self, domain: u32, (start, end): (u64, u64)) {
        let (last, count) = &mut self.domains.entry(domain).or_default().adjacent;
        if *count > 0 && last.checked_add(1) == Some(start) {
            (*last, *count) = (end, *count + 1);
            return;
        }
        let ended = *count;
        (*last, *count) = (end, 1);
        self.join(ended);
    }

    /// Counts adjacent MAPs.
    pub(super) fn join(&mut self, count: u64) {
        if count >= JOINABLE {
            self.joinable.0 += count;
            self.joinable.1 += count.div_ceil(EXTENTS_MAX as u64);
        }
    }

    /// What could have cost less.
    pub(super) fn look_at_costs(&mut self, domains: &[u64]) {
        domains.iter().for_each(|count| self.join(*count));
        let (maps, links) = self.joinable;
        if maps > 0 {
            self.findings.add(Rule::PageAtATime, None, || Breach {
                text: format!("{maps} MAPs of adjacent addresses; {links} LINKs could have carried them"),
                evidence: Vec::new(),
                tag: 0,
            });
        }
        let made = self.all.requests_of(RequestType::Map) + self.all.requests_of(RequestType::Link);
        if made >= 64 && self.kicks >= made && self.kicks * 10 >= self.all.all_requests() * 9 {
            let kicks = self.kicks;
            self.findings.add(Rule::KickPerMapping, None, || Breach {
                text: format!("{kicks} kicks for {made} MAPs and LINKs"),
                evidence: Vec::new(),
                tag: 0,
            });
        }
    }
}
