//! The reservations of a domain: ranges of I/O virtual addresses in which granules are linked and unlinked.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::address_space::Budget;

/// The bytes charged for a reservation: at least those that the map uses for it when its nodes are as empty as they can be.
const RESERVATION_BYTES: u64 = 64;
/// The bytes charged for a domain that has reservations, since it exists without endpoints for as long as it has them: at
/// least those of its root table, of its entry, of the first node of its reservations and of its list of idle tables.
pub(super) const DOMAIN_BYTES: u64 = 3072;

/// Ranges that do not overlap.
pub(super) struct Reservations {
    /// The last address of each range, by its first address.
    ranges: BTreeMap<u64, u64>,
    budget: Arc<Budget>,
    /// The number of pages that are linked, in all reservations together.
    pub(super) linked: u64,
}

/// The bytes charged for this many reservations of a domain.
fn charge(count: u64) -> u64 {
    if count == 0 { 0 } else { DOMAIN_BYTES + count * RESERVATION_BYTES }
}

/// The budget is used up.
pub(super) struct NoMemory;

impl Reservations {
    /// No reservations yet. Those to come are charged to `budget`.
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Reservations { ranges: BTreeMap::new(), budget, linked: 0 }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.ranges.len() as u64
    }

    /// First and last address of each reservation that begins at `from` or above, in the order of the addresses.
    pub(super) fn from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> {
        self.ranges.range(from..).map(|(start, end)| (*start, *end))
    }

    /// Adds the inclusive range, which must not overlap another.
    pub(super) fn add(&mut self, start: u64, end: u64) -> Result<(), NoMemory> {
        if !self.budget.take(charge(self.count() + 1) - charge(self.count())) {
            return Err(NoMemory);
        }
        self.ranges.insert(start, end);
        Ok(())
    }

    /// Removes exactly this range. Returns whether it existed.
    pub(super) fn remove(&mut self, start: u64, end: u64) -> bool {
        if self.ranges.get(&start) != Some(&end) {
            return false;
        }
        self.ranges.remove(&start);
        self.budget.give_back(charge(self.count() + 1) - charge(self.count()));
        true
    }

    /// Whether the inclusive range overlaps a reservation.
    pub(super) fn touch(&self, start: u64, end: u64) -> bool {
        self.ranges.range(..=end).next_back().is_some_and(|(_, &last)| last >= start)
    }

    /// Whether the inclusive range lies inside a reservation.
    pub(super) fn contain(&self, start: u64, end: u64) -> bool {
        start <= end && self.ranges.range(..=start).next_back().is_some_and(|(_, &last)| last >= end)
    }
}

impl Drop for Reservations {
    fn drop(&mut self) {
        self.budget.give_back(charge(self.count()));
    }
}

#[cfg(all(test, not(loom)))]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::iommu::domain::{Domain, DomainEntry};

    #[test]
    fn a_domain_is_charged_what_it_takes() {
        // A map of entries takes at most twice their size. The other numbers are those of the allocations beside it: a
        // node of 11 ranges, a list of up to 64 idle tables, one member, and the counts of the shared domain.
        let beside = 16 * 12 + 64 * size_of::<(u32, u64)>() + 4 * size_of::<usize>() + 2 * size_of::<usize>();
        let bytes = size_of::<Domain>() + 2 * size_of::<(u32, DomainEntry)>() + beside;
        assert!(bytes as u64 <= DOMAIN_BYTES, "{bytes}");
    }
}
