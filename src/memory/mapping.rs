//! A file of guest memory, mapped as a whole.

use std::fs::{File, Metadata};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::sigbus::{self, PAGE};

/// A mapped file, from its start to its present end. It is mapped as a whole because a client may describe its memory
/// in many small pieces of one file. Together they then cost one mapping and no descriptor, and offsets that are no
/// multiple of the file's page size do no harm.
pub(super) struct FileMapping {
    // In this order: the handler must not mistake whatever is mapped there next for guest memory.
    watch: sigbus::Watch,
    memory: Mapped,
    len: u64,
}

/// Bytes of this process's address space, unmapped when dropped.
struct Mapped {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the memory is shared with other processes anyway, and accessed in ways that allow for that.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl FileMapping {
    /// Maps a file, which must not be empty, with the length that is in `metadata`. If the file has become shorter
    /// since, an access to the missing part fails like any other access to a page that is not available.
    pub(super) fn new(file: &File, metadata: &Metadata, writable: bool) -> io::Result<FileMapping> {
        let block = block(metadata);
        // munmap(2) wants whole huge pages.
        let len = usize::try_from(metadata.len()).ok().and_then(|len| len.checked_next_multiple_of(block));
        let len = len.ok_or_else(|| io::Error::other("it does not fit in the address space"))?;
        let bytes = NonZeroUsize::new(len).ok_or_else(|| io::Error::other("it is empty"))?;
        let prot = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses an address that nothing else uses.
        let start = unsafe { mmap(None, bytes, prot, flags, file, 0) }?;
        let memory = Mapped { start, len };
        let watch = sigbus::Watch::new(start.as_ptr().expose_provenance(), len, block);
        Ok(FileMapping { watch, memory, len: metadata.len() })
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The address of a byte of the file. The offset must be inside the file.
    pub(super) fn at(&self, offset: u64) -> *mut u8 {
        assert!(offset < self.len);
        self.memory.start.as_ptr().cast::<u8>().wrapping_add(offset as usize)
    }

    /// The state of its pages.
    pub(super) fn watch(&self) -> &sigbus::Watch {
        &self.watch
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped in `FileMapping::new`, and unused by now: all code that accesses it holds the `FileMapping`.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            log::error!("Guest memory cannot be unmapped: {error}");
        }
    }
}

/// The unit in which a file's pages come and go, which is their size for huge pages.
pub fn block(metadata: &Metadata) -> usize {
    usize::try_from(metadata.blksize()).unwrap_or(PAGE).max(PAGE).next_multiple_of(PAGE)
}
