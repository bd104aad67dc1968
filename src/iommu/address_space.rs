//! A domain's address space: which I/O virtual address leads where.

use crate::wire::virtio_iommu::MapFlags;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::grace::{Grace, Guard};

/// Bytes that all address spaces of a device may take together.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Budget { limit, used: AtomicU64::new(0) })
    }

    /// Bytes that may be taken.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes taken now: by tables that are in use, and by removed ones that a reader may still hold.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// What [`AddressSpace::lookup`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where the address leads.
    pub phys: u64,
    /// Bytes from there on that are certain to be of the same mapping; at least 1, 2^64 given as `u64::MAX`.
    pub len: u64,
    /// What is allowed.
    pub flags: MapFlags,
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
    /// Whole mappings, as MAP made them.
    pub mappings: u64,
}

/// A naive stand-in.
pub struct AddressSpace {
    _grace: Arc<Grace>,
    _budget: Arc<Budget>,
    map: RwLock<BTreeMap<u64, (u64, u64, MapFlags)>>,
}

impl AddressSpace {
    /// An empty address space. Every guard that is passed to [`AddressSpace::lookup`] must be of a reader of `grace`;
    /// the tables are charged to `budget`.
    pub fn new(grace: Arc<Grace>, budget: Arc<Budget>) -> Self {
        AddressSpace { _grace: grace, _budget: budget, map: RwLock::default() }
    }

    /// Maps the inclusive range, which must be aligned to 4 KiB, to `phys`, which must be too. New readers see the
    /// mapping when this returns. The calling thread must not be in a read-side section.
    pub fn map(&self, start: u64, end: u64, phys: u64, flags: MapFlags) -> Result<(), MapError> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if map.range(..=end).next_back().is_some_and(|(_, m)| m.0 >= start) {
            return Err(MapError::Overlap);
        }
        map.insert(start, (end, phys, flags));
        Ok(())
    }

    /// Removes all mappings inside the inclusive range, which need not be aligned. New readers do not see them when
    /// this returns; those in a section may use them until a [`Grace::synchronize`] that the caller starts now is over.
    pub fn unmap(&self, start: u64, end: u64) -> Result<Removed, Splits> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if map.range(..start).next_back().is_some_and(|(_, m)| m.0 >= start)
            || map.range(..=end).next_back().is_some_and(|(s, m)| *s >= start && m.0 > end)
        {
            return Err(Splits);
        }
        let keys: Vec<u64> = map.range(start..=end).map(|(k, _)| *k).collect();
        for key in &keys {
            map.remove(key);
        }
        Ok(Removed { mappings: keys.len() as u64 })
    }

    /// Removes all mappings, as an UNMAP of all 2^64 addresses does, and gives back all tables.
    pub fn clear(&self) -> Removed {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        Removed { mappings: std::mem::take(&mut *map).len() as u64 }
    }

    /// Looks an address up.
    pub fn lookup(&self, _guard: &Guard<'_>, iova: u64) -> Option<Mapping> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let (start, (end, phys, flags)) = map.range(..=iova).next_back()?;
        if *end < iova {
            return None;
        }
        Some(Mapping { phys: phys.wrapping_add(iova - start), len: (end - iova).saturating_add(1), flags: *flags })
    }

    /// Mappings that exist now.
    pub fn mappings(&self) -> u64 {
        self.map.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// Bytes that the tables take now.
    pub fn bytes(&self) -> u64 {
        0
    }
}
