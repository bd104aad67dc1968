//! What a device model implements and what it is given.

use std::sync::Arc;

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

    /// The guest writes `data` at `offset` of a BAR.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// Function-level or conventional reset. No DMA and no interrupt of before happens after it returned.
    fn reset(&mut self);
}
