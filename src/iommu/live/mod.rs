//! The live state of the device, read while requests go on: domains, attached endpoints, reservations and mappings.
//!
//! The domains and their endpoints are read at one instant. The mappings and reservations of each domain follow in short
//! steps, between which requests may change them. So the items together are not the state at any single instant. But they
//! become the state at a later instant when all requests that were answered since the first instant are applied to them, in
//! order and by force: a MAP or LINK replaces whatever is in its place, and an UNMAP or UNLINK of something absent does
//! nothing. A request that changes what no step has read yet does no harm, since its effect is in what a later step reads.

mod trace;

use std::sync::Arc;

use super::Iommu;
use super::address_space::{Mapped, Walk};

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

/// The most reservations that one step reads, since requests wait meanwhile.
const RESERVATIONS: usize = 64;

/// Reads the live state, step by step. Holds no lock between two steps.
pub struct Live {
    iommu: Arc<Iommu>,
    /// The domains that are not read completely yet, the next one last.
    domains: Vec<u32>,
    place: Place,
}

/// What the next step reads.
enum Place {
    Domains,
    /// The reservations of the last domain from this address on.
    Reservations(u64),
    /// The mappings. The number is when the walk read the beginning of a run that it has not passed on yet.
    Mappings(Walk, u64),
    /// Nothing: all was read.
    End,
}

impl Live {
    /// A reader that has read nothing yet.
    pub fn new(iommu: Arc<Iommu>) -> Live {
        Live { iommu, domains: Vec::new(), place: Place::Domains }
    }

    /// Passes the next items to `take`: a few, or none. Returns whether there is more. `now` is called at the instant that the
    /// first step shows, and before each later step reads. Each item comes with the result of that call. The last step passes
    /// nothing. It calls `now` at an instant at which the trace has all that the items show: what a request changes can be read
    /// before its event is made.
    ///
    /// Both are called while requests wait, and must neither wait nor call the device. The first step and the last do not wait
    /// for requests that are being executed, nor for what they wait for: such a step passes nothing, calls nobody, and is to be
    /// tried again.
    pub fn step(&mut self, now: impl Fn() -> u64, mut take: impl FnMut(u64, LiveItem)) -> bool {
        match &mut self.place {
            Place::Domains => {
                let Some((at, domains)) = self.iommu.attached(&now) else { return true };
                for (id, bypass, members) in &domains {
                    take(at, LiveItem::Domain { domain: *id, bypass: *bypass });
                    members.iter().for_each(|&endpoint| take(at, LiveItem::Attached { endpoint, domain: *id }));
                }
                self.domains = domains.iter().rev().filter(|domain| !domain.1).map(|domain| domain.0).collect();
                self.place = Place::Reservations(0);
            }
            Place::Reservations(from) => {
                let Some(&domain) = self.domains.last() else { return true };
                let at = now();
                let next = self.iommu.reservations(domain, *from, RESERVATIONS, |start, end| {
                    take(at, LiveItem::Reservation { domain, start, end });
                });
                self.place = next.map_or_else(|| Place::Mappings(Walk::default(), at), Place::Reservations);
            }
            Place::Mappings(walk, begun) => {
                let Some(&domain) = self.domains.last() else { return true };
                let at = now();
                // The domain may be gone meanwhile, and may exist again. All that it has then came after the first step.
                let entry = self.iommu.domains().get(domain).map(|entry| entry.domain.clone());
                let space = entry.as_ref().and_then(|domain| domain.space.as_ref());
                let mut carried = walk.is_open().then_some(*begun);
                let take = |mapped| take(carried.take().unwrap_or(at), LiveItem::Mapped { domain, mapped });
                // Of this step alone: whoever removes a mapping looks at all readers that there are.
                let mut reader = self.iommu.reader();
                let more = space.is_some_and(|space| walk.step(space, &reader.enter(), take));
                *begun = carried.unwrap_or(at);
                if !more {
                    self.domains.pop();
                    self.place = Place::Reservations(0);
                }
            }
            Place::End => {
                let Some(_unchanged) = self.iommu.try_journal() else { return true };
                now();
                return false;
            }
        }
        if self.domains.is_empty() {
            self.place = Place::End;
        }
        true
    }
}

/// A domain's id, whether it is a bypass domain, and its members.
type Attached = (u32, bool, Vec<u32>);

impl Iommu {
    /// All domains at one instant, for which `now` is called, in the order of their ids; `None` while requests are done.
    fn attached<T>(&self, now: impl Fn() -> T) -> Option<(T, Vec<Attached>)> {
        let _unchanged = self.try_journal()?;
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
        Some((at, attached))
    }

    /// Passes some reservations of a domain to `take`, from the address `from` on. Returns where to continue.
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
