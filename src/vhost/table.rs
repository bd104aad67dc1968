//! The memory table: the guest's memory as the frontend described it last, and as the virtqueues use it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::statfs::HUGETLBFS_MAGIC;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::QueueMemory;
use crate::memory::sigbus::{self, PAGE};
use crate::memory::{PATIENCE, block, wait_until_unused};
use crate::sync::lock;

/// The most regions of a table: as many as the crate tells a frontend that asks (GET_MAX_MEM_SLOTS).
const REGIONS_MAX: usize = 509;

/// Why a table was refused. The previous one stays in use.
#[derive(Debug, thiserror::Error)]
pub(super) enum TableError {
    #[error("The memory table has {0} regions; at most {REGIONS_MAX} were expected")]
    TooMany(usize),
    #[error(
        "The file of the memory region at {gpa:#x} has {have:#x} bytes, and the region needs {offset:#x} + {len:#x}; a \
         frontend's memory must be as long as it says"
    )]
    PastEnd { gpa: u64, have: u64, offset: u64, len: u64 },
    #[error("The memory region at {gpa:#x} has {len:#x} bytes, no multiple of its file's pages of {block:#x}")]
    PartOfPage { gpa: u64, len: u64, block: u64 },
    #[error("Cannot query the file of a memory region")]
    File(#[source] io::Error),
}

/// The table in use.
pub(super) struct MemoryTable {
    /// The memory that holds the queues. The crate has a table too, but replaces it before anybody could check the new one.
    memory: QueueMemory,
    /// The SIGBUS handler's watch over each region, by the address at which the region is mapped.
    watches: Mutex<HashMap<usize, sigbus::Watch>>,
}

impl MemoryTable {
    /// Without memory.
    pub(super) fn new() -> MemoryTable {
        MemoryTable { memory: QueueMemory::new(GuestMemoryMmap::new()), watches: Mutex::default() }
    }

    /// The memory in use.
    pub(super) fn memory(&self) -> &QueueMemory {
        &self.memory
    }

    /// Uses `new` from now on. When this returns, nobody uses memory that is not in it.
    pub(super) fn replace(&self, new: &GuestMemoryMmap) -> Result<(), TableError> {
        if new.num_regions() > REGIONS_MAX {
            return Err(TableError::TooMany(new.num_regions()));
        }
        let blocks: Vec<usize> = new.iter().map(check).collect::<Result<_, _>>()?;
        let mut watches = self.watches();
        let mut before = std::mem::take(&mut *watches);
        *watches = new
            .iter()
            .zip(blocks)
            .map(|(region, block)| {
                let at = region.as_ptr().expose_provenance();
                (at, before.remove(&at).unwrap_or_else(|| sigbus::Watch::new(at, region.size(), block)))
            })
            .collect();
        drop(watches);
        let mut old = self.memory.memory().into_inner();
        match self.memory.lock() {
            Ok(guard) => guard.replace(new.clone()),
            Err(poisoned) => poisoned.into_inner().replace(new.clone()),
        }
        // The worker uses it for a time slice at most, unless one of its pages takes long to arrive.
        wait_until_unused([&mut old], |_| {
            log::warn!("The previous memory table is still in use after {PATIENCE:?}; the frontend waits for its end");
        });
        // In this order: the handler must not mistake whatever is mapped there next for guest memory.
        drop(before);
        drop(old);
        Ok(())
    }

    /// Whether a page of it was lost to SIGBUS, so that data read there are not the guest's.
    pub(super) fn is_lost(&self) -> bool {
        sigbus::any() && self.watches().values().any(sigbus::Watch::is_bad)
    }

    /// The same for the caller that logs it: true once for each region.
    pub(super) fn is_newly_lost(&self) -> bool {
        sigbus::any() && self.watches().values().any(|watch| watch.is_bad() && watch.is_first_report())
    }

    fn watches(&self) -> MutexGuard<'_, HashMap<usize, sigbus::Watch>> {
        lock(&self.watches)
    }
}

/// Checks that a region lies in its file, in whole pages of it. Returns the size of these pages.
fn check(region: &GuestRegionMmap) -> Result<usize, TableError> {
    let (gpa, len) = (region.start_addr().0, region.len());
    let Some(place) = GuestMemoryRegion::file_offset(region) else { return Ok(0) };
    let metadata = place.file().metadata().map_err(TableError::File)?;
    let (offset, have) = (place.start(), metadata.size());
    if offset.checked_add(len).is_none_or(|end| end > have) {
        return Err(TableError::PastEnd { gpa, have, offset, len });
    }
    let block = block(&metadata);
    if !len.is_multiple_of(block as u64) && is_hugetlb(place.file()) {
        let_go(region, block);
        return Err(TableError::PartOfPage { gpa, len, block: block as u64 });
    }
    Ok(block)
}

fn is_hugetlb(file: &File) -> bool {
    nix::sys::statfs::fstatfs(file).is_ok_and(|system| system.filesystem_type() == HUGETLBFS_MAGIC)
}

/// Puts ordinary pages in the place of a region that ends in the middle of a huge page. The crate calls munmap(2) when it
/// drops the region, which refuses a part of a huge page; the memory would stay until the process ends.
fn let_go(region: &GuestRegionMmap, block: usize) {
    let whole = region.size().next_multiple_of(block);
    let left = region.size().next_multiple_of(PAGE);
    let (Some(at), Some(len)) = (NonZeroUsize::new(region.as_ptr().expose_provenance()), NonZeroUsize::new(whole))
    else {
        return;
    };
    let flags = MapFlags::MAP_FIXED | MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: these are the whole huge pages that the crate mapped for this region, which nobody has accessed and nobody
    // will access. The part beyond the bytes that the crate knows of is unmapped at once.
    unsafe {
        if let Ok(at) = mmap_anonymous(Some(at), len, ProtFlags::PROT_NONE, flags) {
            let _ = munmap(at.byte_add(left), whole - left);
        }
    }
}
