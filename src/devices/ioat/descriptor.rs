//! Descriptors: their format in memory, and their execution.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::registers::{Errors, TRANSFER_LOG2};
use crate::dma::{Dma, DmaError};

/// The size of a descriptor in bytes, and the alignment of its address.
pub const SIZE: u64 = size_of::<Descriptor>() as u64;

bitflags::bitflags! {
    /// The control bits below the operation that have an effect here. Snooping, fences and cache hints have none, since
    /// descriptors are executed one after the other and memory is coherent.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// The interrupt is sent when the descriptor completes.
        const INTERRUPT = 1 << 0;
        /// A completion is written to the address in CHANCMP.
        const COMPLETION = 1 << 3;
        /// No data is moved.
        const NULL = 1 << 5;
        /// The source is a list of pages. Needs a capability that is not offered.
        const SOURCE_PAGE_BREAK = 1 << 6;
        /// The destination is a list of pages. Needs a capability that is not offered.
        const DESTINATION_PAGE_BREAK = 1 << 7;
        /// The descriptor forms a bundle with the next one. Needs a capability that is not offered.
        const BUNDLE = 1 << 8;
    }
}

/// Flags that are not supported.
const UNSUPPORTED: Flags = Flags::SOURCE_PAGE_BREAK.union(Flags::DESTINATION_PAGE_BREAK).union(Flags::BUNDLE);

/// The copy operation. There is no other: DMACAPABILITY reads as zero.
const COPY: u8 = 0;

/// A descriptor as it is in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    size: U32,
    control: U32,
    source: U64,
    destination: U64,
    next: U64,
    /// Two operands of other operations, and two words for the driver's own use.
    other: [U64; 4],
}

impl Descriptor {
    /// The number of bytes to move.
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

    /// The source address.
    pub fn source(&self) -> u64 {
        self.source.get()
    }

    /// The destination address.
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

    /// Reads the descriptor at `address`. `first` says that the address is from CHAINADDR, and not from another
    /// descriptor.
    ///
    /// # Errors
    /// The address is not aligned or cannot be read.
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

    /// Executes the descriptor. The bytes before an address that cannot be accessed are copied.
    ///
    /// # Errors
    /// The descriptor is not supported, or an address cannot be accessed.
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

/// The number of bytes, of `len` from `start` on, that were accessed before the error.
fn reached(error: DmaError, start: u64, len: usize) -> usize {
    let stopped_at = match error {
        DmaError::Fault { address, .. } => address,
        DmaError::NoMemory { iova, .. } => iova,
        DmaError::BusMasterOff => start,
    };
    usize::try_from(stopped_at.wrapping_sub(start)).map_or(0, |reached| reached.min(len))
}

/// The buffer through which a descriptor's data passes.
pub struct Buffer(Box<[u8]>);

impl Buffer {
    /// A buffer for the largest transfer.
    pub fn new() -> Self {
        Buffer(vec![0; 1 << TRANSFER_LOG2].into())
    }
}
