//! What is live in the device: domains, who is attached, reservations and mappings, read while requests go on.
//!
//! Who is attached to which domain is read at one instant, and all domains with it. The mappings and reservations of each
//! domain follow in short steps, during which requests change them. So what is given is the state at no instant; but it
//! becomes the state at any later one if all requests that were answered since the first instant are done to it, in
//! their order and by force: a MAP or LINK replaces what is in its place, an UNMAP or UNLINK of what is not there does
//! nothing. Those that change what a step has not read yet do no harm, since what they did is in what it reads.

use std::sync::Arc;

use super::Iommu;
use super::address_space::{Mapped, Walk};
use super::grace;

/// Something that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveItem {
    /// A domain.
    Domain {
        /// Its id.
        domain: u32,
        /// It is a bypass domain, and has neither mappings nor reservations.
        bypass: bool,
    },
    /// An endpoint that is attached.
    Attached {
        /// The endpoint's id.
        endpoint: u32,
        /// The domain that it is attached to.
        domain: u32,
    },
    /// A reservation of the split protocol.
    Reservation {
        /// The domain.
        domain: u32,
        /// The first address.
        start: u64,
        /// The last address.
        end: u64,
    },
    /// A mapping, or pages that are linked.
    Mapped {
        /// The domain.
        domain: u32,
        /// What is mapped.
        mapped: Mapped,
    },
}

/// Reservations that one step reads while it holds up requests.
const RESERVATIONS: usize = 64;

/// Reads what is live, step by step. Holds nothing between two steps.
pub struct Live {
    iommu: Arc<Iommu>,
    reader: grace::Reader,
    /// The domains that are not read to their end, the next one last.
    domains: Vec<u32>,
    place: Place,
}

/// What comes next.
enum Place {
    Domains,
    /// The reservations of the last domain from this address on.
    Reservations(u64),
    /// The mappings, and when the walk read the beginning of what it has found and not given yet.
    Mappings(Walk, u64),
}

impl Live {
    /// Nothing is read yet.
    pub fn new(iommu: Arc<Iommu>) -> Live {
        Live { reader: iommu.reader(), iommu, domains: Vec::new(), place: Place::Domains }
    }

    /// Gives `take` what comes next: little, or nothing. Returns whether there is more. `now` is called at the instant of
    /// which the first step is, and before a later one reads; each item comes with what it returned then.
    ///
    /// Both are called while requests wait, and must neither wait nor call the device. The first step itself waits for the
    /// requests that are being done, and so for what these wait for.
    pub fn step(&mut self, now: impl Fn() -> u64, mut take: impl FnMut(u64, LiveItem)) -> bool {
        match &mut self.place {
            Place::Domains => {
                let (at, domains) = self.iommu.attached(&now);
                for (id, bypass, members) in &domains {
                    take(at, LiveItem::Domain { domain: *id, bypass: *bypass });
                    members.iter().for_each(|&endpoint| take(at, LiveItem::Attached { endpoint, domain: *id }));
                }
                self.domains = domains.iter().rev().filter(|domain| !domain.1).map(|domain| domain.0).collect();
                self.place = Place::Reservations(0);
            }
            Place::Reservations(from) => {
                let Some(&domain) = self.domains.last() else { return false };
                let at = now();
                let next = self.iommu.reservations(domain, *from, RESERVATIONS, |start, end| {
                    take(at, LiveItem::Reservation { domain, start, end });
                });
                self.place = next.map_or_else(|| Place::Mappings(Walk::default(), at), Place::Reservations);
            }
            Place::Mappings(walk, begun) => {
                let Some(&domain) = self.domains.last() else { return false };
                let at = now();
                // Gone meanwhile, and perhaps there again: all that it has by now are requests of since the first step.
                let entry = self.iommu.domains().get(domain).map(|entry| entry.domain.clone());
                let space = entry.as_ref().and_then(|domain| domain.space.as_ref());
                let mut carried = walk.is_open().then_some(*begun);
                let take = |mapped| take(carried.take().unwrap_or(at), LiveItem::Mapped { domain, mapped });
                let more = space.is_some_and(|space| walk.step(space, &self.reader.enter(), take));
                *begun = carried.unwrap_or(at);
                if !more {
                    self.domains.pop();
                    self.place = Place::Reservations(0);
                }
            }
        }
        !self.domains.is_empty()
    }
}

/// A domain's id, whether it is a bypass domain, and its members.
type Attached = (u32, bool, Vec<u32>);

impl Iommu {
    /// All domains at one instant, for which `now` is called, in the order of their ids.
    fn attached<T>(&self, now: impl Fn() -> T) -> (T, Vec<Attached>) {
        let _unchanged = self.journal();
        let domains = self.domains();
        let mut attached: Vec<Attached> = domains
            .iter()
            .map(|entry| {
                let members = entry.members.iter().map(|member| member.id()).collect();
                (entry.domain.id, entry.domain.space.is_none(), members)
            })
            .collect();
        let at = now();
        drop(domains);
        attached.sort_unstable_by_key(|domain| domain.0);
        (at, attached)
    }

    /// Gives `take` some reservations of a domain, from the address `from` on. Returns where to go on.
    fn reservations(&self, domain: u32, from: u64, max: usize, mut take: impl FnMut(u64, u64)) -> Option<u64> {
        let mut domains = self.domains();
        let mut reservations = domains.get(domain)?.reservations.from(from);
        reservations.by_ref().take(max).for_each(|(start, end)| take(start, end));
        reservations.next().map(|(start, _)| start)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
