//! A DMA engine: register-compatible with version 3.3 of Intel's I/OAT ("QuickData"), one channel that copies memory.
//!
//! Linux's `ioatdma`, SPDK and the kernel's VFIO selftests drive it. Software puts descriptors in memory, each with the
//! address of the next, writes the first one's address to CHAINADDR and how many there are to DMACOUNT. A descriptor
//! that is ready later only takes a higher count. An address that cannot be accessed halts the channel, with a bit in
//! CHANERR; what lay before it was copied.
//!
//! * `registers`: where the registers are and what their bits mean;
//! * `channel`: their state, without any DMA;
//! * `interrupt`: when the interrupt is sent;
//! * `descriptor`: a descriptor's format and execution;
//! * `worker`: the thread that executes descriptors.
//!
//! What hardware has beyond that is not there and not advertised: XOR and RAID operations, fill, CRC, page breaks, direct
//! cache access, interrupt coalescing, and the copies of CHANERR in configuration space, which read as zero.

mod channel;
mod descriptor;
mod interrupt;
mod registers;
mod worker;

use std::error::Error;
use std::sync::Arc;

use worker::Worker;

use super::model::{Configuration, Device, Model};
use crate::pci::{Bar, Function, FunctionContext, Identity};

/// The model.
pub const MODEL: Model =
    Model { name: "dma-engine", endpoint_name: "dma", example: "", keys: &[], configure: |_, _| Ok(Arc::new(Engine)) };

/// An engine of a topology: it needs nothing.
#[derive(Debug)]
struct Engine;

impl Configuration for Engine {
    fn open(&self, _create: Option<u64>) -> Result<Arc<dyn Device>, Box<dyn Error + Send + Sync>> {
        Ok(Arc::new(Engine))
    }
}

impl Device for Engine {
    fn make(&self, context: FunctionContext) -> Box<dyn Function> {
        Box::new(Ioat::new(context))
    }
}

/// The DMA engine, a PCI function.
pub struct Ioat {
    worker: Worker,
}

impl Ioat {
    /// An engine in its power-on state: the channel is halted.
    ///
    /// # Panics
    /// If the system has no thread to give.
    pub fn new(context: FunctionContext) -> Self {
        Ioat { worker: Worker::start(context) }
    }
}

impl Function for Ioat {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x8086,
            device: 0x2021,
            subsystem_vendor: 0x8086,
            subsystem: 0x0000,
            class: 0x08_80_00,
            revision: 4,
            bars: &[Bar { index: 0, size: registers::BAR_SIZE, wide: true }],
            vectors: u16::from(registers::CHANNELS),
            integrated: true,
        }
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        let image = self.worker.read(|channel| read_all(channel, offset, data.len()));
        data.fill(0);
        let Some(from) = usize::try_from(offset).ok().and_then(|at| image.get(at..)) else { return };
        for (byte, register) in data.iter_mut().zip(from) {
            *byte = *register;
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        self.worker.change(|channel| write(channel, &Write { offset, data }));
    }

    fn reset(&mut self) {
        self.worker.reset();
    }
}

/// All registers; of those that change when they are read, the ones that `len` bytes from `offset` on touch do.
fn read_all(channel: &mut channel::Channel, offset: u64, len: usize) -> [u8; registers::END] {
    use registers::*;

    let mut image = [0; END];
    let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
    put(CHANCNT, &[CHANNELS]);
    put(XFERCAP, &[TRANSFER_LOG2]);
    put(INTRCTRL, &[channel.interrupt.control()]);
    put(ATTNSTATUS, &channel.interrupt.attention().to_le_bytes());
    put(CBVER, &[VERSION]);
    put(CHANCTRL, &channel.control().bits().to_le_bytes());
    put(DMA_COMP, &COMPATIBLE_V2.to_le_bytes());
    put(CHANCMD, &[channel.pending_command().bits()]);
    put(DMACOUNT, &channel.count().to_le_bytes());
    put(CHANSTS, &channel.chansts().to_le_bytes());
    put(CHAINADDR, &channel.chain_address().to_le_bytes());
    put(CHANCMP, &channel.completion_address().to_le_bytes());
    put(CHANERR, &channel.errors().bits().to_le_bytes());
    put(CHANERRMSK, &channel.error_mask().to_le_bytes());

    let touches = |register: usize| (offset..offset.saturating_add(len as u64)).contains(&(register as u64));
    if touches(INTRCTRL) {
        channel.interrupt.control_was_read();
    }
    if touches(ATTNSTATUS) {
        channel.interrupt.attention_was_read();
    }
    image
}

/// A write of any size at any place.
struct Write<'a> {
    offset: usize,
    data: &'a [u8],
}

impl Write<'_> {
    /// What a register of `N` bytes at `at` is to be: `now`, with the bytes that are written. `None` if none is.
    fn to<const N: usize>(&self, at: usize, now: [u8; N]) -> Option<[u8; N]> {
        let mut value = now;
        let mut touched = false;
        for (place, byte) in (at..).zip(&mut value) {
            if let Some(&new) = place.checked_sub(self.offset).and_then(|from| self.data.get(from)) {
                *byte = new;
                touched = true;
            }
        }
        touched.then_some(value)
    }
}

/// Writes registers, in the order of their addresses except that DMACOUNT, which starts the channel, is the last.
fn write(channel: &mut channel::Channel, write: &Write<'_>) {
    use registers::*;

    if let Some([value]) = write.to(INTRCTRL, [0]) {
        channel.interrupt.write_control(value);
    }
    // The interrupt disable bit reads as one when writing a one arms it: of it, only what is written counts.
    let control = channel.control().difference(Control::INTERRUPT_DISABLE).bits();
    if let Some(value) = write.to(CHANCTRL, control.to_le_bytes()) {
        channel.set_control(Control::from_bits_truncate(u16::from_le_bytes(value)));
    }
    if let Some([value]) = write.to(CHANCMD, [0]) {
        channel.command(value);
    }
    if let Some(value) = write.to(CHAINADDR, channel.chain_address().to_le_bytes()) {
        channel.set_chain_address(u64::from_le_bytes(value));
    }
    if let Some(value) = write.to(CHANCMP, channel.completion_address().to_le_bytes()) {
        channel.set_completion_address(u64::from_le_bytes(value));
    }
    if let Some(value) = write.to(CHANERR, [0; 4]) {
        channel.clear_errors(Errors::from_bits_truncate(u32::from_le_bytes(value)));
    }
    if let Some(value) = write.to(CHANERRMSK, channel.error_mask().to_le_bytes()) {
        channel.set_error_mask(u32::from_le_bytes(value));
    }
    if let Some(value) = write.to(DMACOUNT, channel.count().to_le_bytes()) {
        channel.set_count(u16::from_le_bytes(value));
    }
}
