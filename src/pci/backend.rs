//! One connection: a function, as the client's messages see it.

use std::error::Error;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::iter::successors;

use vfio_bindings::bindings::vfio::*;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};

use super::config::{self, Config, MsixBar};
use super::function::{Bus, Function};
use super::interrupts::Kind;
use crate::memory::{MemoryMap, Region};
use crate::trace::Event;
use crate::trace::event::{Channel, ResetKind};

/// Regions that QEMU asks for: six BARs, the ROM, the configuration space and VGA.
const REGIONS: u32 = 9;

/// Makes a function in its power-on state.
pub(super) type Make<'a> = &'a dyn Fn(Bus) -> Box<dyn Function>;

/// One connection.
pub(super) struct Backend<'a> {
    bus: Bus,
    make: Make<'a>,
    on_device_reset: &'a dyn Fn(),
    /// `None` after it panicked, until the next reset.
    function: Option<Box<dyn Function>>,
    config: Config,
    memory: MemoryMap,
    msix_table: Vec<u8>,
}

impl<'a> Backend<'a> {
    /// A function in its power-on state; `None` if making it panics.
    pub fn new(bus: Bus, memory: MemoryMap, msix: bool, make: Make<'a>, on_device_reset: &'a dyn Fn()) -> Option<Self> {
        let function = contained(&bus, || make(bus.clone()))?;
        let config = Config::new(function.identity(), msix);
        let msix_table = vec![0; config.msix_bar().map_or(0, |bar| bar.size as usize / 2)];
        Some(Backend { bus, make, on_device_reset, function: Some(function), config, memory, msix_table })
    }

    /// The regions, as DEVICE_GET_REGION_INFO gives them.
    pub fn regions(&self) -> Vec<ServerRegion> {
        let region = |index| {
            let size = self.region_size(index).unwrap_or(0);
            let flags = if size == 0 { 0 } else { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE };
            let argsz = size_of::<vfio_region_info>() as u32;
            let region_info = vfio_region_info { argsz, flags, index, cap_offset: 0, size, offset: 0 };
            ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
        };
        (0..REGIONS).map(region).collect()
    }

    /// The interrupt indexes, as DEVICE_GET_IRQ_INFO gives them.
    pub fn irqs(&self) -> Vec<IrqInfo> {
        let vectors = u32::from(self.config.identity().vectors);
        let irq = |index| {
            let count = match index {
                VFIO_PCI_INTX_IRQ_INDEX => 1,
                VFIO_PCI_MSI_IRQ_INDEX => vectors.min(32).next_power_of_two(),
                VFIO_PCI_MSIX_IRQ_INDEX if self.config.msix_bar().is_some() => vectors,
                // QEMU warns without it. It would stop the machine if it were signalled, so it never is.
                VFIO_PCI_ERR_IRQ_INDEX => 1,
                _ => 0,
            };
            let flags = match index {
                VFIO_PCI_INTX_IRQ_INDEX => VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
                VFIO_PCI_MSI_IRQ_INDEX | VFIO_PCI_MSIX_IRQ_INDEX => VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE,
                VFIO_PCI_ERR_IRQ_INDEX => VFIO_IRQ_INFO_EVENTFD,
                _ => 0,
            };
            IrqInfo { index, flags, count }
        };
        (VFIO_PCI_INTX_IRQ_INDEX..=VFIO_PCI_REQ_IRQ_INDEX).map(irq).collect()
    }

    /// Bytes of the configuration space or of a BAR that there is.
    fn region_size(&self, index: u32) -> Option<u64> {
        if index == VFIO_PCI_CONFIG_REGION_INDEX {
            return Some(config::SIZE as u64);
        }
        if let Some(msix) = self.msix_bar(index) {
            return Some(msix.size);
        }
        self.config.identity().bars.iter().find(|bar| u32::from(bar.index) == index).map(|bar| bar.size)
    }

    /// The BAR of the MSI-X table, if this is its region.
    fn msix_bar(&self, region: u32) -> Option<MsixBar> {
        self.config.msix_bar().filter(|msix| u32::from(msix.index) == region)
    }

    /// Runs a method of the model. If it panics, the function is as if it were gone until the next reset: it reads as
    /// ones and ignores writes.
    fn with<R>(&mut self, call: impl FnOnce(&mut dyn Function) -> R) -> Option<R> {
        let function = self.function.as_mut()?;
        let result = contained(&self.bus, || call(function.as_mut()));
        if result.is_none() {
            log::error!("The function of endpoint {:#x} is dead until it is reset", self.bus.door.endpoint());
            self.bus.door.set_bus_master(false);
            let gone = self.function.take();
            contained(&self.bus, || drop(gone));
        }
        result
    }

    /// Resets the function and its configuration space.
    fn reset_function(&mut self) {
        if self.with(|function| function.reset()).is_none() {
            self.function = contained(&self.bus, || (self.make)(self.bus.clone()));
        }
        self.bus.door.set_bus_master(false);
        self.config.reset();
        self.bus.interrupts.disable_pin(false);
        self.msix_table.fill(0);
        let endpoint = Some(self.bus.door.endpoint());
        self.bus.tracer.emit(Event::Reset { reset: ResetKind::Function, endpoint });
    }

    /// SET_IRQS of the interrupt pin.
    fn set_pin(&self, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        if start != 0 || count > 1 {
            return Err(refused("no such interrupt pin"));
        }
        let interrupts = &self.bus.interrupts;
        let fd = fds.into_iter().next();
        match (flags & VFIO_IRQ_SET_ACTION_TYPE_MASK, flags & VFIO_IRQ_SET_DATA_TYPE_MASK) {
            (VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_NONE) if count == 0 => interrupts.assign_pin(None),
            (_, _) if count == 0 => return Err(refused("no interrupt pin was named")),
            (VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD) => interrupts.assign_pin(fd),
            (VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_NONE) => interrupts.trigger_pin(),
            (VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_DATA_NONE) => interrupts.mask_pin(true),
            (VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_NONE) => interrupts.mask_pin(false),
            (VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD) => interrupts.unmask_pin_by(fd).map_err(refused)?,
            _ => return Err(refused("no such action on the interrupt pin")),
        }
        Ok(())
    }

    fn trace_memory(&self, region: &Region, added: bool) {
        let &Region { gpa, len, writable, .. } = region;
        let endpoint = Some(self.bus.door.endpoint());
        self.bus.tracer.emit(Event::Memory { channel: Channel::VfioUser, endpoint, added, gpa, len, writable });
    }

    /// Where `len` bytes at `offset` of a region are; an error if they are not all inside of it. Until this is known the
    /// bytes are not to be touched: they are as many as the client says, and take memory only once written.
    fn target(&self, region: u32, offset: u64, len: usize) -> io::Result<Target> {
        let size = self.region_size(region).ok_or_else(|| refused("no such region"))?;
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(refused("access past the end of a region"));
        }
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            return Ok(Target::Config);
        }
        if self.function.is_none() {
            return Ok(Target::Gone);
        }
        Ok(if self.msix_bar(region).is_some() { Target::Msix(offset as usize) } else { Target::Bar(region as u8) })
    }
}

/// What a region access is to.
enum Target {
    Config,
    Bar(u8),
    /// The MSI-X table and pending bits, at this offset. QEMU has a table of its own and never asks.
    Msix(usize),
    /// A function that panicked.
    Gone,
}

impl ServerBackend for Backend<'_> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match self.target(region, offset, data.len())? {
            Target::Config => {
                self.config.set_interrupt_status(self.bus.interrupts.pin_is_asserted());
                self.config.read(offset, data);
            }
            Target::Bar(bar) => {
                if self.with(|function| function.bar_read(bar, offset, data)).is_none() {
                    data.fill(0xff);
                }
            }
            Target::Msix(at) => {
                let table = self.msix_table.len();
                for (at, byte) in (at..).zip(data) {
                    *byte = self.msix_table.get(at).copied().unwrap_or_else(|| {
                        let at = at - table;
                        self.bus.interrupts.pending(at / 8 * 64).to_le_bytes()[at % 8]
                    });
                }
            }
            Target::Gone => data.fill(0xff),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.target(region, offset, data.len())? {
            Target::Config => {
                let effect = self.config.write(offset, data);
                if effect.reset {
                    self.reset_function();
                } else {
                    if let Some(master) = effect.master {
                        self.bus.door.set_bus_master(master && self.function.is_some());
                    }
                    if effect.master == Some(true) && self.memory.is_unshared() {
                        self.memory.memory().tell_unshared(0);
                    }
                    self.bus.interrupts.disable_pin(effect.pin_disabled);
                }
            }
            Target::Bar(bar) => {
                self.with(|function| function.bar_write(bar, offset, data));
            }
            Target::Msix(at) => {
                for (entry, byte) in self.msix_table.iter_mut().skip(at).zip(data) {
                    *entry = *byte;
                }
            }
            Target::Gone => {}
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let file = fd.filter(|_| flags.contains(DmaMapFlags::READ)).map(|file| (file, offset));
        let region = self.memory.map(address, size, flags.contains(DmaMapFlags::WRITE), file);
        self.trace_memory(&*region.map_err(refused)?, true);
        Ok(())
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let gone = if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            self.memory.clear()
        } else {
            self.memory.unmap(address, size).map_err(refused)?
        };
        gone.iter().for_each(|region| self.trace_memory(region, false));
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.reset_function();
        (self.on_device_reset)();
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        let (kind, vectors) = match index {
            VFIO_PCI_INTX_IRQ_INDEX => return self.set_pin(flags, start, count, fds),
            VFIO_PCI_MSI_IRQ_INDEX => (Kind::Msi, 32),
            VFIO_PCI_MSIX_IRQ_INDEX => (Kind::Msix, 2048),
            VFIO_PCI_ERR_IRQ_INDEX => return Ok(()),
            _ => return Err(refused("no such interrupt index")),
        };
        if start.checked_add(count).is_none_or(|end| end > vectors) {
            return Err(refused("no such interrupt vector"));
        }
        let range = start as usize..(start + count) as usize;
        let interrupts = &self.bus.interrupts;
        match flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
            VFIO_IRQ_SET_ACTION_MASK => range.for_each(|vector| interrupts.mask(kind, vector, true)),
            VFIO_IRQ_SET_ACTION_UNMASK => range.for_each(|vector| interrupts.mask(kind, vector, false)),
            VFIO_IRQ_SET_ACTION_TRIGGER if flags & VFIO_IRQ_SET_DATA_EVENTFD != 0 => {
                // A vector without a descriptor is one that is taken away.
                let sinks = fds.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
                interrupts.assign(kind, range.start, sinks.take(range.len()));
            }
            VFIO_IRQ_SET_ACTION_TRIGGER if count == 0 => interrupts.disable(kind),
            VFIO_IRQ_SET_ACTION_TRIGGER => range.for_each(|vector| interrupts.trigger(vector as u16)),
            _ => return Err(refused("no such action on an interrupt")),
        }
        Ok(())
    }
}

impl Drop for Backend<'_> {
    /// The client is gone: the function first, since its threads may be in the memory.
    fn drop(&mut self) {
        let function = self.function.take();
        contained(&self.bus, || drop(function));
        self.bus.door.set_bus_master(false);
        self.bus.interrupts.assign_pin(None);
        self.bus.interrupts.disable_pin(false);
        self.bus.interrupts.disable(Kind::Msi);
        self.bus.interrupts.disable(Kind::Msix);
        let gone = self.memory.clear();
        gone.iter().for_each(|region| self.trace_memory(region, false));
    }
}

/// Runs something of a model's, or of the vfio_user crate's; `None` if it panics, which is traced.
pub(super) fn contained<R>(bus: &Bus, call: impl FnOnce() -> R) -> Option<R> {
    // What the call may have left half done is either never used again (the function) or whole between any two
    // messages (everything else here).
    let endpoint = bus.door.endpoint();
    let result = bus.tracer.contain(endpoint, call);
    if result.is_none() {
        log::error!("Contained a panic in what serves endpoint {endpoint:#x}");
    }
    result
}

/// The crate answers every error of a backend's with the error flag but error number 0; so it is at least in the log,
/// with all its causes.
fn refused(reason: impl Into<Box<dyn Error + Send + Sync>>) -> io::Error {
    let error = io::Error::new(ErrorKind::InvalidInput, reason);
    let mut said = error.to_string();
    for cause in successors(error.source(), |&cause| cause.source()) {
        said += &format!(": {cause}");
    }
    log::warn!("Refused a vfio-user message: {said}");
    error
}
