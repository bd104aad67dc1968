//! A domain's address space: which I/O virtual address leads where.
//!
//! It is a page table as hardware has it, with 9 bits a level above pages of 4 KiB, but over all 64 bits and with leaves at
//! every level, so that a MAP of any size is a bounded number of stores: all 2^64 bytes are the 128 slots of the root. Marks
//! on the first and the last leaf of a MAP show exactly whether an UNMAP would split it.
//!
//! One writer at a time changes it; readers take no lock and never wait. Tables are freed only after a grace period
//! ([`super::grace`]).

mod budget;
mod link;
#[cfg(all(loom, test))]
mod loom_tests;
mod node;
#[cfg(all(test, not(loom)))]
mod tests;
mod walk;
mod writer;

pub use budget::Budget;
pub use link::Run;
pub use walk::{Mapped, Walk};

use std::sync::Arc;

use self::budget::Retired;
use self::node::{Root, Slot, span};
use self::writer::{MapRequest, Obstacle, Unlinked, Writer, find};
use super::grace::{self, Grace};
use super::sync::{Mutex, Padded, lock};
use viommu_wire::virtio_iommu::MapFlags;

/// Bytes of a page: the smallest thing that is mapped.
pub const PAGE: u64 = 1 << node::PAGE_SHIFT;

/// What [`AddressSpace::lookup`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where the address leads.
    pub phys: u64,
    /// Bytes from there on that are certain to be of the same mapping; at least 1, 2^64 given as `u64::MAX`.
    pub len: u64,
    /// What is allowed.
    pub flags: MapFlags,
    /// The tag of the LINK that made it, or 0.
    pub tag: u64,
}

/// Why a MAP was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// Some of the range is mapped already. Nothing changed.
    Overlap,
    /// The byte budget is used up. Nothing changed.
    NoMemory,
}

/// An UNMAP would have split a mapping. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splits;

/// What an UNMAP removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Whole mappings, as MAP made them; each page of a LINK is one.
    pub mappings: u64,
}

/// A domain's address space.
pub struct AddressSpace {
    root: Root,
    grace: Arc<Grace>,
    budget: Arc<Budget>,
    writer: Padded<Mutex<Writer>>,
}

impl AddressSpace {
    /// An empty address space. Every guard that is passed to [`AddressSpace::lookup`] must be of a reader of `grace`; all
    /// tables but the root are charged to `budget`.
    pub fn new(grace: Arc<Grace>, budget: Arc<Budget>) -> Self {
        let root = std::array::from_fn(|_| Slot::default());
        AddressSpace { root, grace, budget, writer: Padded(Mutex::new(Writer::new())) }
    }

    /// Maps the inclusive range, which must not be empty and be aligned to 4 KiB, to `phys`, which must be aligned too.
    /// New readers see the mapping when this returns. The calling thread must not be in a read-side section.
    pub fn map(&self, start: u64, end: u64, phys: u64, flags: MapFlags) -> Result<(), MapError> {
        debug_assert!(start <= end && start & span(0) == 0 && !end & span(0) == 0 && phys & span(0) == 0);
        // A caller who gets it wrong gets whole pages.
        let request = MapRequest { start: start & !span(0), end: end | span(0), phys, flags };
        self.add(|writer, _| writer.map(&self.root, &self.budget, &request))
    }

    /// Maps the pages of `runs` one after the other from `start` on, each as a mapping of its own that carries `tag`, or
    /// none of them. `start` must be aligned to 4 KiB, and neither the range nor a run may go beyond the last address.
    /// Otherwise as [`AddressSpace::map`].
    pub fn link(
        &self,
        start: u64,
        runs: impl Iterator<Item = Run> + Clone,
        flags: MapFlags,
        tag: u64,
    ) -> Result<(), MapError> {
        self.add(|writer, unlinked| writer.link(&self.root, &self.budget, unlinked, start, runs.clone(), flags, tag))
    }

    /// Does what adds mappings: `attempt` adds them all, or changes nothing that a reader could see.
    fn add(&self, attempt: impl Fn(&mut Writer, &mut Unlinked) -> Result<(), Obstacle>) -> Result<(), MapError> {
        let mut unlinked = Unlinked::new();
        let mut writer = lock(&self.writer.0);
        let mut result = attempt(&mut writer, &mut unlinked);
        if let Err(Obstacle::Table | Obstacle::NoMemory) = result {
            // What is in the way may be tables that are kept for later, or that wait for their end.
            writer.unlink_idle(&self.root, &mut unlinked);
            self.retire(std::mem::take(&mut unlinked));
            if let Err(Obstacle::NoMemory) = result {
                self.grace.synchronize();
            }
            result = attempt(&mut writer, &mut unlinked);
        }
        if result.is_ok() {
            writer.trim(&self.root, &mut unlinked);
        } else {
            // Tables that were made before it turned out that it is in vain.
            writer.unlink_idle(&self.root, &mut unlinked);
        }
        drop(writer);
        self.retire(unlinked);
        Ok(result?)
    }

    /// Removes all mappings inside the inclusive range, which need not be aligned. New readers do not see them when
    /// this returns; those in a section may use them until a [`Grace::synchronize`] that the caller starts now is over.
    pub fn unmap(&self, start: u64, end: u64) -> Result<Removed, Splits> {
        let mut unlinked = Unlinked::new();
        let mut writer = lock(&self.writer.0);
        let result = writer.unmap(&self.root, start, end, &mut unlinked);
        writer.trim(&self.root, &mut unlinked);
        drop(writer);
        self.retire(unlinked);
        Ok(Removed { mappings: result? })
    }

    /// Removes all mappings, as an UNMAP of all 2^64 addresses does, and gives back all tables.
    pub fn clear(&self) -> Removed {
        let mut unlinked = Unlinked::new();
        let mappings = lock(&self.writer.0).clear(&self.root, &mut unlinked);
        self.retire(unlinked);
        Removed { mappings }
    }

    /// Whether nothing is mapped in the inclusive range.
    pub fn is_empty(&self, start: u64, end: u64) -> bool {
        // No table goes while the writer's lock is held.
        let _writer = lock(&self.writer.0);
        link::is_empty(&self.root, node::ROOT_LEVEL, start, end)
    }

    /// Looks an address up.
    ///
    /// # Panics
    /// If `guard` is of a reader of another [`Grace`]: it would not keep the tables alive.
    #[inline]
    pub fn lookup(&self, guard: &grace::Guard<'_>, iova: u64) -> Option<Mapping> {
        assert!(guard.is_of(&self.grace), "The guard is of another grace period than the address space");
        let (leaf, level, tag) = find(&self.root, iova)?;
        let offset = iova & span(level);
        Some(Mapping {
            phys: leaf.phys().wrapping_add(offset),
            len: span(level) - offset + 1,
            flags: leaf.flags(),
            tag,
        })
    }

    /// Mappings that exist now, each page of a LINK among them.
    pub fn mappings(&self) -> u64 {
        lock(&self.writer.0).mappings
    }

    /// Bytes that the tables take now, idle ones included.
    pub fn bytes(&self) -> u64 {
        lock(&self.writer.0).bytes
    }

    /// Frees tables after a grace period.
    fn retire(&self, unlinked: Unlinked) {
        if !unlinked.is_empty() {
            // SAFETY: The writer has unlinked them and forgotten them; `Grace` keeps them until the readers are gone.
            let retired = unsafe { Retired::new(self.budget.clone(), unlinked) };
            self.grace.retire(Box::new(retired));
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        let mut unlinked = Unlinked::new();
        lock(&self.writer.0).clear(&self.root, &mut unlinked);
        // SAFETY: Whoever read had a reference to this address space. Nobody has one any more: no need to wait.
        drop(unsafe { Retired::new(self.budget.clone(), unlinked) });
    }
}
