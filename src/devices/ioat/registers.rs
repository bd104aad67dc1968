//! The registers in BAR 0: the global ones, and after them a block of 0x80 bytes for the channel.
//!
//! The names are those of Intel's data sheets ("DMA engine", "Intel QuickData Technology").

use serde::{Deserialize, Serialize};

use crate::devices::kit::registers::{Register, RegisterAccess, RegisterMap};
use viommu_wire::ioat;

/// The size of BAR 0 in bytes, as on hardware. Offsets without a register read as zero and ignore writes.
pub const BAR_SIZE: u64 = 0x4000;

/// Identifies a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Id {
    /// Number of channels.
    ChannelCount,
    /// Largest transfer of a descriptor: log2 of the bytes.
    TransferCapacity,
    /// Interrupt control; see [`super::interrupt`]. Reading it has an effect.
    InterruptControl,
    /// Attention status: bit n stands for an interrupt of channel n. Reading clears it.
    AttentionStatus,
    /// Version: major, minor.
    Version,
    /// Channel control, of [`Control`].
    ChannelControl,
    /// The older programming interfaces that the channel supports.
    Compatibility,
    /// Channel command, of [`Command`].
    ChannelCommand,
    /// Descriptor count: the number of descriptors since CHAINADDR was written, modulo 2^16.
    DescriptorCount,
    /// Channel status: the address of the last completed descriptor, and a [`super::channel::Status`].
    ChannelStatus,
    /// Descriptor chain address.
    ChainAddress,
    /// The address to which completions are written.
    CompletionAddress,
    /// Channel errors, of [`Errors`].
    ChannelErrors,
    /// The errors that cause no interrupt.
    ErrorMask,
}

/// All registers.
pub const REGISTERS: RegisterMap<Id> = RegisterMap::new(&[
    Register::new(Id::ChannelCount, ioat::CHANCNT, RegisterAccess::ReadOnly),
    Register::new(Id::TransferCapacity, ioat::XFERCAP, RegisterAccess::ReadOnly),
    Register::new(Id::InterruptControl, ioat::INTRCTRL, RegisterAccess::ReadWrite),
    Register::new(Id::AttentionStatus, ioat::ATTNSTATUS, RegisterAccess::ReadOnly),
    Register::new(Id::Version, ioat::CBVER, RegisterAccess::ReadOnly),
    Register::new(Id::ChannelControl, ioat::CHANCTRL, RegisterAccess::ReadWrite),
    Register::new(Id::Compatibility, ioat::DMA_COMP, RegisterAccess::ReadOnly),
    Register::new(Id::ChannelCommand, ioat::CHANCMD, RegisterAccess::ReadWrite),
    Register::new(Id::DescriptorCount, ioat::DMACOUNT, RegisterAccess::ReadWrite).doorbell(),
    Register::new(Id::ChannelStatus, ioat::CHANSTS, RegisterAccess::ReadOnly),
    Register::new(Id::ChainAddress, ioat::CHAINADDR, RegisterAccess::ReadWrite),
    Register::new(Id::CompletionAddress, ioat::CHANCMP, RegisterAccess::ReadWrite),
    Register::new(Id::ChannelErrors, ioat::CHANERR, RegisterAccess::WriteOne),
    Register::new(Id::ErrorMask, ioat::CHANERRMSK, RegisterAccess::ReadWrite),
]);

/// One channel, like each function of a server processor. For more channels there are more functions.
pub const CHANNELS: u8 = 1;
/// The largest transfer of a descriptor, 64 KiB, as log2 of the bytes. Hardware has 1 MiB. But the kernel's VFIO
/// selftests fill the channel with 65,535 descriptors of the largest size and wait a minute at most: 4 GiB take about a
/// second here, and 1 MiB each would make 64 GiB. Short descriptors also bound the time that the channel takes to stop.
pub const TRANSFER_LOG2: u8 = 16;
/// Version 3.3.
pub const VERSION: u8 = 0x33;
/// DMA_COMP: the interface of version 2, which counts descriptors in place of version 1's append bit.
pub const COMPATIBLE_V2: u16 = 1 << 1;

bitflags::bitflags! {
    /// CHANCTRL.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Control: u16 {
        /// Reads as one after the interrupt was sent, until it is armed. Writing a one arms it.
        const INTERRUPT_DISABLE = 1 << 0;
        /// An error writes a completion to the address in CHANCMP.
        const ERROR_COMPLETION = 1 << 2;
        /// Any error stops the channel. Without effect: it always does.
        const ANY_ERROR_ABORT = 1 << 3;
        /// An error sends the interrupt.
        const ERROR_INTERRUPT = 1 << 4;
        /// Descriptor reads do not snoop. Without effect: they always do.
        const NO_SNOOP = 1 << 5;
        /// A mark for software's own use.
        const IN_USE = 1 << 8;
    }
}

bitflags::bitflags! {
    /// CHANCMD.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Command: u8 {
        /// Stop before the next descriptor.
        const SUSPEND = 1 << 2;
        /// Go on after a suspend.
        const RESUME = 1 << 4;
        /// Reset the channel. The bit reads as one until that is done.
        const RESET = 1 << 5;
    }
}

bitflags::bitflags! {
    /// CHANERR: why the channel halted.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Errors: u32 {
        /// The source cannot be read.
        const SOURCE_ADDRESS = 1 << 0;
        /// The destination cannot be written.
        const DESTINATION_ADDRESS = 1 << 1;
        /// The descriptor that the current one names as next cannot be read.
        const NEXT_ADDRESS = 1 << 2;
        /// The next descriptor's address is not a multiple of 64.
        const NEXT_ALIGNMENT = 1 << 3;
        /// CHAINADDR is not a multiple of 64, or cannot be read.
        const CHAIN_ADDRESS = 1 << 4;
        /// CHANCMD was written with a value that is not a command.
        const COMMAND = 1 << 5;
        /// The descriptor's operation or one of its control bits is not supported.
        const CONTROL = 1 << 10;
        /// The descriptor's size is 0 or larger than XFERCAP allows.
        const LENGTH = 1 << 11;
        /// The address in CHANCMP cannot be written.
        const COMPLETION_ADDRESS = 1 << 12;
        /// The model itself failed.
        const UNAFFILIATED = 1 << 15;
    }
}
