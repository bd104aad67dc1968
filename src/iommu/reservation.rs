//! The reservations of a domain: ranges of I/O virtual addresses in which granules are linked and unlinked.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::address_space::Budget;

/// The bytes charged for a reservation: at least those that the map uses for it when its nodes are as empty as they can be.
const RESERVATION_BYTES: u64 = 64;

/// Ranges that do not overlap.
pub(super) struct Reservations {
    /// The last address of each range, by its first address.
    ranges: BTreeMap<u64, u64>,
    budget: Arc<Budget>,
    /// The number of pages that are linked, in all reservations together.
    pub(super) linked: u64,
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
        if !self.budget.take(RESERVATION_BYTES) {
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
        self.budget.give_back(RESERVATION_BYTES);
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
        self.budget.give_back(RESERVATION_BYTES * self.count());
    }
}
