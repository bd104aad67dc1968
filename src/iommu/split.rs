//! The four requests of the split alloc/map protocol: what each does and which status it gets. The comments name the rules
//! S1 to S14 of `docs/split-protocol.md`. They are checked in this order, and the first that does not hold gives the
//! status.

use super::Iommu;
use super::address_space::{AddressSpace, PAGE, Run};
use super::domain::{DomainEntry, Domains};
use super::request::require;
use super::reservation::{NoMemory, Reservations};
use viommu_wire::split::{EXTENTS_MAX, Extent, Link, Range};
use viommu_wire::virtio_iommu::Status;

/// The number of granules that the request linked or unlinked, or the status that says why it failed.
type Granules = Result<u64, Status>;

impl Iommu {
    pub(super) fn reserve(&self, request: &Range) -> Granules {
        let mut domains = self.domains();
        let entry = self.entry(&mut domains, request.domain.get())?;
        let (start, end) = self.check_range_request(entry, request)?;
        let (space, reservations) = parts(entry)?;
        if reservations.touch(start, end) {
            return Err(self.reserved_status(entry));
        }
        require(space.is_empty(start, end), Status::Inval)?;
        require(!entry.is_reserved(start, end), Status::Inval)?;
        entry.reservations.add(start, end).map_err(|NoMemory| Status::NoMem)?;
        self.counters.reserved();
        Ok(0)
    }

    pub(super) fn link(&self, request: &Link, extents: &[Extent]) -> Granules {
        let mut domains = self.domains();
        let entry = self.entry(&mut domains, request.domain.get())?;
        let flags = self.map_flags(request.flags.get())?;
        let (space, reservations) = parts(entry)?;
        // This part of S6 comes first, since without it the request has no range.
        let complete = request.count.get() as usize == extents.len() && (1..=EXTENTS_MAX).contains(&extents.len());
        require(complete, Status::Inval)?;
        let granule = self.settings.granule();
        let granules: u64 = extents.iter().map(|extent| extent.granules()).sum();
        let start = request.virt_start.get();
        let last = granules.checked_mul(granule).map(|bytes| bytes - 1).ok_or(Status::Range)?;
        let end = start.checked_add(last).ok_or(Status::Range)?;
        self.check_range(start, end)?;
        require(extents.iter().all(|&extent| fits(extent, granule)), Status::Range)?;
        require(reservations.contain(start, end), Status::Range)?;
        let runs =
            extents.iter().map(|extent| Run { phys: extent.phys(), pages: extent.granules() * (granule / PAGE) });
        space.link(start, runs, flags, request.tag.get())?;
        entry.reservations.linked += granules * (granule / PAGE);
        self.counters.linked(granules * granule);
        Ok(granules)
    }

    pub(super) fn unlink(&self, request: &Range) -> Granules {
        let mut domains = self.domains();
        let entry = self.entry(&mut domains, request.domain.get())?;
        let (start, end) = self.check_range_request(entry, request)?;
        require(entry.reservations.contain(start, end), Status::Inval)?;
        self.remove_links(&mut domains, request)
    }

    pub(super) fn release(&self, request: &Range) -> Granules {
        let mut domains = self.domains();
        let entry = self.entry(&mut domains, request.domain.get())?;
        let (start, end) = self.check_range_request(entry, request)?;
        require(entry.reservations.remove(start, end), Status::NoEnt)?;
        self.counters.released();
        let unlinked = self.remove_links(&mut domains, request);
        domains.end_if_unused(request.domain.get());
        unlinked
    }

    /// The status of a request of which a reservation is in the way. Says once what a driver of an older version of the
    /// protocol does not know.
    pub(super) fn reserved_status(&self, entry: &DomainEntry) -> Status {
        if entry.survived {
            self.explained_survivor.call_once(|| {
                log::warn!(
                    "A request for domain {} is refused because of a reservation. The domain was without endpoints \
                     before, and its reservations outlived that, as they do until the driver releases them (rule S12 of \
                     docs/split-protocol.md). A driver that was made for an older version of the protocol takes them for \
                     gone. This is not said again",
                    entry.domain.id
                );
            });
        }
        Status::Inval
    }

    /// Unlinks whatever is linked in a range that lies inside a reservation. Needs no memory and does not fail, since each
    /// linked page is a mapping of its own.
    fn remove_links(&self, domains: &mut Domains, request: &Range) -> Granules {
        let entry = self.entry(domains, request.domain.get())?;
        let (space, _) = parts(entry)?;
        let removed = space.unmap(request.virt_start.get(), request.virt_end.get()).map_err(|_| Status::DevErr)?;
        let pages = removed.mappings;
        entry.reservations.linked -= pages;
        self.counters.unlinked(pages * PAGE);
        if pages > 0 {
            // S14
            domains.note_removal();
        }
        Ok(pages / (self.settings.granule() / PAGE))
    }

    /// S1.
    fn entry<'d>(&self, domains: &'d mut Domains, id: u32) -> Result<&'d mut DomainEntry, Status> {
        self.check_domain_range(id)?;
        domains.get(id).ok_or(Status::NoEnt)
    }

    /// S2 and S3 of a request for a range.
    fn check_range_request(&self, entry: &DomainEntry, request: &Range) -> Result<(u64, u64), Status> {
        parts(entry)?;
        require(request.flags.get() == 0, Status::Inval)?;
        let (start, end) = (request.virt_start.get(), request.virt_end.get());
        self.check_range(start, end)?;
        Ok((start, end))
    }

    /// S3.
    fn check_range(&self, start: u64, end: u64) -> Result<(), Status> {
        self.check_map_range(start, end, 0)
    }
}

/// The address space and the reservations of a domain that is no bypass domain (S2).
fn parts(entry: &DomainEntry) -> Result<(&AddressSpace, &Reservations), Status> {
    let space = entry.domain.space.as_ref().ok_or(Status::Inval)?;
    Ok((space, &entry.reservations))
}

/// Whether an extent is aligned to the granule and lies inside the 2^64 addresses.
fn fits(extent: Extent, granule: u64) -> bool {
    let last = (extent.granules() * granule).checked_sub(1).and_then(|last| extent.phys().checked_add(last));
    extent.phys().is_multiple_of(granule) && last.is_some()
}
