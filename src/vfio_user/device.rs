//! The device that a session serves.

use std::error::Error;
use std::fs::File;
use std::io;
use std::iter::successors;
use std::ops::Range;

use super::client_memory::ClientMemory;

/// A device as its client's messages see it. The arguments of its methods are checked before: regions and interrupts
/// exist, and accesses lie inside them.
pub trait Device {
    /// The number of regions, including those without a size.
    fn regions(&self) -> u32;

    /// The size of a region in bytes.
    fn region_size(&self, region: u32) -> u64;

    /// The memory behind a region that the client may map, if there is any.
    fn region_memory(&self, _region: u32) -> Option<RegionMemory<'_>> {
        None
    }

    /// The number of interrupt types.
    fn irqs(&self) -> u32;

    /// Describes an interrupt type.
    fn irq_info(&self, index: u32) -> IrqInfo;

    /// The most DMA regions that can be mapped at once.
    fn max_dma_maps(&self) -> u32;

    /// The client reads a region. All of `data` is to be set.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]);

    /// The client writes to a region.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]);

    /// The client lets the device access a range of addresses.
    fn dma_map(&mut self, map: DmaMap) -> Result<(), Refused>;

    /// The client takes ranges away. When this returns, no access to them is in progress.
    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Refused>;

    /// The client takes all ranges away.
    fn dma_unmap_all(&mut self);

    /// The client configures, masks or triggers interrupts.
    fn set_irqs(&mut self, set: IrqSet) -> Result<(), Refused>;

    /// The client resets the device.
    fn reset(&mut self);
}

/// Memory behind a region.
#[derive(Clone, Copy, Debug)]
pub struct RegionMemory<'a> {
    /// What is mapped, from its beginning on; it has as many bytes as the region.
    pub file: &'a File,
    /// The parts of the region that may be mapped, in whole pages.
    pub areas: &'a [Range<u64>],
}

/// A range of addresses that a device may access ("VFIO_USER_DMA_MAP").
#[derive(Debug)]
pub struct DmaMap {
    /// The first address.
    pub address: u64,
    /// Its length in bytes. The device checks whether the range is possible.
    pub size: u64,
    /// Whether it may be read.
    pub readable: bool,
    /// Whether it may be written.
    pub writable: bool,
    /// How it is accessed.
    pub backing: Backing,
}

/// How a DMA region is accessed.
#[derive(Debug)]
pub enum Backing {
    /// By mapping a file, from an offset on.
    Mmap(File, u64),
    /// By reading and writing a file, from an offset on.
    FileIo(File, u64),
    /// By messages to the client.
    Messages(ClientMemory),
    /// Not at all: the client gave no descriptor, and accepts no messages on a socket of their own.
    Unreachable,
}

/// A type of interrupts ("VFIO_USER_DEVICE_GET_IRQ_INFO").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// The number of interrupts of this type.
    pub count: u32,
    /// Whether each can have an event file descriptor.
    pub eventfd: bool,
    /// Whether each can be masked.
    pub maskable: bool,
    /// Whether each masks itself when it is sent.
    pub automasked: bool,
}

/// A request to configure, mask or trigger interrupts ("VFIO_USER_DEVICE_SET_IRQS"). `count` is 0 only if all
/// interrupts of the type are to be disabled.
#[derive(Debug)]
pub struct IrqSet {
    /// Their type.
    pub index: u32,
    /// The first interrupt.
    pub start: u32,
    /// The number of interrupts.
    pub count: u32,
    /// What to do.
    pub action: IrqAction,
    /// With which of them, and when.
    pub data: IrqData,
}

/// What to do with interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask them.
    Mask,
    /// Unmask them.
    Unmask,
    /// Send them, or set the descriptors to which they are sent.
    Trigger,
}

/// The data of an [`IrqSet`].
#[derive(Debug)]
pub enum IrqData {
    /// Nothing: the action is done now, with all of the interrupts.
    None,
    /// The action is done now, with the interrupts that are true. There are `count` values.
    Bool(Vec<bool>),
    /// Descriptors that signal or are signalled. There are `count`, or none to remove those that were given.
    EventFd(Vec<File>),
}

/// Why a command was refused. Nothing changed.
#[derive(Debug)]
pub struct Refused {
    /// The error number of the reply.
    pub errno: i32,
    /// The reason, with all its causes.
    pub reason: String,
}

impl Refused {
    /// A refusal with this error number.
    pub fn new(errno: i32, reason: impl Into<Box<dyn Error + Send + Sync>>) -> Refused {
        let error = reason.into();
        let mut reason = error.to_string();
        for cause in successors(error.source(), |&cause| cause.source()) {
            reason += &format!(": {cause}");
        }
        Refused { errno, reason }
    }

    /// A refusal by the operating system, which gives the error number. It need not be the client's fault.
    pub fn system(error: io::Error) -> Refused {
        Refused::new(error.raw_os_error().unwrap_or(libc::EIO), error)
    }

    /// A refusal of something that the specification does not allow.
    pub fn invalid(reason: impl Into<Box<dyn Error + Send + Sync>>) -> Refused {
        Refused::new(libc::EINVAL, reason)
    }
}
