//! The image behind a namespace, and the counters that outlive a reset of the controller.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, Flock, FlockArg, OFlag, fallocate, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use viommu_trace::event::Access;

/// The configuration of a controller.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// The raw file behind the namespace.
    pub image: PathBuf,
    /// Whether the namespace is write-protected. Other processes may then use the image read-only too.
    pub read_only: bool,
    /// The size of a logical block in bytes: 512 or 4096.
    pub block_size: u32,
    /// The serial number, 1 to 20 printable ASCII characters. Must be unique, since the namespace's NGUID is derived
    /// from it.
    pub serial: String,
    /// The number of I/O queue pairs, 1 to 64. There is one interrupt vector more.
    pub queues: u16,
}

impl NvmeConfig {
    /// A writable namespace of 512-byte blocks on a controller with 16 queue pairs.
    pub fn new(image: impl Into<PathBuf>, serial: impl Into<String>) -> Self {
        NvmeConfig { image: image.into(), read_only: false, block_size: 512, serial: serial.into(), queues: 16 }
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum OpenError {
    #[error("There is no image {0}; create one with `truncate -s 1G {0}`, or have `--create-images 1G` do it")]
    Missing(PathBuf),
    #[error("Cannot open the image {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("Cannot make the image {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error(
        "The image {0} is in use, by another process or as the image of another endpoint; a raw image can have one \
         writer only"
    )]
    Locked(PathBuf),
    #[error("The image {path} has {bytes} bytes; a multiple of the block size {block_size}, and not 0, was expected")]
    Size { path: PathBuf, bytes: u64, block_size: u32 },
    #[error("The image {0} is not a regular file or a block device")]
    NotAFile(PathBuf),
    #[error("A block size of {0} is not supported; 512 or 4096 was expected")]
    BlockSize(u32),
    #[error("{0:?} cannot be a serial number; 1 to 20 printable ASCII characters were expected")]
    Serial(String),
    #[error("{0} queue pairs are not supported; 1 to 64 were expected")]
    Queues(u16),
}

/// Counters since the image was opened, over all resets.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// I/O commands completed, with success or not.
    pub io_count: AtomicU64,
    /// Of these, read commands, with success.
    pub reads: AtomicU64,
    /// Of these, write commands, with success.
    pub writes: AtomicU64,
    /// Bytes that successful reads transferred to the host.
    pub bytes_read: AtomicU64,
    /// Bytes that successful writes transferred from the host.
    pub bytes_written: AtomicU64,
    /// Admin commands completed.
    pub admin_count: AtomicU64,
    /// I/O and admin commands that completed with an error.
    pub errors: AtomicU64,
    /// Controllers that were made, each of which counts as a power cycle.
    pub power_cycles: AtomicU64,
    /// Controllers that were enabled and went away without a shutdown.
    pub unsafe_shutdowns: AtomicU64,
}

/// The open image of a namespace, and its counters. They outlive the controllers that use them.
#[derive(Debug)]
pub struct Disk {
    file: Flock<File>,
    config: NvmeConfig,
    blocks: u64,
    punches: bool,
    /// Whether the image is in a file system in memory.
    in_memory: bool,
    opened: Instant,
    /// The counters since the image was opened.
    pub counters: DiskCounters,
}

impl Disk {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// The configuration is not possible, or the image cannot be used.
    pub fn open(config: NvmeConfig) -> Result<Arc<Disk>, OpenError> {
        let path = || config.image.clone();
        if !is_block_size(config.block_size) {
            return Err(OpenError::BlockSize(config.block_size));
        }
        if !is_serial(&config.serial) {
            return Err(OpenError::Serial(config.serial));
        }
        if !(1..=64).contains(&config.queues) {
            return Err(OpenError::Queues(config.queues));
        }
        let file = match open(&config.image, !config.read_only) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(OpenError::Missing(path())),
            Err(source) => return Err(OpenError::Open { path: path(), source }),
        };
        let bytes = size(&file).map_err(|source| OpenError::Open { path: path(), source })?;
        let Some(bytes) = bytes else { return Err(OpenError::NotAFile(path())) };
        wait_for_data(&file).map_err(|source| OpenError::Open { path: path(), source })?;
        let kind = if config.read_only { FlockArg::LockSharedNonblock } else { FlockArg::LockExclusiveNonblock };
        let file = Flock::lock(file, kind).map_err(|(_, error)| match error {
            Errno::EWOULDBLOCK => OpenError::Locked(path()),
            _ => OpenError::Open { path: path(), source: error.into() },
        })?;
        let block_size = config.block_size;
        if bytes == 0 || bytes % u64::from(block_size) != 0 {
            return Err(OpenError::Size { path: path(), bytes, block_size });
        }
        // The attempt is past the end, so that no data is lost.
        let punches = !config.read_only && punch(&file, bytes, 4096).is_ok();
        let in_memory = fstatfs(&*file).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        let blocks = bytes / u64::from(block_size);
        let (opened, counters) = (Instant::now(), DiskCounters::default());
        Ok(Arc::new(Disk { file, config, blocks, punches, in_memory, opened, counters }))
    }

    /// Its configuration.
    pub fn config(&self) -> &NvmeConfig {
        &self.config
    }

    /// The number of logical blocks of the namespace.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The time at which it was opened.
    pub(super) fn opened(&self) -> Instant {
        self.opened
    }

    /// Whether deallocating blocks frees their space. They read as zeros in any case.
    pub(super) fn punches(&self) -> bool {
        self.punches
    }

    /// The file, and the flags of preadv2(2) or pwritev2(2) with which an access never waits; `None` if there are none.
    /// `access` is the direction of the access to the host's memory.
    pub(super) fn without_waiting(&self, access: Access) -> Option<(&File, libc::c_int)> {
        match access {
            _ if self.in_memory => Some((&self.file, 0)),
            Access::Write => Some((&self.file, libc::RWF_NOWAIT)),
            // Few file systems can write without waiting.
            Access::Read => None,
        }
    }

    /// Reads at an offset in bytes.
    pub(super) fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Writes at an offset in bytes.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes all writes durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.config.read_only { Ok(()) } else { self.file.sync_data() }
    }

    /// Zeroes a range of bytes. With `deallocate`, their space is freed if possible.
    pub(super) fn zero(&self, mut offset: u64, mut len: u64, deallocate: bool) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        if deallocate && self.punches && punch(&self.file, offset, len).is_ok() {
            return Ok(());
        }
        while len > 0 {
            let now = len.min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..now as usize], offset)?;
            offset += now;
            len -= now;
        }
        Ok(())
    }

    /// The namespace globally unique identifier, derived from the serial number.
    pub(super) fn nguid(&self) -> [u8; 16] {
        let hash = |seed: u64| {
            // FNV-1a. It need only differ where the serial numbers do.
            let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            self.config.serial.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, step)
        };
        let mut id = [0; 16];
        id[..8].copy_from_slice(&hash(0).to_be_bytes());
        id[8..].copy_from_slice(&hash(1).to_be_bytes());
        id
    }

    pub(super) fn count(&self, counter: impl FnOnce(&DiskCounters) -> &AtomicU64, by: u64) {
        counter(&self.counters).fetch_add(by, Ordering::Relaxed);
    }
}

/// Whether a logical block may have this many bytes.
pub(super) fn is_block_size(bytes: u32) -> bool {
    matches!(bytes, 512 | 4096)
}

/// Whether a text can be a serial number, for which the Identify Controller data structure has 20 bytes of ASCII.
pub(super) fn is_serial(text: &str) -> bool {
    (1..=20).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_graphic() || c == b' ')
}

/// Opens `path` without waiting: it may be a FIFO whose other end is not open.
fn open(path: &Path, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// Makes accesses wait again.
fn wait_for_data(file: &File) -> io::Result<()> {
    fcntl(file, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(())
}

/// The size of a regular file or a block device in bytes; `None` for anything else.
fn size(file: &File) -> io::Result<Option<u64>> {
    use std::io::{Seek, SeekFrom};
    use std::os::unix::fs::FileTypeExt;
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok(Some(metadata.len()))
    } else if metadata.file_type().is_block_device() {
        Ok(Some((&*file).seek(SeekFrom::End(0))?))
    } else {
        Ok(None)
    }
}

fn punch(file: &File, offset: u64, len: u64) -> nix::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, mode, offset as libc::off_t, len as libc::off_t)
}
