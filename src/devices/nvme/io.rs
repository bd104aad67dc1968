//! Executes the commands of the NVM command set (section 6).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::operation::{Extent, Operation};
use super::pointer::Runs;
use super::shared::SharedController;
use super::spec::{Cc, Sqe, Status, nvm};
use crate::devices::kit::ThreadContext;
use crate::dma::Dma;
use viommu_trace::event::Access;
use viommu_wire::nvme::DataPointer;

/// What the trace says of a command in addition to its submission queue entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub pointer: DataPointer,
    /// The number of bytes that the command is about.
    pub len: u32,
}

impl Default for Moved {
    fn default() -> Self {
        Moved { pointer: DataPointer::None, len: 0 }
    }
}

/// Executes I/O commands, one after the other.
pub(super) struct IoExecutor {
    shared: Arc<SharedController>,
    runs: Runs,
    buffer: Vec<u8>,
    host_data: Vec<u8>,
}

impl IoExecutor {
    pub fn new(shared: Arc<SharedController>) -> Self {
        IoExecutor { shared, runs: Runs::default(), buffer: Vec::new(), host_data: Vec::new() }
    }

    /// Executes a command. Releases the queue that the thread polls before anything that may take long.
    pub fn execute(&mut self, thread: &mut ThreadContext, sqe: &Sqe, moved: &mut Moved) -> Status {
        if !matches!(sqe.opcode, nvm::READ | nvm::WRITE) {
            thread.poll.release();
        }
        let result = self.dispatch(thread, sqe, moved);
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

    /// Must be called before each chunk of an extent. Polls the IOMMU's request queue, so that a guest that maps its
    /// next transfer meanwhile waits for one chunk at most. The caller of [`IoExecutor::execute`] polls after the last
    /// one.
    fn between(&self, thread: &mut ThreadContext, extent: Extent, chunk: u64) -> Result<(), Status> {
        if chunk != extent.offset {
            thread.poll.poll();
        }
        check_stop(thread)
    }

    fn dispatch(&mut self, thread: &mut ThreadContext, sqe: &Sqe, moved: &mut Moved) -> Result<(), Status> {
        let operation = Operation::decode(sqe, &self.shared.disk, &mut moved.len)?;
        match operation {
            Operation::Flush => self.flush(),
            Operation::Read(extent) => {
                self.point(thread, sqe, moved, true)?;
                self.read(thread, extent)
            }
            Operation::Write { extent, force_unit_access } => {
                self.point(thread, sqe, moved, false)?;
                self.write(thread, extent)?;
                self.durable(thread, force_unit_access)
            }
            Operation::Compare(extent) => {
                self.point(thread, sqe, moved, false)?;
                self.compare(thread, extent)
            }
            Operation::WriteZeroes { extent, deallocate, force_unit_access } => {
                self.zero(thread, extent, deallocate)?;
                self.durable(thread, force_unit_access)
            }
            Operation::DatasetManagement { ranges, deallocate } => {
                self.point(thread, sqe, moved, false)?;
                self.dataset_management(thread, ranges, deallocate)
            }
        }
    }

    fn flush(&self) -> Result<(), Status> {
        self.shared.disk.flush().map_err(write_fault)
    }

    fn read(&mut self, thread: &mut ThreadContext, extent: Extent) -> Result<(), Status> {
        for (offset, len) in extent.chunks() {
            self.between(thread, extent, offset)?;
            if !self.transfer_direct(&mut thread.dma, Access::Write, offset, len) {
                thread.poll.release();
                let data = sized(&mut self.buffer, len);
                self.shared.disk.read(data, offset).map_err(read_error)?;
                self.runs.write(&mut thread.dma, data)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, thread: &mut ThreadContext, extent: Extent) -> Result<(), Status> {
        for (offset, len) in extent.chunks() {
            self.between(thread, extent, offset)?;
            if !self.transfer_direct(&mut thread.dma, Access::Read, offset, len) {
                thread.poll.release();
                let data = sized(&mut self.buffer, len);
                self.runs.read(&mut thread.dma, data)?;
                self.shared.disk.write(data, offset).map_err(write_fault)?;
            }
        }
        Ok(())
    }

    /// Moves the next `len` bytes between the host's memory and the image directly, if that is possible without
    /// waiting. `access` is the direction of the access to the host's memory. Returns whether it was done.
    fn transfer_direct(&mut self, dma: &mut Dma, access: Access, offset: u64, len: usize) -> bool {
        let Some(file) = self.shared.disk.without_waiting(access) else { return false };
        self.runs.transfer_direct(dma, len, access, file, offset)
    }

    fn compare(&mut self, thread: &mut ThreadContext, extent: Extent) -> Result<(), Status> {
        for (offset, len) in extent.chunks() {
            check_stop(thread)?;
            let data = sized(&mut self.buffer, len);
            self.shared.disk.read(data, offset).map_err(read_error)?;
            let host_data = sized(&mut self.host_data, len);
            self.runs.read(&mut thread.dma, host_data)?;
            if data != host_data {
                return Err(Status::COMPARE_FAILURE);
            }
        }
        Ok(())
    }

    fn zero(&self, thread: &ThreadContext, extent: Extent, deallocate: bool) -> Result<(), Status> {
        for (offset, len) in extent.pieces() {
            check_stop(thread)?;
            self.shared.disk.zero(offset, len, deallocate).map_err(write_fault)?;
        }
        Ok(())
    }

    fn dataset_management(&mut self, thread: &mut ThreadContext, count: usize, deallocate: bool) -> Result<(), Status> {
        let mut ranges = [Range::default(); 256];
        let ranges = &mut ranges[..count];
        self.runs.read(&mut thread.dma, ranges.as_mut_bytes())?;
        if !deallocate {
            // The other attributes are hints, which are not used.
            return Ok(());
        }
        let extent = |range: &Range| Extent::new(&self.shared.disk, range.slba.get(), range.blocks.get().into());
        let extents = ranges.iter().map(extent).collect::<Result<Vec<Extent>, Status>>()?;
        if !self.shared.disk.punches() {
            // Deallocation is advice. Without holes there is nothing to gain from writing zeros.
            return Ok(());
        }
        for extent in extents.iter().filter(|extent| extent.len > 0) {
            self.zero(thread, *extent, true)?;
        }
        Ok(())
    }

    /// Finds the host's memory for the `moved.len` bytes of the command.
    fn point(&mut self, thread: &mut ThreadContext, sqe: &Sqe, moved: &mut Moved, to_host: bool) -> Result<(), Status> {
        let pointer = sqe.data.map(U64::get);
        match sqe.psdt() {
            0 => {
                moved.pointer = DataPointer::Prp;
                let page = Cc(self.shared.cc.load(Ordering::Relaxed)).page_size();
                self.runs.set_prp(&mut thread.dma, page, pointer, u64::from(moved.len))
            }
            1 | 2 => {
                moved.pointer = DataPointer::Sgl;
                self.runs.set_sgl(&mut thread.dma, pointer, u64::from(moved.len), to_host)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Makes a write durable if the command or the feature asks for it.
    fn durable(&self, thread: &mut ThreadContext, force_unit_access: bool) -> Result<(), Status> {
        if force_unit_access || !self.shared.write_cache.load(Ordering::Relaxed) {
            thread.poll.release();
            return self.flush();
        }
        Ok(())
    }
}

/// Checks for a stop. Must be called before each part of a command, since a stop waits for the command in execution.
fn check_stop(thread: &ThreadContext) -> Result<(), Status> {
    if thread.is_stopped() { Err(Status::ABORTED_SQ_DELETION) } else { Ok(()) }
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
