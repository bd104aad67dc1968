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
    /// Scattered: pages are touched in a shuffled order, so that neighbours in a buffer are not neighbours in physical
    /// memory. Otherwise it asks for huge pages, which the kernel may or may not have; [`Self::physical_runs`] says
    /// what it got.
    ///
    /// # Errors
    /// If the kernel does not give the memory.
    pub fn new(count: usize, size: usize, scatter: bool) -> Result<Self> {
        let stride = size.next_multiple_of(PAGE);
        let mapped = (stride * count).next_multiple_of(HUGE_PAGE);
        let mapped = NonZeroUsize::new(mapped).context("Buffers of no bytes were asked for")?;
        // SAFETY: a fresh private anonymous mapping; the kernel chooses an address that nothing else uses.
        let start = unsafe {
            mmap_anonymous(None, mapped, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        };
        let start = start.with_context(|| format!("Cannot get {mapped} bytes for I/O buffers"))?;
        let buffers = Self { start: start.cast(), mapped, size, stride, count };
        let advice = if scatter { MmapAdvise::MADV_NOHUGEPAGE } else { MmapAdvise::MADV_HUGEPAGE };
        // SAFETY: the range is the mapping just made; this advice does not change its contents.
        // A kernel without huge pages refuses the advice, and then needs none.
        let _ = unsafe { madvise(start, mapped.get(), advice) };
        if scatter {
            buffers.touch_shuffled();
        }
        // SAFETY: the range is the mapping just made; locking does not change its contents.
        unsafe { mlock(start, mapped.get()) }.context("Cannot lock the I/O buffers in memory")?;
        Ok(buffers)
    }

    /// Gives each page its frame, in shuffled order (Fisher-Yates with a fixed seed: every run is the same).
    fn touch_shuffled(&self) {
        let mut order: Vec<usize> = (0..self.mapped.get() / PAGE).collect();
        let mut random = pattern::Random::new(1);
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last as u64 + 1) as usize);
        }
        for page in order {
            // SAFETY: the page is inside the mapping, which is writable and not yet shared with anybody.
            unsafe { self.start.add(page * PAGE).write_volatile(0) };
        }
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
        let map = File::open("/proc/self/pagemap").ok()?;
        let mut runs = 0_u64;
        for index in 0..self.count {
            let mut entries = vec![0; self.stride / PAGE * 8];
            map.read_exact_at(&mut entries, (self.pointer(index).as_ptr().addr() / PAGE * 8) as u64).ok()?;
            // Documentation/admin-guide/mm/pagemap.rst: bits 0-54 are the frame number.
            let frames: Vec<u64> = entries
                .chunks_exact(8)
                .map(|entry| entry.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)) & ((1 << 55) - 1))
                .collect();
            if frames.contains(&0) {
                return None;
            }
            runs += 1 + frames.windows(2).filter(|pair| pair[0] + 1 != pair[1]).count() as u64;
        }
        Some(runs as f64 / self.count as f64)
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, to which nothing refers any more: the engine ends with no I/O in flight.
        let _ = unsafe { munmap(self.start.cast(), self.mapped.get()) };
    }
}
