//! Memory for direct I/O, physically contiguous or scattered, as the test wants it.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, munmap};

use crate::pattern;

/// The CPU's page size, in bytes.
pub const PAGE: usize = 4096;
/// The size of a huge page, in bytes.
const HUGE_PAGE: usize = 2 << 20;

/// `count` buffers of `size` bytes each, page-aligned, locked in memory.
pub struct Buffers {
    start: NonNull<u8>,
    mapped: NonZeroUsize,
    size: usize,
    stride: usize,
    count: usize,
}

impl Buffers {
    /// Makes buffers of any whole number of bytes; each starts on a page.
    ///
    /// Scattered: neighbours in a buffer are not neighbours in physical memory. Otherwise it asks for huge pages, which
    /// the kernel may or may not have; [`Self::physical_runs`] says what it got.
    ///
    /// # Errors
    /// If the kernel does not give the memory, or none that is scattered.
    pub fn new(count: usize, size: usize, scatter: bool) -> Result<Self> {
        let advice = if scatter { MmapAdvise::MADV_NOHUGEPAGE } else { MmapAdvise::MADV_HUGEPAGE };
        let buffers = Self::untouched(count, size, advice)?;
        if scatter {
            buffers.touch_shuffled(PAGE);
            buffers.separate_neighbours()?;
        }
        buffers.locked()
    }

    /// Makes one buffer that consists of physically contiguous runs of `run` bytes, if the kernel has free memory in longer
    /// ones.
    ///
    /// # Errors
    /// If the kernel does not give the memory.
    pub fn of_runs(size: usize, run: usize) -> Result<Self> {
        let buffers = Self::untouched(1, size, MmapAdvise::MADV_NOHUGEPAGE)?;
        buffers.touch_shuffled(run.max(1).next_multiple_of(PAGE));
        buffers.locked()
    }

    fn locked(self) -> Result<Self> {
        // SAFETY: the range is this mapping; locking does not change its contents.
        unsafe { mlock(self.start.cast(), self.mapped.get()) }.context("Cannot lock the I/O buffers in memory")?;
        Ok(self)
    }

    /// Buffers whose pages have no frames yet.
    fn untouched(count: usize, size: usize, advice: MmapAdvise) -> Result<Self> {
        let stride = size.next_multiple_of(PAGE);
        let mapped = (stride * count).next_multiple_of(HUGE_PAGE);
        let mapped = NonZeroUsize::new(mapped).context("Buffers of no bytes were asked for")?;
        // SAFETY: a fresh private anonymous mapping; the kernel chooses an address that nothing else uses.
        let start = unsafe {
            mmap_anonymous(None, mapped, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        };
        let start = start.with_context(|| format!("Cannot get {mapped} bytes for I/O buffers"))?;
        // SAFETY: the range is the mapping just made; this advice does not change its contents.
        // A kernel without huge pages refuses the advice, and then needs none.
        let _ = unsafe { madvise(start, mapped.get(), advice) };
        Ok(Self { start: start.cast(), mapped, size, stride, count })
    }

    /// Gives each page its frame: pages in order in runs of `run` bytes, and these in shuffled order (Fisher-Yates with a
    /// fixed seed, which is the same every time).
    fn touch_shuffled(&self, run: usize) {
        let (pages, run) = (self.mapped.get() / PAGE, run / PAGE);
        let mut order: Vec<usize> = (0..pages).step_by(run).collect();
        let mut random = pattern::Random::new(1);
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last as u64 + 1) as usize);
        }
        order.into_iter().flat_map(|start| start..(start + run).min(pages)).for_each(|page| self.touch(page));
    }

    /// Gives a page of the mapping its frame.
    fn touch(&self, page: usize) {
        assert!(page < self.mapped.get() / PAGE, "page {page}");
        // SAFETY: the page is inside the mapping, which is writable and not yet shared with anybody.
        unsafe { self.start.add(page * PAGE).write_volatile(0) };
    }

    /// Gives another frame to each page whose frame follows that of the page before it: by chance some do.
    fn separate_neighbours(&self) -> Result<()> {
        // The kernel hands out first what was freed last, so a spare page takes each frame that a page gives up.
        let spare = Self::untouched(self.count, self.size, MmapAdvise::MADV_NOHUGEPAGE)?;
        let mut spares = 0..self.mapped.get() / PAGE;
        loop {
            let Some(neighbours) = self.neighbours() else { return Ok(()) };
            if neighbours.is_empty() {
                return Ok(());
            }
            for page in neighbours {
                let spare_page = spares.next().context("The kernel gives no memory that is scattered")?;
                // SAFETY: the page is inside the mapping, and nothing that matters has been written to it.
                unsafe { madvise(self.start.add(page * PAGE).cast(), PAGE, MmapAdvise::MADV_DONTNEED) }
                    .context("Cannot give up a page")?;
                spare.touch(spare_page);
                self.touch(page);
            }
        }
    }

    /// The pages of the mapping whose frames follow those of the pages before them in the same buffer.
    fn neighbours(&self) -> Option<Vec<usize>> {
        let mut found = Vec::new();
        for index in 0..self.count {
            let first = index * self.stride / PAGE;
            let frames = self.frames(index)?;
            let follows = |at: &usize| frames[at - 1] + 1 == frames[*at];
            found.extend((1..frames.len()).filter(follows).map(|at| first + at));
        }
        Some(found)
    }

    /// How many buffers there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Where buffer `index` starts, for the kernel's use.
    ///
    /// # Panics
    /// If there is no such buffer.
    pub fn pointer(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.count, "buffer {index} of {}", self.count);
        // SAFETY: index < count, so the offset is inside the mapping.
        unsafe { self.start.add(index * self.stride) }
    }

    /// The contents of buffer `index`.
    ///
    /// # Safety
    /// No I/O that uses this buffer may be in flight while the slice lives.
    pub unsafe fn contents(&mut self, index: usize) -> &mut [u8] {
        let start = self.pointer(index);
        // SAFETY: the range is inside the mapping, which `self` owns; the caller makes sure that the kernel does not
        // access it.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.size) }
    }

    /// How many physically contiguous runs a buffer consists of, on average; `None` if the kernel does not say
    /// (`/proc/self/pagemap` shows frame numbers to root only).
    pub fn physical_runs(&self) -> Option<f64> {
        let pages = self.count * self.stride / PAGE;
        Some((pages - self.neighbours()?.len()) as f64 / self.count as f64)
    }

    /// The frame numbers of a buffer's pages.
    fn frames(&self, index: usize) -> Option<Vec<u64>> {
        let map = File::open("/proc/self/pagemap").ok()?;
        let mut entries = vec![0; self.stride / PAGE * 8];
        map.read_exact_at(&mut entries, (self.pointer(index).as_ptr().addr() / PAGE * 8) as u64).ok()?;
        // Documentation/admin-guide/mm/pagemap.rst: bits 0-54 are the frame number.
        let frames: Vec<u64> = entries
            .chunks_exact(8)
            .map(|entry| entry.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)) & ((1 << 55) - 1))
            .collect();
        (!frames.contains(&0)).then_some(frames)
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, to which nothing refers any more: the engine ends with no I/O in flight.
        let _ = unsafe { munmap(self.start.cast(), self.mapped.get()) };
    }
}
