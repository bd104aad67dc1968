//! A command's data in the host's memory: PRP entries and SGL descriptors (sections 4.3 and 4.4).

use std::fs::File;

use zerocopy::little_endian::U64;
use zerocopy::{FromZeros, IntoBytes};

use super::spec::Status;
use crate::dma::{Dma, DmaError};
use viommu_trace::event::Access;

/// The most SGL descriptors of one command, so that even a chain of empty ones ends.
const DESCRIPTORS_MAX: usize = 8192;

/// A contiguous run of the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// Its address; `None` for an SGL bit bucket, which discards data.
    address: Option<u64>,
    len: u64,
}

/// The runs of one command, and the position of the next byte in them.
#[derive(Debug, Default)]
pub(super) struct Runs {
    runs: Vec<Run>,
    at: usize,
    /// The number of bytes used of the run at `at`.
    used: u64,
}

impl From<DmaError> for Status {
    /// The fault itself is reported where it happens.
    fn from(_: DmaError) -> Self {
        Status::DATA_TRANSFER_ERROR
    }
}

impl Runs {
    /// Sets the runs to the `len` bytes that two PRP entries describe. `page` is the memory page size in bytes.
    ///
    /// # Errors
    /// A PRP entry has a wrong offset, or a list cannot be read.
    pub fn set_prp(&mut self, dma: &mut Dma, page: u64, entries: [u64; 2], len: u64) -> Result<(), Status> {
        self.clear();
        let [first, second] = entries;
        if first % 4 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let in_first = (page - first % page).min(len);
        self.push(Some(first), in_first);
        let rest = len - in_first;
        if rest == 0 {
            return Ok(());
        }
        if rest <= page {
            return self.push_page(second, page, rest);
        }
        self.push_list(dma, page, second, rest)
    }

    /// Adds a page from a PRP list or PRP entry 2, which must have no offset.
    fn push_page(&mut self, address: u64, page: u64, len: u64) -> Result<(), Status> {
        if !address.is_multiple_of(page) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        self.push(Some(address), len);
        Ok(())
    }

    /// Adds the pages of a PRP list. A list ends at the end of the page that it begins in. If more pages follow, its
    /// last entry is the address of the next list.
    fn push_list(&mut self, dma: &mut Dma, page: u64, mut list: u64, mut rest: u64) -> Result<(), Status> {
        let mut entries = Vec::new();
        // Every list has an entry for a page, unless it begins at the last entry of a page and only leads to the next
        // list. More lists than pages are a loop of such lists.
        for _ in 0..=rest.div_ceil(page) {
            if !list.is_multiple_of(8) {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            let pages = rest.div_ceil(page);
            let fit = (page - list % page) / 8;
            entries.resize(pages.min(fit) as usize, U64::ZERO);
            dma.read(list, entries.as_mut_bytes())?;
            let next = if pages > fit { entries.pop() } else { None };
            for entry in &entries {
                let len = rest.min(page);
                self.push_page(entry.get(), page, len)?;
                rest -= len;
            }
            match next {
                Some(next) => list = next.get(),
                None => return Ok(()),
            }
        }
        Err(Status::PRP_OFFSET_INVALID)
    }

    /// Sets the runs to the `len` bytes that an SGL describes; it may describe more. `to_host` says that the command
    /// transfers data to the host, so that bit buckets discard data.
    ///
    /// # Errors
    /// The SGL is invalid, too short, or cannot be read.
    pub fn set_sgl(&mut self, dma: &mut Dma, first: [u64; 2], len: u64, to_host: bool) -> Result<(), Status> {
        self.clear();
        let mut rest = len;
        let mut next = match Descriptor::parse(first)? {
            Descriptor::Segment(segment) => Some(segment),
            Descriptor::Data { address, len } => {
                self.push_data(address, len, to_host, &mut rest)?;
                None
            }
        };
        let mut seen = 0;
        let mut raw = Vec::new();
        while let Some(segment) = next.take() {
            let count = segment.len as usize / 16;
            seen += count;
            if segment.len == 0 || segment.len % 16 != 0 {
                return Err(Status::INVALID_SGL_SEGMENT);
            }
            if seen > DESCRIPTORS_MAX {
                return Err(Status::INVALID_SGL_COUNT);
            }
            raw.clear();
            raw.resize(count, <[U64; 2]>::new_zeroed());
            dma.read(segment.address, raw.as_mut_bytes())?;
            for (index, words) in raw.iter().enumerate() {
                match Descriptor::parse(words.map(U64::get))? {
                    Descriptor::Data { address, len } => self.push_data(address, len, to_host, &mut rest)?,
                    // A segment descriptor must come last in its segment, and not in the last segment.
                    Descriptor::Segment(follow) if index + 1 == count && !segment.last => next = Some(follow),
                    Descriptor::Segment(_) => return Err(Status::INVALID_SGL_SEGMENT),
                }
            }
            if next.is_none() && !segment.last {
                return Err(Status::INVALID_SGL_SEGMENT);
            }
        }
        if rest == 0 { Ok(()) } else { Err(Status::DATA_SGL_LENGTH_INVALID) }
    }

    fn push_data(&mut self, address: Option<u64>, len: u32, to_host: bool, rest: &mut u64) -> Result<(), Status> {
        if address.is_none() && !to_host {
            // For data from the host, a bit bucket's length is ignored (section 4.4).
            return Ok(());
        }
        let len = u64::from(len).min(*rest);
        if len > 0 {
            self.push(address, len);
            *rest -= len;
        }
        Ok(())
    }

    fn push(&mut self, address: Option<u64>, len: u64) {
        if let (Some(last), Some(address)) = (self.runs.last_mut(), address)
            && last.address.and_then(|from| from.checked_add(last.len)) == Some(address)
        {
            last.len += len;
            return;
        }
        self.runs.push(Run { address, len });
    }

    fn clear(&mut self) {
        self.runs.clear();
        self.at = 0;
        self.used = 0;
    }

    /// Moves the next `len` bytes between memory and a file: see [`Dma::transfer_direct`]. Returns whether it was done.
    /// If not, the bytes are still the next ones.
    pub fn transfer_direct(
        &mut self,
        dma: &mut Dma,
        len: usize,
        access: Access,
        (file, flags): (&File, libc::c_int),
        offset: u64,
    ) -> bool {
        let before = (self.at, self.used);
        let (mut ranges, mut rest) = (Vec::with_capacity(self.runs.len()), len);
        // Only up to a bit bucket, which is not memory.
        while let Some((Some(address), now)) = self.take(rest) {
            ranges.push((address, now));
            rest -= now;
        }
        let done = rest == 0 && dma.transfer_direct(&ranges, access, file, offset, flags);
        if !done {
            (self.at, self.used) = before;
        }
        done
    }

    /// Writes the next bytes to the host's memory.
    pub fn write(&mut self, dma: &mut Dma, mut data: &[u8]) -> Result<(), Status> {
        while let Some((address, len)) = self.take(data.len()) {
            let (now, later) = data.split_at(len);
            if let Some(address) = address {
                dma.write(address, now)?;
            }
            data = later;
        }
        if data.is_empty() { Ok(()) } else { Err(Status::INTERNAL_ERROR) }
    }

    /// Reads the next bytes from the host's memory.
    pub fn read(&mut self, dma: &mut Dma, mut data: &mut [u8]) -> Result<(), Status> {
        while let Some((address, len)) = self.take(data.len()) {
            let (now, later) = data.split_at_mut(len);
            if let Some(address) = address {
                dma.read(address, now)?;
            }
            data = later;
        }
        if data.is_empty() { Ok(()) } else { Err(Status::INTERNAL_ERROR) }
    }

    /// The next contiguous piece of at most `want` bytes.
    fn take(&mut self, want: usize) -> Option<(Option<u64>, usize)> {
        let run = self.runs.get(self.at).filter(|_| want > 0)?;
        let len = (run.len - self.used).min(want as u64);
        let address = run.address.map(|address| address.wrapping_add(self.used));
        self.used += len;
        if self.used == run.len {
            self.at += 1;
            self.used = 0;
        }
        Some((address, len as usize))
    }
}

/// An SGL descriptor (figure 112).
enum Descriptor {
    /// A data block; without an address, a bit bucket.
    Data {
        address: Option<u64>,
        len: u32,
    },
    Segment(Segment),
}

struct Segment {
    address: u64,
    len: u32,
    last: bool,
}

impl Descriptor {
    fn parse([address, rest]: [u64; 2]) -> Result<Descriptor, Status> {
        let len = rest as u32;
        match (rest >> 56) as u8 {
            0x00 => Ok(Descriptor::Data { address: Some(address), len }),
            0x10 => Ok(Descriptor::Data { address: None, len }),
            0x20 => Ok(Descriptor::Segment(Segment { address, len, last: false })),
            0x30 => Ok(Descriptor::Segment(Segment { address, len, last: true })),
            _ => Err(Status::SGL_TYPE_INVALID),
        }
    }
}

#[cfg(test)]
mod tests;
