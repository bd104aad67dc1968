//! A domain's address space: which I/O virtual address leads where.
//!
//! It is a page table like that of hardware, with 9 bits a level above pages of 4 KiB. Unlike hardware's it covers all
//! 64 bits and has leaves at every level, so that a MAP of any size takes a bounded number of stores: all 2^64 bytes
//! are the 128 slots of the root. Marks on the first and the last leaf of a MAP show exactly whether an UNMAP would
//! split it.
//!
//! One writer at a time changes it. Readers take no lock and never wait. Tables are freed only after a grace period
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

/// Bytes of a page, the smallest unit that is mapped.
pub const PAGE: u64 = 1 << node::PAGE_SHIFT;

/// The result of [`AddressSpace::lookup`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where the address leads.
    pub phys: u64,
    /// The number of bytes from there on that surely belong to the same mapping. At least 1; 2^64 is given as
    /// `u64::MAX`.
    pub len: u64,
    /// The accesses that are allowed.
    pub flags: MapFlags,
    /// The tag of the LINK that made it, or 0.
    pub tag: u64,
}

/// Why a MAP was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// A part of the range is mapped already. Nothing changed.
    Overlap,
    /// The byte budget is used up. Nothing changed.
    NoMemory,
}

/// An UNMAP would have split a mapping. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splits;

/// The result of an UNMAP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// The number of removed mappings, as MAP made them. Each page of a LINK is one.
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
    /// An empty address space. Guards that are passed to [`AddressSpace::lookup`] must belong to readers of `grace`.
    /// All tables but the root are charged to `budget`.
    pub fn new(grace: Arc<Grace>, budget: Arc<Budget>) -> Self {
        let root = std::array::from_fn(|_| Slot::default());
        AddressSpace { root, grace, budget, writer: Padded(Mutex::new(Writer::new())) }
    }

    /// Maps the inclusive range to `phys`. The range must not be empty, and it and `phys` must be aligned to 4 KiB. New
    /// readers see the mapping when this returns. The calling thread must not be in a read-side section.
    pub fn map(&self, start: u64, end: u64, phys: u64, flags: MapFlags) -> Result<(), MapError> {
        debug_assert!(start <= end && start & span(0) == 0 && !end & span(0) == 0 && phys & span(0) == 0);
        // A caller that passes other values gets whole pages.
        let request = MapRequest { start: start & !span(0), end: end | span(0), phys, flags };
        self.add(|writer, _| writer.map(&self.root, &self.budget, &request))
    }

    /// Maps the pages of `runs` in order from `start` on, each as a mapping of its own that carries `tag`; or maps none
    /// of them. `start` must be aligned to 4 KiB, and neither the range nor a run may go beyond the last address.
    /// Otherwise this is like [`AddressSpace::map`].
    pub fn link(
        &self,
        start: u64,
        runs: impl Iterator<Item = Run> + Clone,
        flags: MapFlags,
        tag: u64,
    ) -> Result<(), MapError> {
        self.add(|writer, unlinked| writer.link(&self.root, &self.budget, unlinked, start, runs.clone(), flags, tag))
    }

    /// Adds mappings: `attempt` adds them all, or changes nothing that a reader could see. It is tried again when
    /// memory was freed.
    fn add(&self, attempt: impl Fn(&mut Writer, &mut Unlinked) -> Result<(), Obstacle>) -> Result<(), MapError> {
        let mut unlinked = Unlinked::new();
        let mut writer = lock(&self.writer.0);
        let mut result = attempt(&mut writer, &mut unlinked);
        if let Err(Obstacle::Table | Obstacle::NoMemory) = result {
            // Tables may be in the way that are kept for later, or that are still to be freed.
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
            // Unlink the tables that were made before the attempt failed.
            writer.unlink_idle(&self.root, &mut unlinked);
        }
        drop(writer);
        self.retire(unlinked);
        Ok(result?)
    }

    /// Removes all mappings inside the inclusive range, which need not be aligned. When this returns, new readers do
    /// not see them. Readers inside a section may use them until a [`Grace::synchronize`] that the caller starts now is
    /// over.
    pub fn unmap(&self, start: u64, end: u64) -> Result<Removed, Splits> {
        let mut unlinked = Unlinked::new();
        let mut writer = lock(&self.writer.0);
        let result = writer.unmap(&self.root, start, end, &mut unlinked);
        writer.trim(&self.root, &mut unlinked);
        drop(writer);
        self.retire(unlinked);
        Ok(Removed { mappings: result? })
    }

    /// Removes all mappings of [`AddressSpace::map`], and none of [`AddressSpace::link`]. Otherwise this is like
    /// [`AddressSpace::clear`].
    pub fn clear_maps(&self) -> Removed {
        let mut unlinked = Unlinked::new();
        let mappings = lock(&self.writer.0).clear_maps(&self.root, &mut unlinked);
        self.retire(unlinked);
        Removed { mappings }
    }

    /// Removes all mappings, as an UNMAP of all 2^64 addresses does, and retires all tables.
    pub fn clear(&self) -> Removed {
        let mut unlinked = Unlinked::new();
        let mappings = lock(&self.writer.0).clear(&self.root, &mut unlinked);
        self.retire(unlinked);
        Removed { mappings }
    }

    /// Whether nothing is mapped in the inclusive range.
    pub fn is_empty(&self, start: u64, end: u64) -> bool {
        // No table is freed while the writer's lock is held.
        let _writer = lock(&self.writer.0);
        link::is_empty(&self.root, node::ROOT_LEVEL, start, end)
    }

    /// Looks an address up.
    ///
    /// # Panics
    /// If `guard` belongs to a reader of another [`Grace`], as it would not keep the tables alive.
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

    /// The number of mappings. Each page of a LINK is one.
    pub fn mappings(&self) -> u64 {
        lock(&self.writer.0).mappings
    }

    /// Bytes of all tables, including idle ones.
    pub fn bytes(&self) -> u64 {
        lock(&self.writer.0).bytes
    }

    /// Frees tables after a grace period.
    fn retire(&self, unlinked: Unlinked) {
        if !unlinked.is_empty() {
            // SAFETY: The writer has unlinked them and keeps no reference. `Grace` keeps them until the readers are
            // gone.
            let retired = unsafe { Retired::new(self.budget.clone(), unlinked) };
            self.grace.retire(Box::new(retired));
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        let mut unlinked = Unlinked::new();
        lock(&self.writer.0).clear(&self.root, &mut unlinked);
        // SAFETY: Every reader had a reference to this address space. Nobody has one any more, so there is no need to
        // wait.
        drop(unsafe { Retired::new(self.budget.clone(), unlinked) });
    }
}
