//! What a session serves.

use std::error::Error;
use std::fs::File;
use std::io;
use std::iter::successors;

use super::client_memory::ClientMemory;

/// A device, as its client's messages see it. Its methods are called with arguments that were checked: regions and interrupts
/// that there are, and accesses inside of them.
pub trait Device {
    /// How many regions there are, those without a size included.
    fn regions(&self) -> u32;

    /// The bytes of a region.
    fn region_size(&self, region: u32) -> u64;

    /// How many types of interrupts there are.
    fn irqs(&self) -> u32;

    /// What a type of interrupts is.
    fn irq_info(&self, index: u32) -> IrqInfo;

    /// The most DMA regions that can be mapped at once.
    fn max_dma_maps(&self) -> u32;

    /// The client reads a region. All of `data` is to be set.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]);

    /// The client writes to a region.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]);

    /// The client lets the device access a range of addresses.
    fn dma_map(&mut self, map: DmaMap) -> Result<(), Refused>;

    /// The client takes ranges away that it gave. When this returns no access to them is under way.
    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Refused>;

    /// The client takes all ranges away.
    fn dma_unmap_all(&mut self);

    /// The client sets what interrupts do.
    fn set_irqs(&mut self, set: IrqSet) -> Result<(), Refused>;

    /// The client resets the device.
    fn reset(&mut self);
}

/// A range of addresses that a device may access ("VFIO_USER_DMA_MAP").
#[derive(Debug)]
pub struct DmaMap {
    /// The first address.
    pub address: u64,
    /// Bytes. Whether that is possible is the device's to find out.
    pub size: u64,
    /// Whether it may be read.
    pub readable: bool,
    /// Whether it may be written.
    pub writable: bool,
    /// What is there.
    pub backing: Backing,
}

/// How a DMA region is accessed.
#[derive(Debug)]
pub enum Backing {
    /// A file is mapped, from an offset on.
    Mmap(File, u64),
    /// A file is read and written, from an offset on.
    FileIo(File, u64),
    /// The client is asked.
    Messages(ClientMemory),
    /// Not at all: the client gave no descriptor, and takes no messages on a socket of their own.
    Unreachable,
}

/// A type of interrupts ("VFIO_USER_DEVICE_GET_IRQ_INFO").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many there are.
    pub count: u32,
    /// Each can have an event file descriptor.
    pub eventfd: bool,
    /// Each can be masked.
    pub maskable: bool,
    /// Each masks itself when it is sent.
    pub automasked: bool,
}

/// What is to become of interrupts ("VFIO_USER_DEVICE_SET_IRQS"). `count` is 0 only if all of the type are to be disabled.
#[derive(Debug)]
pub struct IrqSet {
    /// Their type.
    pub index: u32,
    /// The first.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// What is done.
    pub action: IrqAction,
    /// To which, or when.
    pub data: IrqData,
}

/// What is done with interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// They are masked.
    Mask,
    /// They are unmasked.
    Unmask,
    /// They are sent, or what they are sent to is set.
    Trigger,
}

/// What comes with that.
#[derive(Debug)]
pub enum IrqData {
    /// Nothing: now, and with all of them.
    None,
    /// Now, with those that are true. There are `count`.
    Bool(Vec<bool>),
    /// Descriptors that signal or are signalled: `count`, or none, which takes away those that were given.
    EventFd(Vec<File>),
}

/// Why a command is not done. Nothing changed.
#[derive(Debug)]
pub struct Refused {
    /// The error number of the reply.
    pub errno: i32,
    /// The reason, with all that led to it.
    pub reason: String,
}

impl Refused {
    /// For a reason that has a name.
    pub fn new(errno: i32, reason: impl Into<Box<dyn Error + Send + Sync>>) -> Refused {
        let error = reason.into();
        let mut reason = error.to_string();
        for cause in successors(error.source(), |&cause| cause.source()) {
            reason += &format!(": {cause}");
        }
        Refused { errno, reason }
    }

    /// For what the operating system refuses, which says why; it need not be the client's doing.
    pub fn system(error: io::Error) -> Refused {
        Refused::new(error.raw_os_error().unwrap_or(libc::EIO), error)
    }

    /// For what the specification does not allow.
    pub fn invalid(reason: impl Into<Box<dyn Error + Send + Sync>>) -> Refused {
        Refused::new(libc::EINVAL, reason)
    }
}
