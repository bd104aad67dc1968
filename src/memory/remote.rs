//! Memory that is not mapped but read and written in another way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::NoAccess;

/// A region's memory elsewhere. An access may take as long as the owner of that memory takes.
pub trait Remote: Send + Sync {
    /// Reads from the guest-physical address `gpa` on.
    fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), NoAccess>;

    /// Writes from the guest-physical address `gpa` on. If this fails, a part may have been written.
    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), NoAccess>;
}

/// Memory that is read and written in a file which cannot be mapped, such as that of another process.
pub(super) struct FileMemory {
    file: Arc<File>,
    /// The file offset of the guest-physical address 0, which may lie outside the file.
    offset: u64,
}

impl FileMemory {
    /// The file's bytes from `offset` on, at the guest-physical address `gpa`.
    pub(super) fn new(file: Arc<File>, offset: u64, gpa: u64) -> FileMemory {
        FileMemory { file, offset: offset.wrapping_sub(gpa) }
    }

    fn done(gpa: u64, result: io::Result<()>) -> Result<(), NoAccess> {
        result.map_err(|error| {
            log::warn!("The file of guest memory at {gpa:#x} cannot be read or written: {error}");
            NoAccess
        })
    }
}

impl Remote for FileMemory {
    fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), NoAccess> {
        FileMemory::done(gpa, self.file.read_exact_at(data, self.offset.wrapping_add(gpa)))
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), NoAccess> {
        FileMemory::done(gpa, self.file.write_all_at(data, self.offset.wrapping_add(gpa)))
    }
}
