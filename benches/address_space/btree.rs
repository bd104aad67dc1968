//! The same job as `viommu::iommu::address_space`, done by a `BTreeMap`. The benchmark compares the speed of the radix
//! table with it, and `tests/plain/address_space.rs` the answers.

use std::collections::BTreeMap;

use viommu::iommu::address_space::{MapError, Mapping, Removed, Splits};
use viommu_wire::virtio_iommu::MapFlags;

/// An address space for one thread, without a lock: from the first byte of each mapping to its last, its target and
/// its flags.
#[derive(Default)]
pub struct BTree {
    mappings: BTreeMap<u64, (u64, u64, MapFlags)>,
}

impl BTree {
    /// As `AddressSpace::map`.
    pub fn map(&mut self, start: u64, end: u64, phys: u64, flags: MapFlags) -> Result<(), MapError> {
        if self.mappings.range(..=end).next_back().is_some_and(|(_, mapping)| mapping.0 >= start) {
            return Err(MapError::Overlap);
        }
        self.mappings.insert(start, (end, phys, flags));
        Ok(())
    }

    /// As `AddressSpace::unmap`.
    pub fn unmap(&mut self, start: u64, end: u64) -> Result<Removed, Splits> {
        let Some((&last_start, &(last_end, ..))) = self.mappings.range(..=end).next_back() else {
            return Ok(Removed { mappings: 0 });
        };
        if last_start < start {
            return if last_end < start { Ok(Removed { mappings: 0 }) } else { Err(Splits) };
        }
        if last_end > end {
            return Err(Splits);
        }
        if last_start == start {
            self.mappings.remove(&start);
            return Ok(Removed { mappings: 1 });
        }
        if self.mappings.range(..start).next_back().is_some_and(|(_, mapping)| mapping.0 >= start) {
            return Err(Splits);
        }
        let inside: Vec<u64> = self.mappings.range(start..=end).map(|(start, _)| *start).collect();
        for start in &inside {
            self.mappings.remove(start);
        }
        Ok(Removed { mappings: inside.len() as u64 })
    }

    /// As `AddressSpace::lookup`, but the length reaches to the end of the mapping.
    pub fn lookup(&self, iova: u64) -> Option<Mapping> {
        let (start, &(end, phys, flags)) = self.mappings.range(..=iova).next_back()?;
        (end >= iova).then(|| Mapping {
            phys: phys.wrapping_add(iova - start),
            len: (end - iova).saturating_add(1),
            flags,
            tag: 0,
        })
    }

    /// First and last byte of each mapping.
    #[allow(dead_code, reason = "the benchmark has no use for it")]
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.mappings.iter().map(|(start, mapping)| (*start, mapping.0))
    }
}
