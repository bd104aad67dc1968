//! Domains: address spaces that endpoints are attached to.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::address_space::AddressSpace;
use super::endpoint::Endpoint;
use super::reservation::Reservations;
use viommu_wire::virtio_iommu::Status;

/// The part of a domain that readers use.
pub(super) struct Domain {
    pub(super) id: u32,
    /// `None` for a bypass domain, where an address leads to itself.
    pub(super) space: Option<AddressSpace>,
}

/// A domain with the part that only the writer uses. It exists while it has a member or a reservation (rule S12 of the
/// split protocol).
pub(super) struct DomainEntry {
    pub(super) domain: Arc<Domain>,
    pub(super) members: Vec<Arc<Endpoint>>,
    pub(super) reservations: Reservations,
    /// Reservations have outlived its last member.
    pub(super) survived: bool,
}

impl DomainEntry {
    /// Removes everything that MAP mapped. Returns the number of mappings.
    fn remove_mappings(&self) -> u64 {
        match &self.domain.space {
            // Each linked page is a mapping of the address space.
            Some(space) if space.mappings() > self.reservations.linked => space.clear_maps().mappings,
            _ => 0,
        }
    }

    /// Whether the inclusive range touches a reserved region of an endpoint in the domain.
    pub(super) fn is_reserved(&self, start: u64, end: u64) -> bool {
        let mut regions = self.members.iter().flat_map(|member| member.reserved());
        regions.any(|region| region.start <= end && start <= region.end)
    }
}

/// All domains and their endpoints: the writer's side, under one lock.
#[derive(Default)]
pub(super) struct Domains {
    by_id: HashMap<u32, DomainEntry>,
    attached: HashMap<u32, u32>,
    /// Domains that readers may still be using. To be dropped after a grace period.
    retired: Vec<Arc<Domain>>,
    /// Something that readers may still be using was removed.
    removed: bool,
}

impl Domains {
    /// The domain `id`, if it exists.
    pub(super) fn get(&mut self, id: u32) -> Option<&mut DomainEntry> {
        self.by_id.get_mut(&id)
    }

    /// All domains, in any order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &DomainEntry> {
        self.by_id.values()
    }

    /// The domain `id`, if an endpoint is attached to it.
    pub(super) fn get_attached(&mut self, id: u32) -> Option<&mut DomainEntry> {
        self.get(id).filter(|entry| !entry.members.is_empty())
    }

    /// The domain that the endpoint is attached to.
    pub(super) fn of(&self, endpoint: u32) -> Option<u32> {
        self.attached.get(&endpoint).copied()
    }

    /// The number of domains that remain after `endpoint` has left its own.
    pub(super) fn count_without(&self, endpoint: u32) -> usize {
        let ends = |entry: &DomainEntry| entry.members.len() == 1 && entry.reservations.count() == 0;
        let ends = self.of(endpoint).and_then(|id| self.by_id.get(&id)).is_some_and(ends);
        self.by_id.len() - usize::from(ends)
    }

    /// Attaches `endpoint` to the domain `id`, which `make` creates if it does not exist. It replaces the endpoint's
    /// previous domain: a reader sees the old one or the new one, never none. Returns how many mappings the old domain lost.
    pub(super) fn attach(&mut self, endpoint: &Arc<Endpoint>, id: u32, make: impl FnOnce() -> DomainEntry) -> u64 {
        let entry = self.by_id.entry(id).or_insert_with(make);
        entry.members.push(endpoint.clone());
        let old = endpoint.domain.replace(Some(entry.domain.clone()));
        endpoint.set_settled(true);
        self.retire(old);
        match self.attached.insert(endpoint.id(), id) {
            Some(left) => self.leave(endpoint.id(), left),
            None => 0,
        }
    }

    /// Detaches `endpoint` from the domain `id`. Returns how many mappings the domain lost.
    pub(super) fn detach(&mut self, endpoint: &Endpoint, id: u32) -> Result<u64, Status> {
        if self.of(endpoint.id()) != Some(id) {
            return Err(Status::Inval);
        }
        let old = endpoint.domain.replace(None);
        self.retire(old);
        self.attached.remove(&endpoint.id());
        Ok(self.leave(endpoint.id(), id))
    }

    /// Takes bus mastering from all endpoints whose addresses are translated.
    pub(super) fn silence(&self) {
        for entry in self.by_id.values().filter(|entry| entry.domain.space.is_some()) {
            entry.members.iter().for_each(|member| member.bus_master().store(false, Ordering::Release));
        }
    }

    /// Detaches everything. Returns the reservations, which are to be dropped when the domains are no longer locked.
    #[must_use]
    pub(super) fn clear(&mut self) -> Vec<Reservations> {
        let mut reservations = Vec::with_capacity(self.by_id.len());
        for (_, entry) in self.by_id.drain() {
            for endpoint in entry.members {
                self.retired.extend(endpoint.domain.replace(None));
            }
            self.retired.push(entry.domain);
            reservations.push(entry.reservations);
        }
        self.attached.clear();
        self.removed = true;
        reservations
    }

    /// Notes that a translation that readers may still be using was removed.
    pub(super) fn note_removal(&mut self) {
        self.removed = true;
    }

    /// Takes what was removed since the last call, to be dropped after a grace period; `None` if nothing was removed.
    pub(super) fn take_removed(&mut self) -> Option<Vec<Arc<Domain>>> {
        std::mem::take(&mut self.removed).then(|| std::mem::take(&mut self.retired))
    }

    /// Ends a domain that has neither members nor reservations.
    pub(super) fn end_if_unused(&mut self, id: u32) {
        let unused = |entry: &DomainEntry| entry.members.is_empty() && entry.reservations.count() == 0;
        if self.by_id.get(&id).is_some_and(unused) {
            let ended = self.by_id.remove(&id).map(|entry| entry.domain);
            self.retire(ended);
        }
    }

    /// Removes a member from a domain. With its last member a domain loses what MAP mapped, and it ends unless it has
    /// reservations. Returns the number of mappings that it lost.
    fn leave(&mut self, endpoint: u32, id: u32) -> u64 {
        let Some(entry) = self.by_id.get_mut(&id) else { return 0 };
        entry.members.retain(|member| member.id() != endpoint);
        if !entry.members.is_empty() {
            return 0;
        }
        let mappings = if entry.reservations.count() > 0 {
            entry.survived = true;
            entry.remove_mappings()
        } else {
            entry.domain.space.as_ref().map_or(0, AddressSpace::mappings)
        };
        self.end_if_unused(id);
        mappings
    }

    fn retire(&mut self, domain: Option<Arc<Domain>>) {
        self.removed |= domain.is_some();
        self.retired.extend(domain);
    }
}
