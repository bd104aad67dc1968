//! Layouts and numbers of the NVM Express Base Specification (1.4).

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::devices::kit::ring;

/// A submission queue entry (figure 105).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Sqe {
    /// The opcode.
    pub opcode: u8,
    /// Fused operation in bits 1:0, PRP or SGL in bits 7:6.
    pub flags: u8,
    /// Command identifier.
    pub cid: U16,
    /// Namespace identifier.
    pub nsid: U32,
    /// Command dwords 2 and 3.
    pub cdw2: [U32; 2],
    /// Metadata pointer.
    pub metadata: U64,
    /// Data pointer: PRP entries 1 and 2, or an SGL descriptor.
    pub data: [U64; 2],
    /// Command dwords 10 to 15.
    pub cdw10: U32,
    /// See `cdw10`.
    pub cdw11: U32,
    /// See `cdw10`.
    pub cdw12: U32,
    /// See `cdw10`.
    pub cdw13: U32,
    /// See `cdw10`.
    pub cdw14: U32,
    /// See `cdw10`.
    pub cdw15: U32,
}

impl Sqe {
    /// Fused operation: 0 is a normal command.
    pub fn fuse(&self) -> u8 {
        self.flags & 3
    }

    /// PRP or SGL for data transfer.
    pub fn psdt(&self) -> u8 {
        self.flags >> 6
    }

    /// The whole entry as little-endian words.
    pub fn words(&self) -> [u64; 8] {
        zerocopy::transmute!(*self)
    }

    /// The entry of these words.
    pub fn from_words(words: [u64; 8]) -> Self {
        zerocopy::transmute!(words)
    }

    /// The starting LBA of a command that has one.
    pub fn slba(&self) -> u64 {
        u64::from(self.cdw10.get()) | u64::from(self.cdw11.get()) << 32
    }
}

/// A completion queue entry (figure 121).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Cqe {
    /// The command's result (dword 0).
    pub result: U32,
    /// Reserved.
    pub reserved: U32,
    /// The submission queue's head.
    pub sq_head: U16,
    /// The submission queue's identifier.
    pub sq_id: U16,
    /// Command identifier.
    pub cid: U16,
    /// Phase tag in bit 0, status field above.
    pub status: U16,
}

// The kit's rings have entries of these sizes.
const _: () = assert!(size_of::<Sqe>() as u64 == ring::COMMAND && size_of::<Cqe>() as u64 == ring::COMPLETION);

/// A completion's status field (figure 122): status code, type, and Do Not Retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status(pub u16);

/// Do Not Retry: a command that is repeated fails again.
const DNR: u16 = 1 << 14;

#[allow(missing_docs, reason = "the names are the specification's")]
impl Status {
    pub const SUCCESS: Status = Status(0);
    pub const INVALID_OPCODE: Status = Status(DNR | 0x01);
    pub const INVALID_FIELD: Status = Status(DNR | 0x02);
    pub const DATA_TRANSFER_ERROR: Status = Status(DNR | 0x04);
    pub const INTERNAL_ERROR: Status = Status(0x06);
    pub const ABORT_REQUESTED: Status = Status(0x07);
    pub const ABORTED_SQ_DELETION: Status = Status(0x08);
    pub const INVALID_NAMESPACE: Status = Status(DNR | 0x0b);
    pub const COMMAND_SEQUENCE_ERROR: Status = Status(DNR | 0x0c);
    pub const INVALID_SGL_SEGMENT: Status = Status(DNR | 0x0d);
    pub const INVALID_SGL_COUNT: Status = Status(DNR | 0x0e);
    pub const DATA_SGL_LENGTH_INVALID: Status = Status(DNR | 0x0f);
    pub const SGL_TYPE_INVALID: Status = Status(DNR | 0x11);
    pub const PRP_OFFSET_INVALID: Status = Status(DNR | 0x13);
    pub const WRITE_PROTECTED: Status = Status(DNR | 0x20);
    pub const LBA_OUT_OF_RANGE: Status = Status(DNR | 0x80);
    pub const COMPLETION_QUEUE_INVALID: Status = Status(DNR | 0x100);
    pub const INVALID_QUEUE_ID: Status = Status(DNR | 0x101);
    pub const INVALID_QUEUE_SIZE: Status = Status(DNR | 0x102);
    pub const AER_LIMIT_EXCEEDED: Status = Status(DNR | 0x105);
    pub const INVALID_INTERRUPT_VECTOR: Status = Status(DNR | 0x108);
    pub const INVALID_LOG_PAGE: Status = Status(DNR | 0x109);
    pub const INVALID_QUEUE_DELETION: Status = Status(DNR | 0x10c);
    pub const FEATURE_NOT_SAVEABLE: Status = Status(DNR | 0x10d);
    pub const WRITE_FAULT: Status = Status(0x280);
    pub const UNRECOVERED_READ_ERROR: Status = Status(0x281);
    pub const COMPARE_FAILURE: Status = Status(DNR | 0x285);
}

/// Admin commands.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod admin {
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub const DOORBELL_BUFFER_CONFIG: u8 = 0x7c;

    /// The commands that are implemented.
    pub const IMPLEMENTED: [u8; 11] = [
        DELETE_SQ,
        CREATE_SQ,
        GET_LOG_PAGE,
        DELETE_CQ,
        CREATE_CQ,
        IDENTIFY,
        ABORT,
        SET_FEATURES,
        GET_FEATURES,
        ASYNC_EVENT_REQUEST,
        DOORBELL_BUFFER_CONFIG,
    ];
}

/// I/O commands of the NVM command set.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod nvm {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// The namespace identifier for all namespaces.
pub const NSID_ALL: u32 = u32::MAX;
/// The identifier of the only namespace.
pub const NSID: u32 = 1;

/// The version that is implemented: 1.4.
pub const VERSION: u32 = 0x0001_0400;

/// CSTS: ready.
pub const CSTS_READY: u32 = 1;
/// CSTS: fatal.
pub const CSTS_FATAL: u32 = 1 << 1;
/// CSTS: shutdown status.
pub const CSTS_SHUTDOWN: u32 = 3 << 2;
/// CSTS: shutdown is in progress.
pub const CSTS_SHUTDOWN_OCCURRING: u32 = 1 << 2;
/// CSTS: shutdown is complete.
pub const CSTS_SHUTDOWN_COMPLETE: u32 = 2 << 2;

/// The largest value of CC.MPS: the memory page size is 2^MPS * 4 KiB.
pub const MPS_MAX: u32 = 4;
/// The most entries of a queue.
pub const QUEUE_ENTRIES_MAX: u32 = 1024;
/// The Maximum Data Transfer Size, as a power of two of 4 KiB: 8 MiB, the most that Linux uses.
pub const MDTS: u8 = 11;
/// The Maximum Data Transfer Size in bytes.
pub const TRANSFER_MAX: u64 = 4096 << MDTS;

/// CC, the controller configuration (section 3.1.5). The methods are named as its fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cc(pub u32);

impl Cc {
    /// The fields that the host may change only while the controller is disabled: CSS, MPS and AMS.
    pub const FIXED: u32 = 0x3ff0;

    /// Enable.
    pub fn en(self) -> bool {
        self.field(0, 1) != 0
    }

    /// I/O command set selected.
    pub fn css(self) -> u32 {
        self.field(4, 3)
    }

    /// Memory page size, as a power of two of 4 KiB.
    pub fn mps(self) -> u32 {
        self.field(7, 4)
    }

    /// Arbitration mechanism selected.
    pub fn ams(self) -> u32 {
        self.field(11, 3)
    }

    /// Shutdown notification.
    pub fn shn(self) -> u8 {
        self.field(14, 2) as u8
    }

    /// The memory page size in bytes, at most that of [`MPS_MAX`].
    pub fn page_size(self) -> u64 {
        4096 << self.mps().min(MPS_MAX)
    }

    fn field(self, shift: u32, bits: u32) -> u32 {
        self.0 >> shift & ((1 << bits) - 1)
    }
}
