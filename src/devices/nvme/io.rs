//! The commands of the NVM command set (section 6).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::pointer::Runs;
use super::shared::Shared;
use super::spec::{NSID, NSID_ALL, Sqe, Status, TRANSFER_MAX, nvm, page_size};
use crate::dma::{COPY_MAX, Dma};
use crate::poller::PollGuard;
use viommu_trace::event::{Access, DataPointer};

/// The most bytes that are moved between file and host at once.
const CHUNK: u64 = COPY_MAX;
/// The most bytes that are made zeros at once: some milliseconds if they have to be written, and still few calls for a
/// whole disk that is deallocated.
const PIECE: u64 = 16 << 20;

/// Force Unit Access, in command dword 12.
const FUA: u32 = 1 << 30;
/// Deallocate, in command dword 12 of Write Zeroes.
const DEAC: u32 = 1 << 25;
/// Deallocate, in command dword 11 of Dataset Management.
const AD: u32 = 1 << 2;

/// What the trace tells of a command beside its entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub pointer: DataPointer,
    /// Bytes that the command is about.
    pub len: u32,
}

impl Default for Moved {
    fn default() -> Self {
        Moved { pointer: DataPointer::None, len: 0 }
    }
}

/// Executes I/O commands, one after the other.
pub(super) struct Executor {
    shared: Arc<Shared>,
    /// Who sets it waits for the command in execution, which therefore looks at it before each part of what it has to do.
    stop: Arc<AtomicBool>,
    runs: Runs,
    buffer: Vec<u8>,
    host_data: Vec<u8>,
}

/// A range of the namespace in bytes.
#[derive(Clone, Copy)]
struct Extent {
    offset: u64,
    len: u64,
}

impl Extent {
    /// Cut into pieces of at most [`CHUNK`].
    fn chunks(self) -> impl Iterator<Item = (u64, usize)> {
        (0..self.len.div_ceil(CHUNK)).map(move |index| {
            let at = index * CHUNK;
            (self.offset + at, CHUNK.min(self.len - at) as usize)
        })
    }

    /// Cut at the multiples of [`PIECE`] in the image: what the file system allocates at once is not cut in two, of which
    /// neither could be deallocated.
    fn pieces(self) -> impl Iterator<Item = (u64, u64)> {
        let end = self.offset + self.len;
        (self.offset / PIECE..end.div_ceil(PIECE)).map(move |index| {
            let from = self.offset.max(index * PIECE);
            (from, end.min((index + 1) * PIECE) - from)
        })
    }
}

impl Executor {
    pub fn new(shared: Arc<Shared>, stop: Arc<AtomicBool>) -> Self {
        Executor { shared, stop, runs: Runs::default(), buffer: Vec::new(), host_data: Vec::new() }
    }

    /// Executes a command. `guard` is released before what may take long.
    pub fn execute(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved, guard: &mut PollGuard) -> Status {
        if !matches!(sqe.opcode, nvm::READ | nvm::WRITE) {
            guard.release();
        }
        let result = self.dispatch(dma, sqe, moved, guard);
        let disk = &self.shared.disk;
        disk.count(|c| &c.io_count, 1);
        match (sqe.opcode, result.is_ok()) {
            (nvm::READ, true) => {
                disk.count(|c| &c.reads, 1);
                disk.count(|c| &c.bytes_read, u64::from(moved.len));
            }
            (nvm::WRITE, true) => {
                disk.count(|c| &c.writes, 1);
                disk.count(|c| &c.bytes_written, u64::from(moved.len));
            }
            _ => {}
        }
        result.err().unwrap_or(Status::SUCCESS)
    }

    fn check_stop(&self) -> Result<(), Status> {
        if self.stop.load(Ordering::Acquire) { Err(Status::ABORTED_SQ_DELETION) } else { Ok(()) }
    }

    /// To be called before each chunk of an extent: who maps the next transfer meanwhile waits for no more than one. Who calls
    /// [`Executor::execute`] looks after it.
    fn between(&self, extent: Extent, chunk: u64, guard: &mut PollGuard) -> Result<(), Status> {
        if chunk != extent.offset {
            guard.poll();
        }
        self.check_stop()
    }

    fn dispatch(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved, guard: &mut PollGuard) -> Result<(), Status> {
        if sqe.fuse() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        match sqe.opcode {
            nvm::FLUSH if sqe.nsid.get() == NSID_ALL => self.flush(),
            nvm::FLUSH | nvm::WRITE | nvm::READ | nvm::COMPARE | nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT
                if sqe.nsid.get() != NSID =>
            {
                Err(Status::INVALID_NAMESPACE)
            }
            nvm::FLUSH => self.flush(),
            nvm::WRITE => self.write(dma, sqe, moved, guard),
            nvm::READ => self.read(dma, sqe, moved, guard),
            nvm::COMPARE => self.compare(dma, sqe, moved),
            nvm::WRITE_ZEROES => self.write_zeroes(sqe, moved, guard),
            nvm::DATASET_MANAGEMENT => self.dataset_management(dma, sqe, moved),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    fn flush(&self) -> Result<(), Status> {
        self.shared.disk.flush().map_err(write_fault)
    }

    fn read(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved, guard: &mut PollGuard) -> Result<(), Status> {
        let extent = self.transfer(dma, sqe, moved, true)?;
        for (offset, len) in extent.chunks() {
            self.between(extent, offset, guard)?;
            if !self.exchange(dma, Access::Write, offset, len) {
                guard.release();
                let data = sized(&mut self.buffer, len);
                self.shared.disk.read(data, offset).map_err(read_error)?;
                self.runs.write(dma, data)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved, guard: &mut PollGuard) -> Result<(), Status> {
        self.check_writable()?;
        let extent = self.transfer(dma, sqe, moved, false)?;
        for (offset, len) in extent.chunks() {
            self.between(extent, offset, guard)?;
            if !self.exchange(dma, Access::Read, offset, len) {
                guard.release();
                let data = sized(&mut self.buffer, len);
                self.runs.read(dma, data)?;
                self.shared.disk.write(data, offset).map_err(write_fault)?;
            }
        }
        self.durable(sqe, guard)
    }

    /// Moves the next `len` bytes between the host's memory and the image straight away, if that can be without waiting.
    /// `access` is that to the host's memory.
    fn exchange(&mut self, dma: &mut Dma, access: Access, offset: u64, len: usize) -> bool {
        let Some(file) = self.shared.disk.without_waiting(access) else { return false };
        self.runs.exchange(dma, len, access, file, offset)
    }

    fn compare(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved) -> Result<(), Status> {
        let extent = self.transfer(dma, sqe, moved, false)?;
        for (offset, len) in extent.chunks() {
            self.check_stop()?;
            let data = sized(&mut self.buffer, len);
            self.shared.disk.read(data, offset).map_err(read_error)?;
            let host_data = sized(&mut self.host_data, len);
            self.runs.read(dma, host_data)?;
            if data != host_data {
                return Err(Status::COMPARE_FAILURE);
            }
        }
        Ok(())
    }

    fn write_zeroes(&mut self, sqe: &Sqe, moved: &mut Moved, guard: &mut PollGuard) -> Result<(), Status> {
        self.check_writable()?;
        let extent = self.extent(sqe.slba(), u64::from(sqe.cdw12.get() & 0xffff) + 1)?;
        moved.len = extent.len as u32;
        let deallocate = sqe.cdw12.get() & DEAC != 0;
        self.zero(extent, deallocate)?;
        self.durable(sqe, guard)
    }

    fn zero(&self, extent: Extent, deallocate: bool) -> Result<(), Status> {
        for (offset, len) in extent.pieces() {
            self.check_stop()?;
            self.shared.disk.zero(offset, len, deallocate).map_err(write_fault)?;
        }
        Ok(())
    }

    fn dataset_management(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved) -> Result<(), Status> {
        self.check_writable()?;
        let count = (sqe.cdw10.get() & 0xff) as usize + 1;
        let mut ranges = [Range::default(); 256];
        let ranges = &mut ranges[..count];
        moved.len = size_of_val(ranges) as u32;
        self.point(dma, sqe, moved, false)?;
        self.runs.read(dma, ranges.as_mut_bytes())?;
        if sqe.cdw11.get() & AD == 0 {
            // The other attributes are hints, of which no use is made.
            return Ok(());
        }
        let extent = |range: &Range| self.extent(range.slba.get(), u64::from(range.blocks.get()));
        let extents = ranges.iter().map(extent).collect::<Result<Vec<Extent>, Status>>()?;
        if !self.shared.disk.punches() {
            // Deallocation is advice; without holes there is nothing to win by writing zeros.
            return Ok(());
        }
        for extent in extents.iter().filter(|extent| extent.len > 0) {
            self.zero(*extent, true)?;
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.shared.disk.config().read_only { Err(Status::WRITE_PROTECTED) } else { Ok(()) }
    }

    /// Checks the range of a command that transfers its blocks, and finds the host's memory for them.
    fn transfer(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved, to_host: bool) -> Result<Extent, Status> {
        let blocks = u64::from(sqe.cdw12.get() & 0xffff) + 1;
        let len = blocks * u64::from(self.shared.disk.config().block_size);
        moved.len = len as u32;
        if len > TRANSFER_MAX {
            return Err(Status::INVALID_FIELD);
        }
        let extent = self.extent(sqe.slba(), blocks)?;
        self.point(dma, sqe, moved, to_host)?;
        Ok(extent)
    }

    /// Finds the host's memory for `moved.len` bytes.
    fn point(&mut self, dma: &mut Dma, sqe: &Sqe, moved: &mut Moved, to_host: bool) -> Result<(), Status> {
        let pointer = sqe.data.map(U64::get);
        match sqe.psdt() {
            0 => {
                moved.pointer = DataPointer::Prp;
                let page = page_size(self.shared.cc.load(Ordering::Relaxed));
                self.runs.set_prp(dma, page, pointer, u64::from(moved.len))
            }
            1 | 2 => {
                moved.pointer = DataPointer::Sgl;
                self.runs.set_sgl(dma, pointer, u64::from(moved.len), to_host)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn extent(&self, slba: u64, blocks: u64) -> Result<Extent, Status> {
        let disk = &self.shared.disk;
        if slba.checked_add(blocks).is_none_or(|end| end > disk.blocks()) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let block = u64::from(disk.config().block_size);
        Ok(Extent { offset: slba * block, len: blocks * block })
    }

    /// Forced unit access, or no write cache.
    fn durable(&self, sqe: &Sqe, guard: &mut PollGuard) -> Result<(), Status> {
        if sqe.cdw12.get() & FUA != 0 || !self.shared.write_cache.load(Ordering::Relaxed) {
            guard.release();
            return self.flush();
        }
        Ok(())
    }
}

/// A range of Dataset Management (figure 361).
#[derive(
    Clone, Copy, Debug, Default, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
)]
#[repr(C)]
struct Range {
    attributes: U32,
    blocks: U32,
    slba: U64,
}

/// The first `len` bytes of a buffer that grows as needed.
fn sized(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

fn read_error(error: io::Error) -> Status {
    log::warn!("The image cannot be read: {error}");
    Status::UNRECOVERED_READ_ERROR
}

fn write_fault(error: io::Error) -> Status {
    log::warn!("The image cannot be written: {error}");
    Status::WRITE_FAULT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_zeros_is_cut_where_the_file_system_may() {
        let pieces = |offset, len| Extent { offset, len }.pieces().collect::<Vec<_>>();
        assert_eq!(pieces(512, 1024), [(512, 1024)]);
        assert_eq!(pieces(PIECE, PIECE), [(PIECE, PIECE)]);
        let end = 2 * PIECE;
        assert_eq!(pieces(PIECE - 512, PIECE + 1536), [(PIECE - 512, 512), (PIECE, PIECE), (end, 1024)]);
    }
}
