//! The guest's memory as the client of a PCI function describes it: regions of guest-physical addresses, each a part of
//! a file.
//!
//! [`MemoryMap`] takes the client's messages, and accesses go through [`Memory`]. An access works on the [`Regions`]
//! that it finds when it begins. A removed region is freed when the last access to it has ended, and its removal is not
//! answered before that. An access to a page that is not available fails: see [`sigbus`].

mod map;
mod mapping;
mod regions;
mod remote;
pub mod sigbus;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::{ArcSwap, Guard};
pub use map::{FILES_MAX, MAPPED_MAX, MemoryMap, NewRegion, REGIONS_MAX, RegionError, RegionSource};
pub(crate) use map::{PATIENCE, wait_until_unused};
use mapping::FileMapping;
pub use mapping::block;
pub use regions::Regions;
pub use remote::Remote;
use vm_memory::{Bytes, VolatileSlice};

/// Guest memory, which may change at any time. Clones are the same memory.
#[derive(Clone, Default)]
pub struct Memory(Arc<Shared>);

#[derive(Default)]
struct Shared {
    regions: ArcSwap<Regions>,
    /// The log has said that memory is not shared.
    warned: AtomicBool,
}

/// A range of guest-physical addresses.
pub struct Region {
    /// Its first address.
    pub gpa: u64,
    /// Its length in bytes, at least one. The end fits in 64 bits.
    pub len: u64,
    /// Whether the client lets a device read it.
    pub readable: bool,
    /// Whether the client lets a device write to it.
    pub writable: bool,
    /// `None` for ROM, device memory and RAM that is not shared, which come without a file.
    backing: Option<Backing>,
}

/// The memory of a region.
enum Backing {
    /// A mapped file, from an offset on.
    Mapped { file: Arc<FileMapping>, offset: u64 },
    /// Memory that is accessed through a [`Remote`].
    Remote(Arc<dyn Remote>),
}

/// A contiguous piece of guest memory.
pub enum Piece<'r> {
    /// It is in this process's address space.
    Mapped(VolatileSlice<'r>),
    /// It is elsewhere. The numbers are its guest-physical address and its length in bytes.
    Remote(&'r dyn Remote, u64, usize),
}

impl Piece<'_> {
    fn len(&self) -> usize {
        match self {
            Piece::Mapped(slice) => slice.len(),
            Piece::Remote(_, _, len) => *len,
        }
    }
}

/// A part of a range has no memory, must not be accessed in this way, or was lost to SIGBUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAccess;

impl Memory {
    /// The present regions. Those that are removed meanwhile stay accessible until this is dropped.
    #[inline]
    pub fn load(&self) -> Guard<Arc<Regions>> {
        self.0.regions.load()
    }

    /// Logs, once, why an access from `gpa` on failed, if the guest itself is not the cause.
    pub fn explain(&self, gpa: u64, len: u64) {
        let regions = self.load();
        for region in regions.touching(gpa, gpa.saturating_add(len - 1)) {
            match &region.backing {
                None => self.warn_unshared(region.gpa),
                Some(Backing::Mapped { file, .. }) if file.watch().is_bad() && file.watch().is_first_report() => {
                    log::error!(
                        "Guest memory at {gpa:#x} + {len:#x} is not available (SIGBUS): its file was truncated, its file \
                         system is full, or no huge page is left. Accesses to such pages fail until the client maps \
                         the file again"
                    );
                }
                Some(_) => {}
            }
        }
    }

    /// Logs, once for each client, that some memory is not shared.
    pub fn warn_unshared(&self, gpa: u64) {
        if !self.0.warned.swap(true, Ordering::AcqRel) {
            log::warn!(
                "A device cannot access guest memory at {gpa:#x}: QEMU gave no file for it. If that is RAM it must be \
                 shared: share=on is missing, as in -object memory-backend-memfd,id=mem,size=...,share=on -machine \
                 memory-backend=mem"
            );
        }
    }
}

impl Region {
    /// The last address.
    pub fn last(&self) -> u64 {
        self.gpa + (self.len - 1)
    }

    /// Whether there is memory behind it.
    pub fn is_backed(&self) -> bool {
        self.backing.is_some()
    }

    /// Its memory from `gpa` on, at most `len` bytes. `gpa` must be in the region.
    #[inline]
    fn piece(&self, gpa: u64, len: u64) -> Option<Piece<'_>> {
        let (at, len) = (gpa - self.gpa, len.min(self.last() - gpa + 1));
        match self.backing.as_ref()? {
            Backing::Mapped { file, offset } => {
                // SAFETY: a region was checked to lie in its file when it was made, and the file stays mapped as long
                // as the region lives. There are no references into the memory. A page that is not available is
                // replaced.
                Some(Piece::Mapped(unsafe { VolatileSlice::new(file.at(offset + at), len as usize) }))
            }
            Backing::Remote(remote) => Some(Piece::Remote(remote.as_ref(), gpa, len as usize)),
        }
    }

    fn allows(&self, write: bool) -> bool {
        if write { self.writable } else { self.readable }
    }

    /// Whether a page was lost to SIGBUS that has some of the `len` bytes from `gpa` on. Only bytes in this region
    /// count.
    #[inline]
    fn is_bad(&self, gpa: u64, len: u64) -> bool {
        let Some(Backing::Mapped { file, offset }) = &self.backing else { return false };
        if !file.watch().is_bad() {
            return false;
        }
        let first = gpa.max(self.gpa);
        let last = gpa.saturating_add(len - 1).min(self.last());
        let at = file.at(offset + (first - self.gpa)).expose_provenance();
        file.watch().is_bad_at(at, (last - first + 1) as usize)
    }
}

impl Regions {
    /// Reads memory from `gpa` on.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), NoAccess> {
        let mut done = 0;
        self.each(gpa, data.len() as u64, false, |piece| {
            let data = &mut data[done..done + piece.len()];
            done += data.len();
            match piece {
                Piece::Mapped(slice) => slice.read_slice(data, 0).map_err(|_| NoAccess),
                Piece::Remote(remote, gpa, _) => remote.read(gpa, data),
            }
        })
    }

    /// Writes memory from `gpa` on. Writes nothing if a part of it is no memory or must not be written.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), NoAccess> {
        let mut done = 0;
        self.each(gpa, data.len() as u64, true, |piece| {
            let data = &data[done..done + piece.len()];
            done += data.len();
            match piece {
                Piece::Mapped(slice) => slice.write_slice(data, 0).map_err(|_| NoAccess),
                Piece::Remote(remote, gpa, _) => remote.write(gpa, data),
            }
        })
    }

    /// Passes the memory of `len` bytes from `gpa` on to `access`, piece by piece. Fails before the first piece if a
    /// part is no memory, or is not readable or writable as needed. Fails also if a page turns out to be lost to
    /// SIGBUS.
    pub fn each<'r>(
        &'r self,
        gpa: u64,
        len: u64,
        write: bool,
        mut access: impl FnMut(Piece<'r>) -> Result<(), NoAccess>,
    ) -> Result<(), NoAccess> {
        let piece = |done: u64| {
            let at = gpa.checked_add(done).ok_or(NoAccess)?;
            let region = self.find(at).filter(|region| region.allows(write)).ok_or(NoAccess)?;
            let piece = region.piece(at, len - done).filter(|_| !region.is_bad(at, len - done)).ok_or(NoAccess)?;
            Ok((region, piece))
        };
        let mut seen = 0;
        while seen < len {
            let (region, found) = piece(seen)?;
            if found.len() as u64 == len {
                // All of it is in one region, as nearly always.
                access(found)?;
                return if region.is_bad(gpa, len) { Err(NoAccess) } else { Ok(()) };
            }
            seen += found.len() as u64;
        }
        let mut done = 0;
        while done < len {
            let (region, found) = piece(done)?;
            done += found.len() as u64;
            access(found)?;
            if region.is_bad(gpa, len) {
                return Err(NoAccess);
            }
        }
        Ok(())
    }

    /// Whether no page of a range has been lost to SIGBUS so far. The range must be memory.
    pub fn is_intact(&self, gpa: u64, len: u64) -> bool {
        !sigbus::any() || !self.touching(gpa, gpa.saturating_add(len - 1)).any(|region| region.is_bad(gpa, len))
    }
}
