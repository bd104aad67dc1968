//! The client's memory, as its DMA_MAP and DMA_UNMAP messages describe it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use crate::dma::Memory;

/// The most regions that a client may have mapped at once: each costs a descriptor and a mapping of this process.
/// QEMU makes some tens.
const REGIONS_MAX: usize = 1024;

/// How long an UNMAP waits for accesses in progress. They are copies of bounded length, so the limit is met only when
/// a thread does not run at all.
const GRACE_MAX: Duration = Duration::from_secs(5);

/// Why a DMA_MAP or DMA_UNMAP was refused. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegionError {
    #[error("The range {gpa:#x} + {len:#x} is empty or ends past 2^64")]
    Range { gpa: u64, len: u64 },
    #[error("The range {gpa:#x} + {len:#x} overlaps the region at {other:#x}, which is mapped already")]
    Overlap { gpa: u64, len: u64, other: u64 },
    #[error("More than {REGIONS_MAX} regions are mapped")]
    TooMany,
    #[error("The file has {have:#x} bytes, and the region needs {offset:#x} + {len:#x}")]
    PastEnd { have: u64, offset: u64, len: u64 },
    #[error("The file cannot be mapped")]
    Map(#[source] io::Error),
    #[error("The range {gpa:#x} + {len:#x} would split the region at {other:#x}")]
    Splits { gpa: u64, len: u64, other: u64 },
}

/// A region as the client named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub gpa: u64,
    pub len: u64,
    pub writable: bool,
    /// Whether there is memory behind it: ROM and device memory come without a file.
    backed: bool,
}

/// The regions, and the [`Memory`] made of those that have memory behind them.
pub(super) struct MemoryMap {
    memory: Memory,
    regions: BTreeMap<u64, Region>,
}

impl MemoryMap {
    /// Takes charge of `memory`, which is empty.
    pub fn new(memory: Memory) -> Self {
        MemoryMap { memory, regions: BTreeMap::new() }
    }

    /// Adds a region: `len` bytes of `file` from `offset` on, or without a file a range that is known but cannot be
    /// accessed.
    pub fn map(
        &mut self,
        gpa: u64,
        len: u64,
        writable: bool,
        file: Option<(File, u64)>,
    ) -> Result<Region, RegionError> {
        let last = last(gpa, len)?;
        if self.regions.len() >= REGIONS_MAX {
            return Err(RegionError::TooMany);
        }
        if let Some((&other, _)) =
            self.regions.range(..=last).next_back().filter(|(_, region)| region.gpa + (region.len - 1) >= gpa)
        {
            return Err(RegionError::Overlap { gpa, len, other });
        }
        let region = Region { gpa, len, writable, backed: file.is_some() };
        if let Some((file, offset)) = file {
            let mapped = Arc::new(mmap(gpa, len, writable, file, offset)?);
            let grown = self.memory.memory().insert_region(mapped);
            self.replace(grown.map_err(|e| RegionError::Map(io::Error::other(e)))?);
        }
        self.regions.insert(gpa, region);
        Ok(region)
    }

    /// Removes all regions inside a range. When it returns, no access to them is in progress.
    pub fn unmap(&mut self, gpa: u64, len: u64) -> Result<Vec<Region>, RegionError> {
        let last = last(gpa, len)?;
        let splits = |region: &Region| region.gpa < gpa || region.gpa + (region.len - 1) > last;
        let inside: Vec<Region> = self
            .regions
            .range(..=last)
            .rev()
            .map(|(_, region)| *region)
            .take_while(|region| region.gpa + (region.len - 1) >= gpa)
            .collect();
        if let Some(region) = inside.iter().find(|region| splits(region)) {
            return Err(RegionError::Splits { gpa, len, other: region.gpa });
        }
        self.remove(&inside);
        Ok(inside)
    }

    /// Removes everything.
    pub fn clear(&mut self) -> Vec<Region> {
        let all: Vec<Region> = self.regions.values().copied().collect();
        self.remove(&all);
        all
    }

    fn remove(&mut self, gone: &[Region]) {
        let mut map = GuestMemoryMmap::clone(&self.memory.memory());
        for region in gone {
            self.regions.remove(&region.gpa);
            if region.backed
                && let Ok((smaller, _)) = map.remove_region(GuestAddress(region.gpa), region.len)
            {
                map = smaller;
            }
        }
        if gone.iter().any(|region| region.backed) {
            self.replace(map);
        }
    }

    /// Publishes `map` and waits until nobody uses the one before: `store` turns every guard on it into a reference,
    /// later ones are on the new one, and each access holds its guard for one bounded copy. Accesses cannot crash
    /// either way, since whoever holds the old map keeps its mappings alive; waiting is for the client, which may
    /// give the memory to something else as soon as it has the reply.
    fn replace(&self, map: GuestMemoryMmap) {
        let old = self.memory.memory().into_inner();
        match self.memory.lock() {
            Ok(guard) => guard.replace(map),
            Err(poisoned) => poisoned.into_inner().replace(map),
        }
        let begun = Instant::now();
        while Arc::strong_count(&old) > 1 {
            if begun.elapsed() > GRACE_MAX {
                log::warn!("An access to removed guest memory has been in progress for {GRACE_MAX:?}");
                break;
            }
            std::thread::yield_now();
        }
    }
}

/// The last address of a range.
fn last(gpa: u64, len: u64) -> Result<u64, RegionError> {
    // The end itself must be representable, since `GuestRegionMmap` computes it.
    match len {
        0 => None,
        _ => gpa.checked_add(len).map(|end| end - 1),
    }
    .ok_or(RegionError::Range { gpa, len })
}

fn mmap(gpa: u64, len: u64, writable: bool, file: File, offset: u64) -> Result<GuestRegionMmap, RegionError> {
    // An access to a page past the end of the file would be a SIGBUS.
    let have = file.metadata().map_err(RegionError::Map)?.len();
    if offset.checked_add(len).is_none_or(|end| end > have) {
        return Err(RegionError::PastEnd { have, offset, len });
    }
    let size = usize::try_from(len).map_err(|e| RegionError::Map(io::Error::other(e)))?;
    let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    let mapping = MmapRegionBuilder::new(size)
        .with_mmap_prot(prot)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, offset))
        .build()
        .map_err(|e| RegionError::Map(io::Error::other(e)))?;
    GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or(RegionError::Range { gpa, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn map() -> MemoryMap {
        MemoryMap::new(Memory::new(GuestMemoryMmap::default()))
    }

    #[test]
    fn what_is_mapped_can_be_accessed_until_it_is_unmapped() {
        let mut map = map();
        map.map(0x10000, 0x2000, true, Some((file(0x4000), 0x1000))).unwrap();
        let memory = map.memory.clone();
        memory.memory().write_slice(b"hello", GuestAddress(0x11000)).unwrap();
        assert_eq!(map.unmap(0, 0x100000).unwrap().len(), 1);
        assert!(memory.memory().write_slice(b"hello", GuestAddress(0x11000)).is_err());
    }

    #[test]
    fn a_region_without_a_file_is_known_but_no_memory() {
        let mut map = map();
        map.map(0xc0000, 0x1000, false, None).unwrap();
        assert!(map.memory.memory().read_obj::<u8>(GuestAddress(0xc0000)).is_err());
        assert!(matches!(map.map(0xc0000, 0x1000, true, None), Err(RegionError::Overlap { .. })));
        assert_eq!(map.unmap(0xc0000, 0x1000).unwrap().len(), 1);
    }

    #[test]
    fn odd_ranges_are_refused_and_change_nothing() {
        let mut map = map();
        map.map(0x1000, 0x2000, true, Some((file(0x2000), 0))).unwrap();
        assert!(matches!(map.map(0, 0, true, None), Err(RegionError::Range { .. })));
        assert!(matches!(map.map(u64::MAX, 2, true, None), Err(RegionError::Range { .. })));
        assert!(matches!(map.map(0, u64::MAX, true, None), Err(RegionError::Overlap { .. })));
        assert!(matches!(map.map(0x10000, 1 << 60, true, Some((file(0x1000), 0))), Err(RegionError::PastEnd { .. })));
        assert!(matches!(map.map(0x10000, 0x1000, true, Some((file(0x2000), 1))), Err(RegionError::Map(_))));
        assert!(matches!(
            map.map(0x10000, 0x1000, true, Some((file(0x1000), u64::MAX))),
            Err(RegionError::PastEnd { .. })
        ));
        assert!(matches!(map.unmap(0x2000, 0x1000), Err(RegionError::Splits { .. })));
        assert!(matches!(map.unmap(0, 0), Err(RegionError::Range { .. })));
        assert_eq!(map.memory.memory().num_regions(), 1);
    }

    #[test]
    fn an_unmap_waits_for_an_access_in_progress() {
        let mut map = map();
        map.map(0x1000, 0x1000, true, Some((file(0x1000), 0))).unwrap();
        let held = map.memory.memory();
        let released = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let held = held;
                std::thread::sleep(Duration::from_millis(50));
                released.store(true, std::sync::atomic::Ordering::SeqCst);
                drop(held);
            });
            map.unmap(0x1000, 0x1000).unwrap();
            assert!(released.load(std::sync::atomic::Ordering::SeqCst));
        });
    }

    proptest! {
        /// Against a set of pages: what the map says is what the set says.
        #[test]
        fn agrees_with_a_set_of_pages(steps in prop::collection::vec((any::<bool>(), 0u64..24, 1u64..8), 1..60)) {
            let mut map = map();
            let mut regions: Vec<(u64, u64)> = Vec::new();
            for (add, start, len) in steps {
                let overlaps = |r: &(u64, u64)| r.0 < start + len && start < r.0 + r.1;
                if add {
                    let expected = !regions.iter().any(overlaps);
                    let done = map.map(start << 12, len << 12, true, Some((file(len << 12), 0))).is_ok();
                    prop_assert_eq!(done, expected);
                    if done {
                        regions.push((start, len));
                    }
                } else {
                    let inside = |r: &(u64, u64)| r.0 >= start && r.0 + r.1 <= start + len;
                    let expected = regions.iter().all(|r| !overlaps(r) || inside(r));
                    let result = map.unmap(start << 12, len << 12);
                    prop_assert_eq!(result.is_ok(), expected);
                    if expected {
                        regions.retain(|r| !inside(r));
                    }
                }
                let memory = map.memory.memory();
                for page in 0..32u64 {
                    let expected = regions.iter().any(|r| r.0 <= page && page < r.0 + r.1);
                    prop_assert_eq!(memory.read_obj::<u8>(GuestAddress(page << 12)).is_ok(), expected);
                }
            }
        }
    }
}
