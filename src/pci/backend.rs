//! A connection: serves a client's messages with a function.

use std::sync::Arc;
use std::time::Duration;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
    VFIO_PCI_ROM_REGION_INDEX,
};

use super::config::{self, Config, MsixBar};
use super::function::{BarMemory, Function, FunctionContext};
use super::interrupts::VectorKind;
use super::server::Slot;
use crate::memory::{MemoryMap, NewRegion, NoAccess, REGIONS_MAX, Region, RegionError, RegionSource, Remote};
use crate::vfio_user::{
    Backing, ClientMemory, Device, DmaMap, IrqAction, IrqData, IrqInfo, IrqSet, Refused, RegionMemory,
};
use viommu_trace::Event;
use viommu_trace::event::{Channel, ResetKind};

/// Makes a function in its power-on state.
pub(super) type Make<'a> = &'a dyn Fn(FunctionContext) -> Box<dyn Function>;

/// A connection, and the function that its client has.
pub(super) struct Backend<'a> {
    context: FunctionContext,
    make: Make<'a>,
    on_device_reset: &'a dyn Fn(),
    /// `None` from a panic until the next reset.
    function: Option<Box<dyn Function>>,
    config: Config,
    memory: MemoryMap,
    msix_table: Vec<u8>,
    /// The memory behind each BAR that has some for the client to map.
    bar_memory: Vec<(u8, BarMemory)>,
}

impl<'a> Backend<'a> {
    /// Makes a function in its power-on state; `None` if that panics.
    pub fn new(slot: &Slot, make: Make<'a>, on_device_reset: &'a dyn Fn()) -> Option<Self> {
        let context = slot.context.clone();
        let function = catch_panic(&context, || make(context.clone()))?;
        let mut identity = function.identity();
        identity.integrated &= !slot.behind_root_port;
        let config = Config::new(identity, slot.msix, slot.ats);
        let memory = MemoryMap::new(slot.memory.clone());
        let msix_table = vec![0; config.msix_bar().map_or(0, |bar| bar.size as usize / 2)];
        let bars = identity.bars.iter().map(|bar| bar.index);
        let bar_memory = catch_panic(&context, || {
            bars.filter_map(|bar| Some((bar, function.bar_memory(bar)?))).collect::<Vec<_>>()
        })?;
        let function = Some(function);
        Some(Backend { context, make, on_device_reset, function, config, memory, msix_table, bar_memory })
    }

    /// The BAR of the MSI-X table, if `region` is that BAR.
    fn msix_bar(&self, region: u32) -> Option<MsixBar> {
        self.config.msix_bar().filter(|msix| u32::from(msix.index) == region)
    }

    /// Calls a method of the model. If it panics, the function is gone until the next reset: it reads as ones and
    /// ignores writes.
    fn with<R>(&mut self, call: impl FnOnce(&mut dyn Function) -> R) -> Option<R> {
        let function = self.function.as_mut()?;
        let result = catch_panic(&self.context, || call(function.as_mut()));
        if result.is_none() {
            log::error!(
                "The function of endpoint {:#x} panicked, and is gone until it is reset",
                self.context.dma.endpoint()
            );
            self.context.dma.set_bus_master(false);
            let gone = self.function.take();
            catch_panic(&self.context, || drop(gone));
        }
        result
    }

    /// Resets the function and its configuration space.
    fn reset_function(&mut self) {
        if self.with(|function| function.reset()).is_none() {
            self.function = catch_panic(&self.context, || (self.make)(self.context.clone()));
        }
        self.context.dma.set_bus_master(false);
        self.config.reset();
        self.context.interrupts.disable_pin(false);
        self.msix_table.fill(0);
        let endpoint = Some(self.context.dma.endpoint());
        self.context.tracer.emit(Event::Reset { reset: ResetKind::Function, endpoint });
    }

    /// Executes SET_IRQS for the interrupt pin.
    fn set_pin(&self, set: IrqSet) -> Result<(), Refused> {
        let interrupts = &self.context.interrupts;
        match (set.action, set.data) {
            (IrqAction::Trigger, IrqData::None) if set.count == 0 => interrupts.assign_pin(None),
            (IrqAction::Trigger, IrqData::EventFd(fds)) => interrupts.assign_pin(fds.into_iter().next()),
            (IrqAction::Unmask, IrqData::EventFd(fds)) => {
                interrupts.unmask_pin_by(fds.into_iter().next()).map_err(Refused::system)?;
            }
            (IrqAction::Mask, IrqData::EventFd(_)) => {
                return Err(Refused::invalid("the pin cannot be masked by an eventfd"));
            }
            (_, IrqData::Bool(which)) if which != [true] => {}
            (IrqAction::Trigger, _) => interrupts.trigger_pin(),
            (IrqAction::Mask, _) => interrupts.mask_pin(true),
            (IrqAction::Unmask, _) => interrupts.mask_pin(false),
        }
        Ok(())
    }

    /// Executes SET_IRQS for vectors.
    fn set_vectors(&self, kind: VectorKind, set: IrqSet) -> Result<(), Refused> {
        let interrupts = &self.context.interrupts;
        let range = set.start as usize..(set.start + set.count) as usize;
        let which = match set.data {
            IrqData::None if range.is_empty() => {
                interrupts.disable(kind);
                return Ok(());
            }
            IrqData::EventFd(fds) if set.action == IrqAction::Trigger => {
                // A vector without a descriptor loses the one that it has.
                let sinks = fds.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
                interrupts.assign(kind, range.start, sinks.take(range.len()));
                return Ok(());
            }
            IrqData::EventFd(_) => return Err(Refused::invalid("a vector cannot be masked or unmasked by an eventfd")),
            IrqData::None => vec![true; range.len()],
            IrqData::Bool(which) => which,
        };
        for vector in range.zip(which).filter_map(|(vector, meant)| meant.then_some(vector)) {
            match set.action {
                IrqAction::Mask => interrupts.mask(kind, vector, true),
                IrqAction::Unmask => interrupts.mask(kind, vector, false),
                IrqAction::Trigger => interrupts.trigger(vector as u16),
            }
        }
        Ok(())
    }

    fn trace_memory(&self, region: &Region, added: bool) {
        let &Region { gpa, len, writable, .. } = region;
        let endpoint = Some(self.context.dma.endpoint());
        self.context.tracer.emit(Event::Memory { channel: Channel::VfioUser, endpoint, added, gpa, len, writable });
    }

    /// The target of an access to a region.
    fn target(&self, region: u32, offset: u64) -> Target {
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            Target::Config
        } else if self.function.is_none() {
            Target::Gone
        } else if self.msix_bar(region).is_some() {
            Target::Msix(offset as usize)
        } else {
            Target::Bar((region - VFIO_PCI_BAR0_REGION_INDEX) as u8)
        }
    }
}

/// The target of an access to a region.
enum Target {
    Config,
    Bar(u8),
    /// The MSI-X table and pending bits, at this offset. QEMU never accesses them, since it has a table of its own.
    Msix(usize),
    /// A function that panicked.
    Gone,
}

impl Device for Backend<'_> {
    fn regions(&self) -> u32 {
        VFIO_PCI_NUM_REGIONS
    }

    fn region_size(&self, region: u32) -> u64 {
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            return config::SIZE as u64;
        }
        if let Some(msix) = self.msix_bar(region) {
            return msix.size;
        }
        self.config.identity().bars.iter().find(|bar| u32::from(bar.index) == region).map_or(0, |bar| bar.size)
    }

    fn region_memory(&self, region: u32) -> Option<RegionMemory<'_>> {
        let bar = region.checked_sub(VFIO_PCI_BAR0_REGION_INDEX).filter(|_| region < VFIO_PCI_ROM_REGION_INDEX)?;
        let memory = self.bar_memory.iter().find(|(index, _)| u32::from(*index) == bar).map(|(_, memory)| memory)?;
        Some(RegionMemory { file: memory.file(), areas: memory.areas() })
    }

    fn irqs(&self) -> u32 {
        VFIO_PCI_NUM_IRQS
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        let vectors = u32::from(self.config.identity().vectors);
        let messages = IrqInfo { eventfd: true, maskable: true, ..IrqInfo::default() };
        match index {
            VFIO_PCI_INTX_IRQ_INDEX => IrqInfo { count: 1, automasked: true, ..messages },
            VFIO_PCI_MSI_IRQ_INDEX => IrqInfo { count: vectors.min(32).next_power_of_two(), ..messages },
            VFIO_PCI_MSIX_IRQ_INDEX if self.config.msix_bar().is_some() => IrqInfo { count: vectors, ..messages },
            VFIO_PCI_MSIX_IRQ_INDEX => messages,
            // QEMU warns if it is missing, and stops the machine if it is signalled. So it is offered, and never
            // signalled.
            VFIO_PCI_ERR_IRQ_INDEX => IrqInfo { count: 1, eventfd: true, ..IrqInfo::default() },
            _ => IrqInfo::default(),
        }
    }

    fn max_dma_maps(&self) -> u32 {
        REGIONS_MAX as u32
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        match self.target(region, offset) {
            Target::Config => {
                self.config.set_interrupt_status(self.context.interrupts.pin_is_asserted());
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
                        self.context.interrupts.pending(at / 8 * 64).to_le_bytes()[at % 8]
                    });
                }
            }
            Target::Gone => data.fill(0xff),
        }
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) {
        match self.target(region, offset) {
            Target::Config => {
                let effect = self.config.write(offset, data);
                if effect.reset {
                    self.reset_function();
                } else {
                    if let Some(master) = effect.master {
                        self.context.dma.set_bus_master(master && self.function.is_some());
                    }
                    if effect.master == Some(true) && self.memory.is_unshared() {
                        self.memory.memory().warn_unshared(0);
                    }
                    self.context.interrupts.disable_pin(effect.pin_disabled);
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
    }

    fn dma_map(&mut self, map: DmaMap) -> Result<(), Refused> {
        let DmaMap { address, size, readable, writable, backing } = map;
        let source = match backing {
            _ if !readable && !writable => RegionSource::Unknown,
            Backing::Mmap(file, offset) => RegionSource::Mapped(file, offset),
            Backing::FileIo(file, offset) => RegionSource::FileIo(file, offset),
            Backing::Messages(client) => RegionSource::Remote(Arc::new(client)),
            Backing::Unreachable => RegionSource::Unknown,
        };
        let region = self.memory.add(NewRegion { gpa: address, len: size, readable, writable, source });
        self.trace_memory(&*region.map_err(refused)?, true);
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Refused> {
        let gone = self.memory.unmap(address, size).map_err(refused)?;
        gone.iter().for_each(|region| self.trace_memory(region, false));
        Ok(())
    }

    fn dma_unmap_all(&mut self) {
        let gone = self.memory.clear();
        gone.iter().for_each(|region| self.trace_memory(region, false));
    }

    fn reset(&mut self) {
        self.reset_function();
        (self.on_device_reset)();
    }

    fn set_irqs(&mut self, set: IrqSet) -> Result<(), Refused> {
        match set.index {
            VFIO_PCI_INTX_IRQ_INDEX => self.set_pin(set),
            VFIO_PCI_MSI_IRQ_INDEX => self.set_vectors(VectorKind::Msi, set),
            VFIO_PCI_MSIX_IRQ_INDEX => self.set_vectors(VectorKind::Msix, set),
            // Error and request interrupts are never sent.
            _ => Ok(()),
        }
    }
}

/// How long an access to a client's memory may wait for other accesses, and then how long the client may take to
/// answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);

/// Memory that the client gave without a file descriptor, and that is accessed by messages.
impl Remote for ClientMemory {
    fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), NoAccess> {
        ClientMemory::read(self, gpa, data, CLIENT_LIMIT).map_err(|_| NoAccess)
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), NoAccess> {
        ClientMemory::write(self, gpa, data, CLIENT_LIMIT).map_err(|_| NoAccess)
    }
}

impl Drop for Backend<'_> {
    /// The client is gone. The function goes first, since its threads may be accessing the memory.
    fn drop(&mut self) {
        let function = self.function.take();
        catch_panic(&self.context, || drop(function));
        self.context.dma.set_bus_master(false);
        self.context.interrupts.assign_pin(None);
        self.context.interrupts.disable_pin(false);
        self.context.interrupts.disable(VectorKind::Msi);
        self.context.interrupts.disable(VectorKind::Msix);
        self.dma_unmap_all();
    }
}

/// Calls code of a model or its session; `None` if it panics, which is traced.
pub(super) fn catch_panic<R>(context: &FunctionContext, call: impl FnOnce() -> R) -> Option<R> {
    // State that the call may have left half changed is either never used again (the function) or consistent between
    // any two messages (everything else).
    let endpoint = context.dma.endpoint();
    let result = context.tracer.catch_panic(endpoint, call);
    if result.is_none() {
        log::error!("Caught a panic while serving endpoint {endpoint:#x}");
    }
    result
}

/// The answer to a client whose request about its memory failed.
fn refused(error: RegionError) -> Refused {
    let errno = match &error {
        RegionError::Overlap { .. } => libc::EEXIST,
        RegionError::NotMapped { .. } => libc::ENOENT,
        RegionError::TooMany | RegionError::TooLarge { .. } => libc::ENOSPC,
        RegionError::File(error) | RegionError::Map(error) => error.raw_os_error().unwrap_or(libc::EIO),
        RegionError::Range { .. } | RegionError::PastEnd { .. } | RegionError::Splits { .. } => libc::EINVAL,
    };
    Refused::new(errno, error)
}
