//! The interface of a device model: what it implements, and what it is given.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Interrupts;
use crate::dma::DmaContext;
use crate::poller::QueuePoller;
use viommu_trace::Tracer;

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its index, 0 to 5. A 64-bit BAR takes the next index too.
    pub index: u8,
    /// Its size in bytes, a power of two of at least 4096.
    pub size: u64,
    /// Whether it is a 64-bit BAR.
    pub wide: bool,
    /// Whether reads have no effect and writes may be merged, as with memory.
    pub prefetchable: bool,
}

impl Bar {
    /// A 64-bit BAR of registers.
    pub const fn registers(index: u8, size: u64) -> Self {
        Bar { index, size, wide: true, prefetchable: false }
    }

    /// A 64-bit BAR of memory.
    pub const fn memory(index: u8, size: u64) -> Self {
        Bar { index, size, wide: true, prefetchable: true }
    }
}

/// Memory behind a BAR that a client maps, so that the guest accesses it directly. The guest can change it at any time,
/// even between two reads.
#[derive(Clone, Debug)]
pub struct BarMemory {
    file: Arc<File>,
    areas: Arc<[Range<u64>]>,
}

impl BarMemory {
    /// Makes `size` bytes of zeros. The client may map `areas`, which are whole pages. Accesses outside of them come to
    /// [`Function::bar_read`] and [`Function::bar_write`]. Must be called before the process enters its sandbox.
    ///
    /// # Errors
    /// The system has no memory or no descriptor to give.
    pub fn new(size: u64, areas: &[Range<u64>]) -> io::Result<Self> {
        let file = File::from(memfd_create(c"viommu-bar", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(size)?;
        // A client could shrink the file otherwise, and accesses to the missing part would fail.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(BarMemory { file: Arc::new(file), areas: areas.into() })
    }

    /// The file that is mapped.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The areas that a client may map.
    pub(super) fn areas(&self) -> &[Range<u64>] {
        &self.areas
    }

    /// Reads `data.len()` bytes from `offset` on.
    ///
    /// # Errors
    /// They are not all inside the memory.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Writes `data` from `offset` on.
    ///
    /// # Errors
    /// It is not all inside the memory.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }
}

/// A model's own capability, in addition to those that every function has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number, and where it is.
    pub id: CapabilityId,
    /// The bytes after its header. The header of a standard capability has two bytes, that of an extended one four.
    pub body: &'static [u8],
    /// A mask of the bits of the body that can be written. Bytes that are left out are read-only.
    pub writable: &'static [u8],
}

/// The number of a capability (PCI Code and ID Assignment Specification).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityId {
    /// A standard one, in the first 256 bytes of configuration space.
    Standard(u8),
    /// An extended one, after the first 256 bytes.
    Extended {
        /// Its number.
        id: u16,
        /// Its version, less than 16.
        version: u8,
    },
}

/// A function's identity in configuration space (PCI Express Base Specification, chapter 7).
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Class code: base class, subclass, programming interface in bits 23..0.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Its memory BARs.
    pub bars: &'static [Bar],
    /// Its capabilities in addition to power management, MSI, MSI-X and PCI Express. They must fit into configuration
    /// space.
    pub capabilities: &'static [Capability],
    /// The number of interrupt vectors, at least 1. They are offered as MSI-X unless its slot has none, up to 32 of
    /// them as MSI, and all together as the pin INTA.
    pub vectors: u16,
    /// Whether it is a root complex integrated endpoint, and not one for a slot behind a root port.
    pub integrated: bool,
}

/// The resources that a function is given when it is made.
#[derive(Clone)]
pub struct FunctionContext {
    /// Its access to guest memory.
    pub dma: DmaContext,
    /// Its interrupts.
    pub interrupts: Interrupts,
    /// The trace for its commands and states. Its endpoint is `dma.endpoint()`.
    pub tracer: Tracer,
    /// A queue that its threads can poll while they are awake and have nothing else to do.
    pub poller: Option<Arc<dyn QueuePoller>>,
}

/// A device model. Its methods are called from the vfio-user thread and must not wait for I/O.
pub trait Function: Send {
    /// Its identity, which never changes.
    fn identity(&self) -> Identity;

    /// The guest reads `data.len()` bytes at `offset` of a BAR. Must set all of `data`.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// The memory behind a BAR that the client may map, if there is any. Must always return the same.
    fn bar_memory(&self, _bar: u8) -> Option<BarMemory> {
        None
    }

    /// The guest writes `data` at `offset` of a BAR.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// A function-level or conventional reset. After it returns, there is no DMA and no interrupt from before the
    /// reset.
    fn reset(&mut self);
}
