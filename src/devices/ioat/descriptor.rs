//! A descriptor in memory, and its execution.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::registers::{Errors, TRANSFER_LOG2};
use crate::dma::{Dma, DmaError};

/// Bytes of a descriptor, and what its address is a multiple of.
pub const SIZE: u64 = size_of::<Descriptor>() as u64;

bitflags::bitflags! {
    /// The control bits below the operation, as far as they mean something here. Snooping, fences and cache hints need
    /// nothing: descriptors are executed one after the other, and memory is coherent.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// The completion sends the interrupt.
        const INTERRUPT = 1 << 0;
        /// The completion is written to CHANCMP.
        const COMPLETION = 1 << 3;
        /// No data is moved.
        const NULL = 1 << 5;
        /// The source is a list of pages; only with a capability that is not offered.
        const SOURCE_PAGE_BREAK = 1 << 6;
        /// The destination is a list of pages; likewise.
        const DESTINATION_PAGE_BREAK = 1 << 7;
        /// The descriptor belongs together with the next one; likewise.
        const BUNDLE = 1 << 8;
    }
}

/// What a bit of that is not supported.
const UNSUPPORTED: Flags = Flags::SOURCE_PAGE_BREAK.union(Flags::DESTINATION_PAGE_BREAK).union(Flags::BUNDLE);

/// The copy operation, and the only one that there is: DMACAPABILITY reads as zero.
const COPY: u8 = 0;

/// A descriptor in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    size: U32,
    control: U32,
    source: U64,
    destination: U64,
    next: U64,
    /// Two operands of other operations, and two words that are the driver's own.
    other: [U64; 4],
}

impl Descriptor {
    /// Bytes to move.
    pub fn size(&self) -> u32 {
        self.size.get()
    }

    /// The operation.
    pub fn operation(&self) -> u8 {
        (self.control.get() >> 24) as u8
    }

    /// The control bits.
    pub fn flags(&self) -> Flags {
        Flags::from_bits_truncate(self.control.get() & 0x00ff_ffff)
    }

    /// Where the data comes from.
    pub fn source(&self) -> u64 {
        self.source.get()
    }

    /// Where it goes to.
    pub fn destination(&self) -> u64 {
        self.destination.get()
    }

    /// The address of the next descriptor.
    pub fn next(&self) -> u64 {
        self.next.get()
    }

    /// Whether data is moved.
    pub fn moves_data(&self) -> bool {
        !self.flags().contains(Flags::NULL)
    }

    /// Reads the descriptor at `address`; `first`: the address is CHAINADDR's, and not another descriptor's.
    pub fn fetch(dma: &mut Dma, address: u64, first: bool) -> Result<Descriptor, Errors> {
        if !address.is_multiple_of(SIZE) {
            return Err(if first { Errors::CHAIN_ADDRESS } else { Errors::NEXT_ALIGNMENT });
        }
        let mut descriptor = Descriptor::new_zeroed();
        match dma.read(address, descriptor.as_mut_bytes()) {
            Ok(()) => Ok(descriptor),
            Err(_) if first => Err(Errors::CHAIN_ADDRESS),
            Err(_) => Err(Errors::NEXT_ADDRESS),
        }
    }

    /// Does what the descriptor says. What lies before an address that cannot be accessed is copied.
    pub fn execute(&self, dma: &mut Dma, buffer: &mut Buffer) -> Result<(), Errors> {
        if self.operation() != COPY || self.flags().intersects(UNSUPPORTED) {
            return Err(Errors::CONTROL);
        }
        if !self.moves_data() {
            return Ok(());
        }
        let Some(data) = buffer.0.get_mut(..self.size() as usize).filter(|data| !data.is_empty()) else {
            return Err(Errors::LENGTH);
        };
        let read = dma.read(self.source(), data);
        let good = read.err().map_or(data.len(), |error| reached(error, self.source(), data.len()));
        dma.write(self.destination(), &data[..good]).map_err(|_| Errors::DESTINATION_ADDRESS)?;
        read.map_err(|_| Errors::SOURCE_ADDRESS)
    }
}

/// How many of `len` bytes from `start` on were accessed before an error.
fn reached(error: DmaError, start: u64, len: usize) -> usize {
    let stopped_at = match error {
        DmaError::Fault { address, .. } => address,
        DmaError::NoMemory { iova, .. } => iova,
        DmaError::BusMasterOff => start,
    };
    usize::try_from(stopped_at.wrapping_sub(start)).map_or(0, |reached| reached.min(len))
}

/// What a descriptor's data passes through.
pub struct Buffer(Box<[u8]>);

impl Buffer {
    /// Holds the largest transfer.
    pub fn new() -> Self {
        Buffer(vec![0; 1 << TRANSFER_LOG2].into())
    }
}
