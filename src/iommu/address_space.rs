//! A domain's address space: which I/O virtual address leads where.

use crate::wire::virtio_iommu::MapFlags;
use std::collections::BTreeMap;
use std::sync::RwLock;

use super::grace::Guard;

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
#[derive(Default)]
pub struct AddressSpace {
    map: RwLock<BTreeMap<u64, (u64, u64, MapFlags)>>,
}

impl AddressSpace {
    /// Maps the inclusive range, which must be aligned to 4 KiB, to `phys`.
    pub fn map(&self, start: u64, end: u64, phys: u64, flags: MapFlags) -> Result<(), MapError> {
        let mut map = self.map.write().map_err(|_| MapError::NoMemory)?;
        if map.range(..=end).next_back().is_some_and(|(_, m)| m.0 >= start) {
            return Err(MapError::Overlap);
        }
        map.insert(start, (end, phys, flags));
        Ok(())
    }

    /// Removes all mappings inside the inclusive range, which need not be aligned.
    pub fn unmap(&self, start: u64, end: u64) -> Result<Removed, Splits> {
        let mut map = self.map.write().map_err(|_| Splits)?;
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

    /// Looks an address up.
    pub fn lookup(&self, _guard: &Guard<'_>, iova: u64) -> Option<Mapping> {
        let map = self.map.read().ok()?;
        let (start, (end, phys, flags)) = map.range(..=iova).next_back()?;
        if *end < iova {
            return None;
        }
        Some(Mapping { phys: phys + (iova - start), len: (end - iova).saturating_add(1), flags: *flags })
    }
}
