//! The one way to guest memory for device models: translate, copy, trace, fault.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::iommu::{Endpoint, Fault, Iommu, Refused, Translation, grace};
use crate::memory::{Memory, NoAccess, Piece, Regions};
use viommu_trace::event::{Access, Route};
use viommu_trace::{Event, Tracer};

/// The most bytes that are copied in one read-side section. An UNMAP then waits for microseconds and not for a whole
/// transfer.
pub const COPY_MAX: u64 = 128 << 10;

/// Why an access failed. The bytes before the address in the error were accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The IOMMU refused; the fault is reported already.
    #[error("the IOMMU refused the {access:?} of {address:#x}")]
    Fault {
        /// The first address refused.
        address: u64,
        /// The direction.
        access: Access,
    },
    /// The address was translated, but the guest has no memory there.
    #[error("no guest memory at {gpa:#x}, to which {iova:#x} leads")]
    NoMemory {
        /// The I/O virtual address.
        iova: u64,
        /// The guest-physical address.
        gpa: u64,
    },
    /// The driver has not set Bus Master Enable in the PCI command register.
    #[error("bus mastering is off")]
    BusMasterOff,
}

/// Bytes that an endpoint moved through its [`DmaContext`], all handles together.
#[derive(Debug, Default)]
pub struct DmaCounters {
    /// Bytes read from guest memory through mappings.
    pub read: AtomicU64,
    /// Bytes written to guest memory through mappings.
    pub written: AtomicU64,
    /// Bytes read and written in bypass, untranslated: firmware's, for one.
    pub bypassed: AtomicU64,
    /// Accesses that the IOMMU refused.
    pub faults: AtomicU64,
}

/// An endpoint's access to memory; each thread opens a [`Dma`] of its own.
#[derive(Clone)]
pub struct DmaContext {
    iommu: Arc<Iommu>,
    endpoint: Arc<Endpoint>,
    memory: Memory,
    bus_master: Arc<AtomicBool>,
    counters: Arc<DmaCounters>,
    tracer: Tracer,
}

impl DmaContext {
    /// The access of the endpoint `id` to `memory`. Bus mastering is off, unless another context of the endpoint set
    /// it.
    pub fn new(iommu: &Arc<Iommu>, id: u32, memory: Memory, tracer: Tracer) -> Self {
        let endpoint = iommu.endpoint(id);
        let bus_master = endpoint.bus_master().clone();
        DmaContext { iommu: iommu.clone(), endpoint, memory, bus_master, counters: Arc::default(), tracer }
    }

    /// The endpoint id.
    pub fn endpoint(&self) -> u32 {
        self.endpoint.id()
    }

    /// Whether accesses are possible, as the last [`DmaContext::set_bus_master`] of any context of the endpoint said. A
    /// reset of the machine turns it off.
    pub fn is_bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }

    /// Follows the Bus Master Enable bit of the PCI command register.
    pub fn set_bus_master(&self, enabled: bool) {
        self.bus_master.store(enabled, Ordering::Release);
    }

    /// The bytes that went through so far, and the faults.
    pub fn counters(&self) -> &Arc<DmaCounters> {
        &self.counters
    }

    /// A handle for one thread.
    pub fn open(&self) -> Dma {
        Dma { context: self.clone(), reader: self.iommu.reader() }
    }
}

/// One thread's access to memory.
pub struct Dma {
    context: DmaContext,
    reader: grace::Reader,
}

impl DmaContext {
    /// The runs of an access to `len` bytes from `iova` on.
    fn runs<'a>(&'a self, guard: &'a grace::Guard<'a>, iova: u64, len: u64, access: Access) -> Runs<'a> {
        Runs { endpoint: &self.endpoint, guard, access, iova, left: len, ahead: None }
    }

    /// The runs of several ranges; `None` if one of them leads to anything but memory.
    fn runs_in_memory(&self, guard: &grace::Guard<'_>, ranges: &[(u64, usize)], access: Access) -> Option<Vec<Run>> {
        let mut runs = Vec::with_capacity(ranges.len());
        for &(iova, len) in ranges {
            for run in self.runs(guard, iova, len as u64, access) {
                runs.push(run.ok().filter(|run| run.found.route != Route::Msi)?);
            }
        }
        Some(runs)
    }
}

impl Dma {
    /// Reads `data.len()` bytes of guest memory from `iova` on.
    pub fn read(&mut self, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < data.len() {
            let (iova, rest) = (iova.wrapping_add(done as u64), &mut data[done..]);
            done +=
                self.access_run(iova, Access::Read, rest.len(), |memory, gpa, len| memory.read(gpa, &mut rest[..len]))?;
        }
        Ok(())
    }

    /// Writes `data` to guest memory from `iova` on.
    pub fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < data.len() {
            let (iova, rest) = (iova.wrapping_add(done as u64), &data[done..]);
            done +=
                self.access_run(iova, Access::Write, rest.len(), |memory, gpa, len| memory.write(gpa, &rest[..len]))?;
        }
        Ok(())
    }

    /// Reads a little-endian 32-bit word that the guest changes at any time, such as a shadow doorbell. A read that
    /// finds `known` is neither traced nor counted: a device that polls often would fill the trace with accesses that
    /// say nothing. Faults are always reported.
    pub fn poll(&mut self, iova: u64, known: u32) -> Result<u32, DmaError> {
        let mut bytes = [0; 4];
        let (run, result) =
            self.access(iova, Access::Read, bytes.len(), |memory, gpa, len| memory.read(gpa, &mut bytes[..len]))?;
        let value = u32::from_le_bytes(bytes);
        if run.len as usize == bytes.len() && result.is_ok() && value == known {
            return Ok(value);
        }
        let len = self.record(&run, Access::Read, result)?;
        if len < bytes.len() {
            // It crosses a page.
            self.read(iova.wrapping_add(len as u64), &mut bytes[len..])?;
        }
        Ok(u32::from_le_bytes(bytes))
    }

    /// Moves data between a file, from `offset` on, and guest memory, without a copy in between. `ranges` are the
    /// places in guest memory, as I/O virtual addresses and lengths; together they have at most [`COPY_MAX`] bytes.
    /// Reads and writes of the file must not wait; `flags`, those of preadv2(2), can see to that.
    ///
    /// `false` if not all data was moved, or not all ranges lead to memory. Nothing is then traced, counted or
    /// reported; the caller is to use [`Dma::read`] or [`Dma::write`], which do the transfer or find out why it is
    /// impossible.
    pub fn transfer_direct(
        &mut self,
        ranges: &[(u64, usize)],
        access: Access,
        file: &File,
        offset: u64,
        flags: libc::c_int,
    ) -> bool {
        let Dma { context, reader } = self;
        let memory = context.memory.load();
        let guard = reader.enter();
        if !context.bus_master.load(Ordering::Acquire) {
            return false;
        }
        let Some(runs) = context.runs_in_memory(&guard, ranges, access) else { return false };
        let Some(iovecs) = iovecs(&memory, &runs, access) else { return false };
        let (fd, count, at) = (file.as_raw_fd(), iovecs.len() as libc::c_int, offset as libc::off_t);
        // SAFETY: `iovecs` lie in mappings of guest memory that `memory` keeps alive until after the call, writable if
        // they are to be written. Others may access that memory at the same time, but no reference to it exists. If the
        // kernel finds a page of a mapping missing, the call fails.
        let moved = unsafe {
            match access {
                Access::Write => libc::preadv2(fd, iovecs.as_ptr(), count, at, flags),
                Access::Read => libc::pwritev2(fd, iovecs.as_ptr(), count, at, flags),
            }
        };
        drop(guard);
        // Another thread may have found a page missing, and the handler may have put another one in its place.
        let intact = runs.iter().all(|run| memory.is_intact(run.found.gpa, run.len));
        let wanted: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        intact
            && usize::try_from(moved) == Ok(wanted)
            && runs.iter().all(|run| self.record(run, access, Ok(())).is_ok())
    }

    /// Does and records the first contiguous run of an access of `want` bytes. Returns its length.
    fn access_run(
        &mut self,
        iova: u64,
        access: Access,
        want: usize,
        copy: impl FnOnce(&Regions, u64, usize) -> Result<(), NoAccess>,
    ) -> Result<usize, DmaError> {
        let (run, result) = self.access(iova, access, want, copy)?;
        self.record(&run, access, result)
    }

    /// Translates and copies the first contiguous run of an access of `want` bytes, which are not 0. Also returns
    /// whether the run was memory.
    fn access(
        &mut self,
        iova: u64,
        access: Access,
        want: usize,
        copy: impl FnOnce(&Regions, u64, usize) -> Result<(), NoAccess>,
    ) -> Result<(Run, Result<(), NoAccess>), DmaError> {
        let context = &self.context;
        let memory = context.memory.load();
        let guard = self.reader.enter();
        if !context.bus_master.load(Ordering::Acquire) {
            return Err(DmaError::BusMasterOff);
        }
        let run = match context.runs(&guard, iova, COPY_MAX.min(want as u64), access).next_run() {
            Ok(run) => run,
            Err(refused) => {
                drop(guard);
                context.counters.faults.fetch_add(1, Ordering::Relaxed);
                context.iommu.report(Fault {
                    endpoint: context.endpoint.id(),
                    reason: refused.reason,
                    access,
                    address: iova,
                    domain: refused.domain,
                });
                return Err(DmaError::Fault { address: iova, access });
            }
        };
        let result = match run.found.route {
            Route::Msi => Err(NoAccess),
            Route::Mapped | Route::Bypass => copy(&memory, run.found.gpa, run.len as usize),
        };
        drop(guard);
        Ok((run, result))
    }

    /// Traces and counts a run, and returns its length. `result` is what became of the access.
    fn record(&self, run: &Run, access: Access, result: Result<(), NoAccess>) -> Result<usize, DmaError> {
        let &Run { iova, found, len } = run;
        let context = &self.context;
        context.tracer.emit(Event::Dma {
            endpoint: context.endpoint.id(),
            access,
            route: found.route,
            failed: result.is_err(),
            iova,
            gpa: found.gpa,
            len: len as u32,
            domain: found.domain,
            tag: found.tag,
        });
        if result.is_err() {
            context.memory.explain(found.gpa, len);
            return Err(DmaError::NoMemory { iova, gpa: found.gpa });
        }
        let moved = match (found.route, access) {
            (Route::Mapped, Access::Read) => &context.counters.read,
            (Route::Mapped, Access::Write) => &context.counters.written,
            (Route::Bypass | Route::Msi, _) => &context.counters.bypassed,
        };
        moved.fetch_add(len, Ordering::Relaxed);
        Ok(len as usize)
    }
}

/// A part of an access that is contiguous in guest memory, and of one mapping's tag.
struct Run {
    iova: u64,
    found: Translation,
    len: u64,
}

/// The runs of one access, in order. They end with the first address that is refused.
struct Runs<'a> {
    endpoint: &'a Endpoint,
    guard: &'a grace::Guard<'a>,
    access: Access,
    /// Where the next run begins, and how many bytes are left from there on.
    iova: u64,
    left: u64,
    /// The translation of `iova`, if the search for the last run's end has found it.
    ahead: Option<Translation>,
}

impl Runs<'_> {
    /// The run at `iova`, of which at least a byte must be left.
    fn next_run(&mut self) -> Result<Run, Refused> {
        let iova = self.iova;
        let found = match self.ahead.take() {
            Some(found) => found,
            None => self.endpoint.translate(self.guard, iova, self.access).inspect_err(|_| self.left = 0)?,
        };
        let mut len = found.len.min(self.left);
        while len < self.left {
            match self.endpoint.translate(self.guard, iova.wrapping_add(len), self.access) {
                Ok(next) if continues(&found, len, &next) => len = len.saturating_add(next.len).min(self.left),
                other => {
                    self.ahead = other.ok();
                    break;
                }
            }
        }
        self.iova = iova.wrapping_add(len);
        self.left -= len;
        Ok(Run { iova, found, len })
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run, Refused>;

    fn next(&mut self) -> Option<Self::Item> {
        (self.left > 0).then(|| self.next_run())
    }
}

/// Whether the `len` bytes at `found` and those at `next` are one run: the latter follow the former in guest memory.
fn continues(found: &Translation, len: u64, next: &Translation) -> bool {
    next.gpa == found.gpa.wrapping_add(len) && next.tag == found.tag && next.route == found.route
}

/// The places of runs in this process's memory. `None` if a part is not mapped here, is no memory, or may not be
/// accessed in this way.
fn iovecs(memory: &Regions, runs: &[Run], access: Access) -> Option<Vec<libc::iovec>> {
    let mut iovecs = Vec::with_capacity(runs.len());
    for run in runs {
        let push = |piece: Piece<'_>| {
            let Piece::Mapped(slice) = piece else { return Err(NoAccess) };
            iovecs.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            Ok(())
        };
        memory.each(run.found.gpa, run.len, access == Access::Write, push).ok()?;
    }
    Some(iovecs)
}
