//! The I/O commands (section 6): what each asks for. This module does no DMA and knows no thread.

use super::disk::Disk;
use super::spec::{NSID, NSID_ALL, Sqe, Status, TRANSFER_MAX, nvm};
use crate::dma::COPY_MAX;

/// The most bytes that are moved between the file and the host at once.
const CHUNK: u64 = COPY_MAX;
/// The most bytes that are zeroed at once. To write them takes some milliseconds, and to deallocate a whole disk still
/// takes few calls.
const PIECE: u64 = 16 << 20;

/// Force Unit Access, in command dword 12.
const FUA: u32 = 1 << 30;
/// Deallocate, in command dword 12 of Write Zeroes.
const DEAC: u32 = 1 << 25;
/// Deallocate, in command dword 11 of Dataset Management.
const AD: u32 = 1 << 2;

/// The size of a range of Dataset Management in bytes.
const RANGE: u32 = 16;

/// A decoded I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Flush,
    Read(Extent),
    Write { extent: Extent, force_unit_access: bool },
    Compare(Extent),
    WriteZeroes { extent: Extent, deallocate: bool, force_unit_access: bool },
    DatasetManagement { ranges: usize, deallocate: bool },
}

impl Operation {
    /// Decodes a command. Sets `len` to the number of bytes that it is about.
    ///
    /// # Errors
    /// The command cannot be executed.
    pub fn decode(sqe: &Sqe, disk: &Disk, len: &mut u32) -> Result<Self, Status> {
        if sqe.fuse() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let nsid = sqe.nsid.get();
        let is_write = match sqe.opcode {
            nvm::FLUSH if nsid == NSID_ALL => return Ok(Operation::Flush),
            nvm::FLUSH | nvm::READ | nvm::COMPARE => false,
            nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT => true,
            _ => return Err(Status::INVALID_OPCODE),
        };
        if nsid != NSID {
            return Err(Status::INVALID_NAMESPACE);
        }
        if is_write && disk.config().read_only {
            return Err(Status::WRITE_PROTECTED);
        }
        let cdw12 = sqe.cdw12.get();
        let force_unit_access = cdw12 & FUA != 0;
        Ok(match sqe.opcode {
            nvm::READ => Operation::Read(transfer(sqe, disk, len)?),
            nvm::WRITE => Operation::Write { extent: transfer(sqe, disk, len)?, force_unit_access },
            nvm::COMPARE => Operation::Compare(transfer(sqe, disk, len)?),
            nvm::WRITE_ZEROES => {
                let extent = Extent::new(disk, sqe.slba(), blocks(sqe))?;
                *len = extent.len as u32;
                Operation::WriteZeroes { extent, deallocate: cdw12 & DEAC != 0, force_unit_access }
            }
            nvm::DATASET_MANAGEMENT => {
                let ranges = (sqe.cdw10.get() & 0xff) + 1;
                *len = ranges * RANGE;
                Operation::DatasetManagement { ranges: ranges as usize, deallocate: sqe.cdw11.get() & AD != 0 }
            }
            _ => Operation::Flush,
        })
    }
}

/// Number of Logical Blocks.
fn blocks(sqe: &Sqe) -> u64 {
    u64::from(sqe.cdw12.get() & 0xffff) + 1
}

/// The blocks that a command transfers.
fn transfer(sqe: &Sqe, disk: &Disk, len: &mut u32) -> Result<Extent, Status> {
    let bytes = blocks(sqe) * u64::from(disk.config().block_size);
    *len = bytes as u32;
    if bytes > TRANSFER_MAX {
        return Err(Status::INVALID_FIELD);
    }
    Extent::new(disk, sqe.slba(), blocks(sqe))
}

/// A range of the namespace in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub offset: u64,
    pub len: u64,
}

impl Extent {
    /// The extent of `blocks` blocks from `slba` on.
    ///
    /// # Errors
    /// The namespace ends before that.
    pub fn new(disk: &Disk, slba: u64, blocks: u64) -> Result<Self, Status> {
        if slba.checked_add(blocks).is_none_or(|end| end > disk.blocks()) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let block = u64::from(disk.config().block_size);
        Ok(Extent { offset: slba * block, len: blocks * block })
    }

    /// Cuts the extent into chunks of at most [`CHUNK`] bytes: offset, length.
    pub fn chunks(self) -> impl Iterator<Item = (u64, usize)> {
        (0..self.len.div_ceil(CHUNK)).map(move |index| {
            let at = index * CHUNK;
            (self.offset + at, CHUNK.min(self.len - at) as usize)
        })
    }

    /// Cuts the extent at multiples of [`PIECE`] in the image: offset, length. So no allocation unit of the file system
    /// is cut in two, neither of which could be deallocated.
    pub fn pieces(self) -> impl Iterator<Item = (u64, u64)> {
        let end = self.offset + self.len;
        (self.offset / PIECE..end.div_ceil(PIECE)).map(move |index| {
            let from = self.offset.max(index * PIECE);
            (from, end.min((index + 1) * PIECE) - from)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::disk::NvmeConfig;
    use super::*;

    #[test]
    fn extents_to_zero_are_cut_between_allocation_units() {
        let pieces = |offset, len| Extent { offset, len }.pieces().collect::<Vec<_>>();
        assert_eq!(pieces(512, 1024), [(512, 1024)]);
        assert_eq!(pieces(PIECE, PIECE), [(PIECE, PIECE)]);
        let end = 2 * PIECE;
        assert_eq!(pieces(PIECE - 512, PIECE + 1536), [(PIECE - 512, 512), (PIECE, PIECE), (end, 1024)]);
    }

    #[test]
    fn commands_are_decoded_or_refused_with_their_status() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 10).unwrap();
        let read_only = NvmeConfig { read_only: true, ..NvmeConfig::new(image.path(), "serial") };
        let disk = Disk::open(read_only).unwrap();
        let decode = |opcode: u8, nsid: u32, slba: u32, cdw12: u32| {
            let mut len = 0;
            let sqe = Sqe { opcode, nsid: nsid.into(), cdw10: slba.into(), cdw12: cdw12.into(), ..Sqe::default() };
            (Operation::decode(&sqe, &disk, &mut len), len)
        };
        let extent = |offset, len| Extent { offset, len };
        assert_eq!(decode(nvm::READ, 1, 2, 3), (Ok(Operation::Read(extent(1024, 2048))), 2048));
        assert_eq!(decode(nvm::COMPARE, 1, 127, 0), (Ok(Operation::Compare(extent(127 * 512, 512))), 512));
        assert_eq!(decode(nvm::READ, 1, 127, 1), (Err(Status::LBA_OUT_OF_RANGE), 1024));
        assert_eq!(decode(nvm::READ, 1, 0, 0xffff), (Err(Status::INVALID_FIELD), 32 << 20));
        assert_eq!(decode(nvm::READ, 2, 0, 0), (Err(Status::INVALID_NAMESPACE), 0));
        assert_eq!(decode(nvm::WRITE, 1, 0, 0), (Err(Status::WRITE_PROTECTED), 0));
        assert_eq!(decode(0x33, 7, 0, 0), (Err(Status::INVALID_OPCODE), 0));
        assert_eq!(decode(nvm::FLUSH, NSID_ALL, 0, 0), (Ok(Operation::Flush), 0));
        assert_eq!(decode(nvm::FLUSH, 1, 0, 0), (Ok(Operation::Flush), 0));
    }
}
