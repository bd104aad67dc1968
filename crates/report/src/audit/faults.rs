//! Why accesses faulted.

use viommu_trace::Event;
use viommu_trace::event::Access;
use viommu_wire::virtio_iommu::{FaultReason, MapFlags};

use super::findings::{Breach, Rule};
use super::groups::Owner;
use super::lives::{Life, Moment, Space};
use super::{Audit, Domain};

impl Audit {
    /// An access faulted: says which rule was broken, and what is known of the address.
    pub(super) fn fault(&mut self, event: &Event, now: Moment) {
        let Event::Fault { endpoint, reason, access, address, domain, .. } = *event else { return };
        self.count(Owner { endpoint: Some(endpoint), ..Owner::default() }, |group| group.faults += 1);
        let found = domain.and_then(|id| Some((id, self.domains.get(&id)?)));
        let what = format!("a {} of {address:#x}", access.name());
        let (rule, breach) = match found {
            _ if FaultReason::from_number(reason) == Some(FaultReason::Domain) => {
                (Rule::NoDomain, Breach { text: what, evidence: vec![now.seq], tag: 0 })
            }
            Some((id, domain)) => explain(id, domain, access, address, now, &what),
            None => (Rule::AccessUnmapped, Breach { text: what, evidence: vec![now.seq], tag: 0 }),
        };
        self.findings.add(rule, Some(endpoint), || breach);
    }
}

fn explain(id: u32, domain: &Domain, access: Access, address: u64, now: Moment, what: &str) -> (Rule, Breach) {
    let space = &domain.space;
    let us = |since: Moment| now.time_ns.saturating_sub(since.time_ns) / 1000;
    if let Some((start, life)) = space.live_at(address) {
        // An access that is allowed faults only if it was older than the mapping.
        let of = range(start, life.end);
        let (rule, text) = if allows(life.flags, access) {
            (Rule::AccessUnmapped, format!("{what} in domain {id}, where {of} was mapped meanwhile"))
        } else {
            (Rule::AccessDenied, format!("{what} in domain {id}, where {of} is for {} only", allowed(life.flags)))
        };
        return (rule, Breach { text, evidence: vec![life.made.seq, now.seq], tag: life.owner.tag });
    }
    let refused = domain.refused.iter().rev().find(|(start, end, _)| (*start..=*end).contains(&address));
    let ended = space.ended_at(address);
    let reservation = space.reservation_at(address);
    // The last thing that happened to the address is what matters.
    let last = [
        refused.map(|(_, _, at)| at.seq),
        ended.map(|(_, ended)| ended.removed.seq),
        reservation.map(|(_, reservation)| reservation.made.seq),
    ];
    let is_newest = |at: Moment| last.into_iter().flatten().max() == Some(at.seq);
    if let Some((start, end, at)) = refused
        && is_newest(*at)
    {
        let text = format!(
            "{what} in domain {id}, for which the request for {} was refused {} us before",
            range(*start, *end),
            us(*at)
        );
        return (Rule::RefusalUnnoticed, Breach { text, evidence: vec![at.seq, now.seq], tag: 0 });
    }
    if let Some((start, reservation)) = reservation
        && is_newest(reservation.made)
    {
        let text = format!(
            "{what} in domain {id}, in the reservation of {}, where nothing is linked",
            range(start, reservation.end)
        );
        return (
            Rule::AccessInHole,
            Breach { text, evidence: vec![reservation.made.seq, now.seq], tag: reservation.owner.tag },
        );
    }
    if let Some((start, ended)) = ended {
        let text = format!(
            "{what} in domain {id}, of which {} was {} until {} us before",
            range(start, ended.end),
            ended.how.participle(),
            us(ended.removed)
        );
        return (
            Rule::UseAfterUnmap,
            Breach { text, evidence: vec![ended.made.seq, ended.removed.seq, now.seq], tag: ended.tag },
        );
    }
    let text = format!("{what} in domain {id}, where nothing was mapped{}", neighbours(space, address));
    (Rule::AccessUnmapped, Breach { text, evidence: vec![now.seq], tag: 0 })
}

fn range(start: u64, end: u64) -> String {
    format!("{start:#x} to {end:#x}")
}

fn allows(flags: u32, access: Access) -> bool {
    let flags = MapFlags::from_bits_truncate(flags);
    flags.contains(match access {
        Access::Read => MapFlags::READ,
        Access::Write => MapFlags::WRITE,
    })
}

fn allowed(flags: u32) -> &'static str {
    match [Access::Read, Access::Write].map(|access| allows(flags, access)) {
        [true, true] => "reading and writing",
        [true, false] => "reading",
        [false, true] => "writing",
        [false, false] => "nothing",
    }
}

/// What lies next to an address: a driver that is off by a page is near to what it mapped.
fn neighbours(space: &Space, address: u64) -> String {
    let mut text = String::new();
    let [below, above] = space.neighbours(address);
    let tagged = |life: &Life| if life.owner.tag == 0 { String::new() } else { format!(", tag {:#x}", life.owner.tag) };
    if let Some((start, life)) = below {
        text += &format!("; {} ends {:#x} bytes before it{}", range(start, life.end), address - life.end, tagged(life));
    }
    if let Some((start, life)) = above {
        text += &format!("; {} begins {:#x} bytes behind it{}", range(start, life.end), start - address, tagged(life));
    }
    text
}
