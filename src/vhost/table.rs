//! The memory table: the guest's memory as the frontend gave it last, and as the virtqueues use it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard};

use nix::sys::statfs::HUGETLBFS_MAGIC;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::QueueMemory;
use crate::memory::sigbus::{self, PAGE};
use crate::memory::{PATIENCE, block, wait_until_unused};
use crate::sync::lock;

/// The most regions of a table: as many as the crate tells a frontend that asks (GET_MAX_MEM_SLOTS).
const REGIONS_MAX: usize = 509;

/// Why a table was refused. The one before is used on.
#[derive(Debug, thiserror::Error)]
pub(super) enum TableError {
    #[error("The memory table has {0} regions; {REGIONS_MAX} at most were expected")]
    TooMany(usize),
    #[error(
        "The file of the memory region at {gpa:#x} has {have:#x} bytes, and the region needs {offset:#x} + {len:#x}; a \
         frontend's memory must be as long as it says"
    )]
    PastEnd { gpa: u64, have: u64, offset: u64, len: u64 },
    #[error("The memory region at {gpa:#x} has {len:#x} bytes, no multiple of its file's pages of {block:#x}")]
    PartOfPage { gpa: u64, len: u64, block: u64 },
    #[error("The file of a memory region cannot be looked at")]
    File(#[source] io::Error),
}

/// The table in use.
pub(super) struct MemoryTable {
    /// What the queues are in. The crate has a table too, and exchanges it before anybody could look at the new one.
    memory: QueueMemory,
    /// What looks after each region, by the address at which it is mapped.
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

    /// Uses `new` from now on. When it returns, nobody uses what is not in it any more.
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
        // The worker uses it for a time slice at most, unless a page of it takes long to come.
        wait_until_unused([&mut old], |_| {
            log::warn!("The memory table before has been in use for {PATIENCE:?}; the frontend waits for its end");
        });
        // In this order: the handler must not take for guest memory what is mapped there next.
        drop(before);
        drop(old);
        Ok(())
    }

    /// Whether a page of it could not be had: what was read there is not the guest's.
    pub(super) fn is_lost(&self) -> bool {
        sigbus::any() && self.watches().values().any(sigbus::Watch::is_bad)
    }

    /// The same, for who is to say so: each page is told of once.
    pub(super) fn is_newly_lost(&self) -> bool {
        sigbus::any() && self.watches().values().any(|watch| watch.is_bad() && watch.is_to_be_told())
    }

    fn watches(&self) -> MutexGuard<'_, HashMap<usize, sigbus::Watch>> {
        lock(&self.watches)
    }
}

/// Whether all of a region is in its file, in whole pages of it; how many bytes those have.
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

/// Makes ordinary pages of a region that ends in the midst of a huge page: munmap(2), which the crate calls when it drops
/// the region, refuses part of a huge page, and the memory would stay until the end of the process.
fn let_go(region: &GuestRegionMmap, block: usize) {
    let whole = region.size().next_multiple_of(block);
    let left = region.size().next_multiple_of(PAGE);
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: these are the whole huge pages that the crate mapped for this region, which nobody has accessed and nobody
    // will. What is behind the bytes that the crate knows of is unmapped at once.
    unsafe {
        let at = region.as_ptr();
        if libc::mmap(at.cast(), whole, libc::PROT_NONE, flags, -1, 0) != libc::MAP_FAILED {
            libc::munmap(at.add(left).cast(), whole - left);
        }
    }
}
