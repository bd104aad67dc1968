//! The client's memory, as its DMA_MAP and DMA_UNMAP messages describe it.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use libc::c_int;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::mapping::FileMapping;
use super::remote::{FileMemory, Remote};
use super::{Backing, Memory, Region};

/// The most regions that a client may have mapped at once. The Linux kernel's VFIO allows the same number by default.
/// QEMU makes some tens, and one for each block of memory that virtio-mem plugs.
pub const REGIONS_MAX: usize = 65_535;

/// The most files that a client's regions may use at once, whether mapped as a whole or read and written. The kernel
/// allows a process some 65,000 mappings, and the next client needs some too. QEMU has a file for each memory backend.
pub const FILES_MAX: usize = 1024;

/// The most bytes of a client's mapped files together: a thirty-second of a process's address space.
pub const MAPPED_MAX: u64 = 1 << 42;

/// An UNMAP that waits for an access for longer than this logs a warning.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Why a DMA_MAP or DMA_UNMAP was refused. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The range is impossible.
    #[error("The range {gpa:#x} + {len:#x} is empty or ends past 2^64")]
    Range {
        /// The first address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// A part of the range is in use.
    #[error("The range {gpa:#x} + {len:#x} overlaps the region at {other:#x}, which is mapped already")]
    Overlap {
        /// The first address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// The first address of the other.
        other: u64,
    },
    /// There are [`REGIONS_MAX`] regions already.
    #[error("{REGIONS_MAX} regions are mapped, which is the most that a client may have")]
    TooMany,
    /// The file is too short.
    #[error("The file has {have:#x} bytes, and the region needs {offset:#x} + {len:#x}")]
    PastEnd {
        /// The file's bytes.
        have: u64,
        /// Where in the file the region begins.
        offset: u64,
        /// The region's bytes.
        len: u64,
    },
    /// It would take more of the process's address space, or more of its descriptors, than a client may have.
    #[error(
        "The region needs the client's file number {files}, which would map {have:#x} bytes beside {mapped:#x}; a client \
         may have {FILES_MAX} files and map {MAPPED_MAX:#x} bytes"
    )]
    TooLarge {
        /// Bytes of the file that would be mapped.
        have: u64,
        /// How many files the client would have, with this one.
        files: usize,
        /// Bytes of the others that are mapped.
        mapped: u64,
    },
    /// The file has the wrong type, or the operating system does not say which type it has.
    #[error("The file cannot be used")]
    File(#[source] io::Error),
    /// The operating system refuses.
    #[error("The file cannot be mapped")]
    Map(#[source] io::Error),
    /// The request would remove only a part of a region.
    #[error("The range {gpa:#x} + {len:#x} would split the region at {other:#x}")]
    Splits {
        /// The first address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// The region's first address.
        other: u64,
    },
    /// There is nothing to remove.
    #[error("Nothing is mapped in the range {gpa:#x} + {len:#x}")]
    NotMapped {
        /// The first address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
}

/// A region to be added.
pub struct NewRegion {
    /// Its first address.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Whether a device may read it.
    pub readable: bool,
    /// Whether a device may write to it.
    pub writable: bool,
    /// Where its memory is.
    pub source: RegionSource,
}

/// Where a region's memory is.
pub enum RegionSource {
    /// In a file that is to be mapped, from an offset on.
    Mapped(File, u64),
    /// In a file that is to be read and written, from an offset on.
    FileIo(File, u64),
    /// Elsewhere.
    Remote(Arc<dyn Remote>),
    /// Nowhere: the range is known but cannot be accessed.
    Unknown,
}

/// Changes a [`Memory`] as the client demands.
pub struct MemoryMap {
    memory: Memory,
    /// The files that are mapped. A file that has become longer or lost a page is mapped again and is listed twice. So
    /// is one that was mapped only for reading before it was mapped for writing.
    mapped: Vec<Known<FileMapping>>,
    /// The files that are read and written. A file that was opened in several ways is listed once for each.
    open: Vec<Known<File>>,
}

/// A file that regions are in.
struct Known<F> {
    /// Device and inode. Two descriptors of one file have the same, and no other file has them as long as this one is
    /// used.
    identity: (u64, u64),
    /// How it was opened (fcntl(2), F_GETFL), or whether it was mapped for writing.
    how: c_int,
    file: Weak<F>,
}

impl<F> Known<F> {
    /// The file, if `metadata` and `how` fit and it is still used.
    fn get(&self, metadata: &Metadata, is_as_wanted: impl FnOnce(c_int) -> bool) -> Option<Arc<F>> {
        let is_it = self.identity == (metadata.dev(), metadata.ino()) && is_as_wanted(self.how);
        is_it.then(|| self.file.upgrade()).flatten()
    }

    fn new(metadata: &Metadata, how: c_int, file: &Arc<F>) -> Known<F> {
        Known { identity: (metadata.dev(), metadata.ino()), how, file: Arc::downgrade(file) }
    }
}

impl MemoryMap {
    /// Takes charge of `memory`, which is empty.
    pub fn new(memory: Memory) -> Self {
        MemoryMap { memory, mapped: Vec::new(), open: Vec::new() }
    }

    /// The memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Adds a readable region: `len` bytes of `file` from an offset on. Without a file the range is known but cannot be
    /// accessed.
    pub fn map(
        &mut self,
        gpa: u64,
        len: u64,
        writable: bool,
        file: Option<(File, u64)>,
    ) -> Result<Arc<Region>, RegionError> {
        let source = file.map_or(RegionSource::Unknown, |(file, offset)| RegionSource::Mapped(file, offset));
        self.add(NewRegion { gpa, len, readable: true, writable, source })
    }

    /// Adds a region of any kind.
    pub fn add(&mut self, new: NewRegion) -> Result<Arc<Region>, RegionError> {
        let NewRegion { gpa, len, readable, writable, source } = new;
        let last = last(gpa, len)?;
        let regions = self.memory.load();
        if regions.len() >= REGIONS_MAX {
            return Err(RegionError::TooMany);
        }
        if let Some(other) = regions.touching(gpa, last).next() {
            return Err(RegionError::Overlap { gpa, len, other: other.gpa });
        }
        let backing = match source {
            RegionSource::Mapped(file, offset) => Some(self.backing(&file, offset, len, writable)?),
            RegionSource::FileIo(file, offset) => {
                let file = self.opened(file)?;
                Some(Backing::Remote(Arc::new(FileMemory::new(file, offset, gpa))))
            }
            RegionSource::Remote(remote) => Some(Backing::Remote(remote)),
            RegionSource::Unknown => None,
        };
        let region = Arc::new(Region { gpa, len, readable, writable, backing });
        self.memory.0.regions.store(Arc::new(regions.with(region.clone())));
        Ok(region)
    }

    /// Removes all regions inside a range and returns them. There must be at least one. When this returns, no access to
    /// them is in progress.
    pub fn unmap(&mut self, gpa: u64, len: u64) -> Result<Vec<Arc<Region>>, RegionError> {
        let last = last(gpa, len)?;
        let inside: Vec<Arc<Region>> = self.memory.load().touching(gpa, last).cloned().collect();
        if let Some(region) = inside.iter().find(|region| region.gpa < gpa || region.last() > last) {
            return Err(RegionError::Splits { gpa, len, other: region.gpa });
        }
        if inside.is_empty() {
            return Err(RegionError::NotMapped { gpa, len });
        }
        Ok(self.remove(inside))
    }

    /// Removes everything, because the client is gone or demands it.
    pub fn clear(&mut self) -> Vec<Arc<Region>> {
        let all = self.memory.load().iter().cloned().collect();
        self.remove(all)
    }

    /// Whether there are regions, but none has memory. Then no access of a device can succeed.
    pub fn is_unshared(&self) -> bool {
        let regions = self.memory.load();
        !regions.is_empty() && regions.iter().all(|region| !region.is_backed())
    }

    fn remove(&mut self, mut gone: Vec<Arc<Region>>) -> Vec<Arc<Region>> {
        let addresses: Vec<u64> = gone.iter().map(|region| region.gpa).collect();
        let rest = if addresses.is_empty() { return gone } else { self.memory.load().without(&addresses) };
        if rest.is_empty() {
            self.memory.0.warned.store(false, std::sync::atomic::Ordering::Release);
        }
        self.memory.0.regions.store(Arc::new(rest));
        wait_until_unused(&mut gone, |region| {
            log::warn!(
                "An access to removed guest memory at {:#x} is still in progress after {PATIENCE:?}; the client waits for it",
                region.gpa
            );
        });
        gone
    }

    /// A part of a mapped file. A file that is mapped already is not mapped again, unless it has lost a page. A mapping
    /// for writing will do for reading too, since each region says for itself which accesses it allows.
    fn backing(&mut self, file: &File, offset: u64, len: u64, writable: bool) -> Result<Backing, RegionError> {
        // An access to a page past the end of the file would fail.
        let metadata = file.metadata().map_err(RegionError::File)?;
        let have = metadata.len();
        let end = offset.checked_add(len).filter(|end| *end <= have);
        let end = end.ok_or(RegionError::PastEnd { have, offset, len })?;
        let wanted = c_int::from(writable);
        let mut known = self.mapped.iter().rev().filter_map(|known| known.get(&metadata, |how| how >= wanted));
        if let Some(file) = known.find(|file| file.len() >= end && !file.watch().is_bad()) {
            return Ok(Backing::Mapped { file, offset });
        }
        self.check_room(have)?;
        let file = Arc::new(FileMapping::new(file, &metadata, writable).map_err(RegionError::Map)?);
        self.mapped.push(Known::new(&metadata, wanted, &file));
        Ok(Backing::Mapped { file, offset })
    }

    /// A file that is read and written. One descriptor will do for all regions in the file, if their descriptors were
    /// opened in the same way. It must be a regular file, since an access to anything else may wait for somebody.
    fn opened(&mut self, file: File) -> Result<Arc<File>, RegionError> {
        let metadata = file.metadata().map_err(RegionError::File)?;
        if !metadata.is_file() {
            return Err(RegionError::File(Errno::EINVAL.into()));
        }
        let how = fcntl(&file, FcntlArg::F_GETFL).map_err(|error| RegionError::File(error.into()))?;
        // Two descriptors of one /proc/PID/mem may belong to the memory before and after an execve(2).
        let alike =
            fstatfs(&file).map_err(|error| RegionError::File(error.into()))?.filesystem_type() != PROC_SUPER_MAGIC;
        if alike && let Some(file) = self.open.iter().find_map(|known| known.get(&metadata, |known| known == how)) {
            return Ok(file);
        }
        self.check_room(0)?;
        let file = Arc::new(file);
        self.open.push(Known::new(&metadata, how, &file));
        Ok(file)
    }

    /// Checks that one more file is allowed, of which `have` bytes would be mapped.
    fn check_room(&mut self, have: u64) -> Result<(), RegionError> {
        self.mapped.retain(|known| known.file.strong_count() > 0);
        self.open.retain(|known| known.file.strong_count() > 0);
        let mapped = self.mapped.iter().filter_map(|known| known.file.upgrade()).map(|file| file.len()).sum::<u64>();
        let files = self.mapped.len() + self.open.len() + 1;
        if files > FILES_MAX || mapped.saturating_add(have) > MAPPED_MAX {
            return Err(RegionError::TooLarge { have, files, mapped });
        }
        Ok(())
    }
}

/// Waits until nobody uses `removed` any more. New accesses do not find it. Each access holds what it found for one
/// bounded copy, which takes long only if a page of the memory takes long to arrive. Accesses never crash, since they
/// keep the mappings alive. The wait is for the client's sake, which may use the memory for something else as soon as
/// it has the reply. So the wait ends only with the access, as an earlier reply would be a lie. `warn` is called once,
/// with what the wait is for, if it has taken [`PATIENCE`].
pub(crate) fn wait_until_unused<'a, T: 'a>(removed: impl IntoIterator<Item = &'a mut Arc<T>>, warn: impl Fn(&T)) {
    let begun = Instant::now();
    let mut warned = false;
    for removed in removed {
        while Arc::get_mut(removed).is_none() {
            if begun.elapsed() < Duration::from_millis(1) {
                thread::yield_now();
                continue;
            }
            thread::sleep(Duration::from_micros(200));
            if !warned && begun.elapsed() > PATIENCE {
                warned = true;
                warn(removed);
            }
        }
    }
}

/// The last address of a range.
fn last(gpa: u64, len: u64) -> Result<u64, RegionError> {
    match len {
        0 => None,
        _ => gpa.checked_add(len).map(|end| end - 1),
    }
    .ok_or(RegionError::Range { gpa, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn map() -> MemoryMap {
        MemoryMap::new(Memory::default())
    }

    #[test]
    fn what_is_mapped_can_be_accessed_until_it_is_unmapped() {
        let mut map = map();
        map.map(0x10000, 0x2000, true, Some((file(0x4000), 0x1000))).unwrap();
        let memory = map.memory.clone();
        memory.load().write(0x11000, b"hello").unwrap();
        assert_eq!(map.unmap(0, 0x100000).unwrap().len(), 1);
        assert!(memory.load().write(0x11000, b"hello").is_err());
    }

    #[test]
    fn a_region_without_a_file_is_known_but_no_memory() {
        let mut map = map();
        map.map(0xc0000, 0x1000, false, None).unwrap();
        assert!(map.memory.load().read(0xc0000, &mut [0]).is_err());
        assert!(matches!(map.map(0xc0000, 0x1000, true, None), Err(RegionError::Overlap { .. })));
        assert_eq!(map.unmap(0xc0000, 0x1000).unwrap().len(), 1);
    }

    #[test]
    fn a_client_cannot_use_up_the_address_space() {
        let mut map = map();
        let half = || Some((file(MAPPED_MAX / 2), 0));
        map.map(0, 0x1000, true, half()).unwrap();
        map.map(0x1000, 0x1000, true, half()).unwrap();
        let refused = map.map(0x2000, 0x1000, true, Some((file(0x1000), 0)));
        assert!(matches!(refused, Err(RegionError::TooLarge { have: 0x1000, files: 3, mapped: MAPPED_MAX })));
        map.unmap(0x1000, 0x1000).unwrap();
        let refused = map.map(0x1000, 0x1000, true, Some((file(MAPPED_MAX / 2 + 1), 0)));
        assert!(matches!(refused, Err(RegionError::TooLarge { files: 2, .. })));
        map.map(0x1000, 0x1000, true, half()).unwrap();
        // A file that has grown is mapped again, while older regions keep their mapping.
        map.clear();
        let growing = file(0x1000);
        map.map(0, 0x1000, true, Some((growing.try_clone().unwrap(), 0))).unwrap();
        growing.set_len(MAPPED_MAX).unwrap();
        let refused = map.map(0x1000, 0x1000, true, Some((growing, 0x1000)));
        assert!(matches!(refused, Err(RegionError::TooLarge { files: 2, mapped: 0x1000, .. })));
        map.clear();
        for number in 0..FILES_MAX as u64 {
            map.map(number * 0x1000, 0x1000, true, Some((file(0x1000), 0))).unwrap();
        }
        assert!(matches!(map.map(1 << 40, 0x1000, true, Some((file(0x1000), 0))), Err(RegionError::TooLarge { .. })));
    }

    #[test]
    fn a_file_that_is_mapped_for_writing_is_not_mapped_again_for_reading() {
        let mut map = map();
        let ram = file(MAPPED_MAX);
        let place = |offset| Some((ram.try_clone().unwrap(), offset));
        map.map(0, 0x1000, true, place(0)).unwrap();
        map.map(0x1000, 0x1000, false, place(0)).unwrap();
        assert_eq!(map.mapped.len(), 1);
        // Each region still says which accesses it allows.
        let regions = map.memory.load();
        regions.write(0xff8, &[7; 8]).unwrap();
        assert!(regions.write(0x1ff8, &[8; 8]).is_err() && regions.write(0xff8, &[8; 16]).is_err());
        let mut data = [0; 8];
        regions.read(0x1ff8, &mut data).unwrap();
        assert_eq!(data, [7; 8]);
        drop(regions);
        // The mapping stays for one region when the other is removed. A mapping for reading does not do for writing.
        map.unmap(0, 0x1000).unwrap();
        map.memory.load().read(0x1000, &mut data).unwrap();
        map.clear();
        map.map(0, 0x1000, false, place(0)).unwrap();
        assert!(matches!(map.map(0x1000, 0x1000, true, place(0)), Err(RegionError::TooLarge { files: 2, .. })));
    }

    #[test]
    fn files_that_are_read_and_written_count_once_each() {
        let mut map = map();
        let add = |map: &mut MemoryMap, gpa, file: &File| {
            let source = RegionSource::FileIo(file.try_clone().unwrap(), 0);
            map.add(NewRegion { gpa, len: 0x1000, readable: true, writable: true, source })
        };
        let ram = tempfile::NamedTempFile::new().unwrap();
        ram.as_file().set_len(0x1000).unwrap();
        for number in 0..5000 {
            add(&mut map, number * 0x1000, ram.as_file()).unwrap();
        }
        assert_eq!(map.open.len(), 1);
        // A descriptor that can do less does not replace one that can do more.
        let reader = File::open(&ram).unwrap();
        add(&mut map, 1 << 40, &reader).unwrap();
        assert!(map.memory.load().write(1 << 40, &[7; 8]).is_err());
        map.memory.load().write(4999 * 0x1000, &[7; 8]).unwrap();
        assert_eq!(map.open.len(), 2);
        for number in 2..FILES_MAX as u64 {
            map.map((1 << 41) + number * 0x1000, 0x1000, true, Some((file(0x1000), 0))).unwrap();
        }
        let more = map.map(1 << 42, 0x1000, true, Some((file(0x1000), 0)));
        assert!(matches!(more, Err(RegionError::TooLarge { files: 1025, .. })));
        let other = file(0x1000);
        assert!(matches!(add(&mut map, 1 << 42, &other), Err(RegionError::TooLarge { files: 1025, have: 0, .. })));
        // A file is dropped with its last region.
        map.unmap(1 << 40, 0x1000).unwrap();
        add(&mut map, 1 << 42, &other).unwrap();
    }

    #[test]
    fn odd_ranges_are_refused_and_change_nothing() {
        let mut map = map();
        map.map(0x1000, 0x2000, true, Some((file(0x2000), 0))).unwrap();
        assert!(matches!(map.map(0, 0, true, None), Err(RegionError::Range { .. })));
        assert!(matches!(map.map(u64::MAX, 2, true, None), Err(RegionError::Range { .. })));
        assert!(matches!(map.map(0, u64::MAX, true, None), Err(RegionError::Overlap { .. })));
        assert!(matches!(map.map(0x10000, 1 << 60, true, Some((file(0x1000), 0))), Err(RegionError::PastEnd { .. })));
        assert!(matches!(
            map.map(0x10000, 0x1000, true, Some((file(0x1000), u64::MAX))),
            Err(RegionError::PastEnd { .. })
        ));
        assert!(matches!(map.unmap(0x2000, 0x1000), Err(RegionError::Splits { .. })));
        assert!(matches!(map.unmap(0, 0), Err(RegionError::Range { .. })));
        assert_eq!(map.memory.load().len(), 1);
    }

    #[test]
    fn an_unmap_waits_for_an_access_in_progress() {
        let mut map = map();
        map.map(0x1000, 0x1000, true, Some((file(0x1000), 0))).unwrap();
        let held = map.memory.load();
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
        /// Compares with a set of pages: map and set must agree.
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
                    let expected = regions.iter().any(inside) && regions.iter().all(|r| !overlaps(r) || inside(r));
                    let result = map.unmap(start << 12, len << 12);
                    prop_assert_eq!(result.is_ok(), expected);
                    if expected {
                        regions.retain(|r| !inside(r));
                    }
                }
                let memory = map.memory.load();
                for page in 0..32u64 {
                    let expected = regions.iter().any(|r| r.0 <= page && page < r.0 + r.1);
                    prop_assert_eq!(memory.read(page << 12, &mut [0]).is_ok(), expected);
                }
            }
        }
    }
}
