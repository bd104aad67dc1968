//! What a device model implements and what it is given.

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
    /// Which: 0 to 5. A 64-bit BAR takes the next index too.
    pub index: u8,
    /// Bytes, a power of two of at least 4096.
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

/// Memory behind a BAR that a client maps, so that the guest's accesses to it do not come here. It is shared with the
/// guest: what is read can be another thing the next time.
#[derive(Clone, Debug)]
pub struct BarMemory {
    file: Arc<File>,
    areas: Arc<[Range<u64>]>,
}

impl BarMemory {
    /// `size` bytes of zeros, of which the client maps `areas`, in whole pages; what lies outside of them comes to
    /// [`Function::bar_read`] and [`Function::bar_write`]. It is made before the process is in its sandbox.
    ///
    /// # Errors
    /// The system does not give the memory.
    pub fn new(size: u64, areas: &[Range<u64>]) -> io::Result<Self> {
        let file = File::from(memfd_create(c"viommu-bar", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(size)?;
        // Whoever has it could shrink it, and accesses to what is gone would fail.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(BarMemory { file: Arc::new(file), areas: areas.into() })
    }

    /// The file that is mapped.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What a client may map.
    pub(super) fn areas(&self) -> &[Range<u64>] {
        &self.areas
    }

    /// Reads `data.len()` bytes from `offset` on.
    ///
    /// # Errors
    /// They are not all inside of it.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Writes `data` from `offset` on.
    ///
    /// # Errors
    /// It is not all inside of it.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }
}

/// A capability of a model's own, beside those that every function has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Which one.
    pub id: CapabilityId,
    /// What is behind its header: two bytes for one in the first 256 bytes of configuration space, else four.
    pub body: &'static [u8],
    /// The bits of the body that can be written; those that are left out cannot.
    pub writable: &'static [u8],
}

/// A capability's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityId {
    /// In the first 256 bytes of configuration space.
    Standard(u8),
    /// Behind these.
    Extended {
        /// Its number.
        id: u16,
        /// Its version, less than 16.
        version: u8,
    },
}

/// What a function says of itself in its configuration space (PCI Express base specification, chapter 7).
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
    /// Its capabilities beside power management, MSI, MSI-X and PCI Express; they have room in configuration space.
    pub capabilities: &'static [Capability],
    /// Interrupt vectors, at least 1; offered as MSI-X unless its slot has none, up to 32 as MSI, and all in one as the pin
    /// INTA.
    pub vectors: u16,
    /// Whether it is a root-complex integrated endpoint, and not one that may stand behind a root port.
    pub integrated: bool,
}

/// What a function is given when it is made.
#[derive(Clone)]
pub struct FunctionContext {
    /// Its way to memory.
    pub dma: DmaContext,
    /// Its interrupts.
    pub interrupts: Interrupts,
    /// Where its commands and states are traced; the endpoint is `dma.endpoint()`.
    pub tracer: Tracer,
    /// What its threads can poll while they are awake and have nothing to do.
    pub poller: Option<Arc<dyn QueuePoller>>,
}

/// A device model. Its methods are called from the vfio-user thread and must not wait for I/O.
pub trait Function: Send {
    /// What it is; constant.
    fn identity(&self) -> Identity;

    /// The guest reads `data.len()` bytes at `offset` of a BAR. All of `data` is to be set.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// The memory behind a BAR that the client may map, if there is any. It is always the same.
    fn bar_memory(&self, _bar: u8) -> Option<BarMemory> {
        None
    }

    /// The guest writes `data` at `offset` of a BAR.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// Function-level or conventional reset. No DMA and no interrupt of before happens after it returned.
    fn reset(&mut self);
}
