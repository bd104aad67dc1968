//! Messages on the wire ("Protocol Specification"), in the byte order of the host, which is little endian.

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most bytes that one message reads or writes: `max_data_xfer_size`.
pub const MAX_DATA: usize = 1 << 20;

/// The most descriptors that a message may have: `max_msg_fds`. QEMU refuses a server that takes more.
pub const MAX_FDS: usize = 16;

/// The longest message that is read: [`MAX_DATA`] bytes, and room for headers.
pub const MAX_MESSAGE: usize = MAX_DATA + 4096;

/// Commands ("Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the specification, without VFIO_USER_")]
pub enum Command {
    Version,
    DmaMap,
    DmaUnmap,
    DeviceGetInfo,
    DeviceGetRegionInfo,
    DeviceGetRegionIoFds,
    DeviceGetIrqInfo,
    DeviceSetIrqs,
    RegionRead,
    RegionWrite,
    DmaRead,
    DmaWrite,
    DeviceReset,
    DirtyPages,
    RegionWriteMulti,
    DeviceFeature,
    MigDataRead,
    MigDataWrite,
}

impl Command {
    const ALL: [Command; 18] = [
        Command::Version,
        Command::DmaMap,
        Command::DmaUnmap,
        Command::DeviceGetInfo,
        Command::DeviceGetRegionInfo,
        Command::DeviceGetRegionIoFds,
        Command::DeviceGetIrqInfo,
        Command::DeviceSetIrqs,
        Command::RegionRead,
        Command::RegionWrite,
        Command::DmaRead,
        Command::DmaWrite,
        Command::DeviceReset,
        Command::DirtyPages,
        Command::RegionWriteMulti,
        Command::DeviceFeature,
        Command::MigDataRead,
        Command::MigDataWrite,
    ];

    /// The command with this number, if it exists.
    pub fn of(number: u16) -> Option<Command> {
        Command::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// Its number.
    pub fn number(self) -> u16 {
        self as u16 + 1
    }
}

bitflags! {
    /// The flags of a header, and the message's type.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HeaderFlags: u32 {
        /// The type of a reply. A command's is 0.
        const REPLY = 1 << 0;
        /// Types that do not exist.
        const OTHER_TYPES = 0b1110;
        /// No answer is wanted.
        const NO_REPLY = 1 << 4;
        /// The answer is an error.
        const ERROR = 1 << 5;
    }

    /// Properties of a DMA region ("VFIO_USER_DMA_MAP").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaMapFlags: u32 {
        /// The device may read.
        const READ = 1 << 0;
        /// The device may write.
        const WRITE = 1 << 1;
        /// The descriptor is to be mapped, which is also the default. A flag of libvfio-user's.
        const MMAP = 1 << 2;
        /// The descriptor is to be read and written, since it cannot be mapped. A flag of libvfio-user's.
        const FILE_IO = 1 << 3;
    }

    /// The flags of an unmapping (`struct vfio_iommu_type1_dma_unmap` of `<linux/vfio.h>`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaUnmapFlags: u32 {
        /// The reply is to have a bitmap of the pages that were written.
        const GET_DIRTY_BITMAP = 1 << 0;
        /// All regions.
        const ALL = 1 << 1;
    }

    /// Properties of a device ("VFIO_USER_DEVICE_GET_INFO").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// DEVICE_RESET resets it.
        const RESET = 1 << 0;
        /// It is a PCI device.
        const PCI = 1 << 1;
    }

    /// The accesses that a region allows ("VFIO_USER_DEVICE_GET_REGION_INFO").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// The client may read.
        const READ = 1 << 0;
        /// The client may write.
        const WRITE = 1 << 1;
        /// The client may map it, or parts of it.
        const MMAP = 1 << 2;
        /// The reply has capabilities.
        const CAPS = 1 << 3;
    }

    /// The action of SET_IRQS and the type of its data ("VFIO_USER_DEVICE_SET_IRQS").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqSetFlags: u32 {
        /// It has no data.
        const DATA_NONE = 1 << 0;
        /// The data are a byte for each interrupt, which says whether the interrupt is meant.
        const DATA_BOOL = 1 << 1;
        /// The data are event file descriptors.
        const DATA_EVENTFD = 1 << 2;
        /// Mask.
        const ACTION_MASK = 1 << 3;
        /// Unmask.
        const ACTION_UNMASK = 1 << 4;
        /// Trigger.
        const ACTION_TRIGGER = 1 << 5;
    }
}

/// The capability of a region of which areas can be mapped.
pub const SPARSE_MMAP: u16 = 1;

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {
        $($(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* })*
    };
}

structures! {
    /// The header of every message ("Header").
    Header {
        /// The sender's number for the message. The reply has the same.
        id: U16,
        /// A [`Command`].
        command: U16,
        /// Bytes of the message, including this header.
        size: U32,
        /// [`HeaderFlags`].
        flags: U32,
        /// An error number, if the flags say so.
        error: U32,
    }

    /// The beginning of VERSION. JSON follows.
    Version {
        /// It must be the same on both sides.
        major: U16,
        /// The lower one of the two sides' is used.
        minor: U16,
    }

    /// DMA_MAP.
    DmaMapRequest {
        /// Bytes of this structure.
        argsz: U32,
        /// [`DmaMapFlags`].
        flags: U32,
        /// Where in the file the region begins.
        offset: U64,
        /// The first address.
        address: U64,
        /// Bytes.
        size: U64,
    }

    /// DMA_UNMAP, and its reply.
    DmaUnmap {
        /// The most bytes of a reply.
        argsz: U32,
        /// [`DmaUnmapFlags`].
        flags: U32,
        /// The first address.
        address: U64,
        /// Bytes.
        size: U64,
    }

    /// DEVICE_GET_INFO, and its reply.
    DeviceInfo {
        /// The most bytes of a reply; in the reply, the bytes of a whole one.
        argsz: U32,
        /// [`DeviceFlags`].
        flags: U32,
        /// The number of regions.
        num_regions: U32,
        /// The number of interrupt types.
        num_irqs: U32,
    }

    /// DEVICE_GET_REGION_INFO, and its reply.
    RegionInfo {
        /// The most bytes of a reply; in the reply, the bytes of a whole one.
        argsz: U32,
        /// [`RegionFlags`].
        flags: U32,
        /// The region's number.
        index: U32,
        /// Where a [`SparseMmap`] is in the reply, if it has one.
        cap_offset: U32,
        /// Bytes.
        size: U64,
        /// Where it begins in the descriptor that comes with the reply.
        offset: U64,
    }

    /// What the capability with the areas that can be mapped begins with (`struct vfio_region_info_cap_sparse_mmap` of
    /// `<linux/vfio.h>`); then come as many [`MmapArea`]s.
    SparseMmap {
        /// [`SPARSE_MMAP`].
        id: U16,
        /// 1.
        version: U16,
        /// Where the next capability is: there is none.
        next: U32,
        /// How many areas there are.
        count: U32,
        /// Nothing.
        reserved: U32,
    }

    /// An area that can be mapped.
    MmapArea {
        /// Where it begins in the region.
        offset: U64,
        /// Bytes.
        size: U64,
    }

    /// DEVICE_GET_REGION_IO_FDS, and the beginning of its reply.
    RegionIoFds {
        /// The most bytes of a reply; in the reply, the bytes of a whole one.
        argsz: U32,
        /// Zero.
        flags: U32,
        /// The region's number.
        index: U32,
        /// The number of its parts that have a descriptor.
        count: U32,
    }

    /// DEVICE_GET_IRQ_INFO, and its reply.
    IrqInfoReply {
        /// The most bytes of a reply; in the reply, the bytes of a whole one.
        argsz: U32,
        /// The flags of an [`IrqInfo`](super::IrqInfo).
        flags: U32,
        /// The interrupt type.
        index: U32,
        /// The number of interrupts of this type.
        count: U32,
    }

    /// The beginning of DEVICE_SET_IRQS. A byte for each interrupt may follow.
    IrqSetRequest {
        /// Bytes of the whole request.
        argsz: U32,
        /// [`IrqSetFlags`].
        flags: U32,
        /// The interrupt type.
        index: U32,
        /// The first interrupt.
        start: U32,
        /// The number of interrupts.
        count: U32,
    }

    /// The beginning of REGION_READ, REGION_WRITE and their replies. Data follow.
    RegionAccess {
        /// The offset in the region.
        offset: U64,
        /// The region's number.
        region: U32,
        /// Bytes of data.
        count: U32,
    }

    /// The beginning of REGION_WRITE_MULTI, which [`RegionWrite`]s follow, and its reply.
    RegionWriteMulti {
        /// The number of writes.
        count: U64,
    }

    /// A write of REGION_WRITE_MULTI.
    RegionWrite {
        /// The place, and the number of bytes, at most 8.
        access: RegionAccess,
        /// The bytes.
        data: [u8; 8],
    }

    /// The beginning of DEVICE_FEATURE.
    DeviceFeature {
        /// The most bytes of a reply.
        argsz: U32,
        /// The feature's number, and what to do with it.
        flags: U32,
    }

    /// The beginning of DMA_READ, DMA_WRITE and their replies. Data follow.
    DmaAccess {
        /// The first address.
        address: U64,
        /// Bytes of data.
        count: U64,
    }
}

impl Header {
    /// Its flags, without those that do not exist.
    pub fn flags(&self) -> HeaderFlags {
        HeaderFlags::from_bits_truncate(self.flags.get())
    }

    /// The header of the reply to this message, which has `payload` more bytes.
    pub fn reply(&self, payload: usize) -> Header {
        Header {
            size: ((size_of::<Header>() + payload) as u32).into(),
            flags: HeaderFlags::REPLY.bits().into(),
            error: 0.into(),
            ..*self
        }
    }

    /// The header of the reply that reports an error.
    pub fn error_reply(&self, errno: i32) -> Header {
        let flags = HeaderFlags::REPLY | HeaderFlags::ERROR;
        Header { flags: flags.bits().into(), error: (errno as u32).into(), ..self.reply(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_their_numbers() {
        assert_eq!(Command::of(0), None);
        assert_eq!(Command::of(19), None);
        for number in 1..=18 {
            assert_eq!(Command::of(number).unwrap().number(), number);
        }
        assert_eq!(Command::DeviceReset.number(), 13);
        assert_eq!(Command::DeviceFeature.number(), 16);
    }
}
