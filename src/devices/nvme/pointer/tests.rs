use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::dma::DmaContext;
use crate::iommu::{EndpointSettings, Iommu, Settings};
use crate::memory::{Memory, MemoryMap};
use viommu_trace::Tracer;

const PAGE: u64 = 4096;
const PAGES: u64 = 64;

/// Memory of [`PAGES`] pages from address 0 on, and a DMA access to it in bypass.
fn guest() -> (Arc<GuestMemoryMmap>, Dma) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGE * PAGES).unwrap();
    let mut map = MemoryMap::new(Memory::default());
    map.map(0, PAGE * PAGES, true, Some((file.try_clone().unwrap(), 0))).unwrap();
    let range = (GuestAddress(0), (PAGE * PAGES) as usize, Some(FileOffset::new(file, 0)));
    let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap());
    let endpoints = vec![EndpointSettings { id: 1, reserved: Vec::new() }];
    let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
    let dma = DmaContext::new(&iommu, 1, map.memory().clone(), Tracer::default());
    dma.set_bus_master(true);
    let dma = dma.open();
    (memory, dma)
}

fn store(memory: &GuestMemoryMmap, at: u64, words: &[u64]) {
    for (at, word) in (at..).step_by(8).zip(words) {
        memory.write_slice(&word.to_le_bytes(), GuestAddress(at)).unwrap();
    }
}

fn runs(runs: &Runs) -> Vec<(Option<u64>, u64)> {
    runs.runs.iter().map(|run| (run.address, run.len)).collect()
}

/// The address of every byte that two PRP entries describe, found page by page as the specification says; `None` if an
/// entry has a forbidden offset.
fn naive(memory: &GuestMemoryMmap, first: u64, second: u64, len: u64) -> Option<Vec<u64>> {
    let load = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    let mut bytes = Vec::new();
    let mut page = first;
    let mut list: Option<u64> = None;
    if !first.is_multiple_of(4) {
        return None;
    }
    loop {
        let until = (page / PAGE + 1) * PAGE;
        bytes.extend((page..until).take((len - bytes.len() as u64) as usize));
        let rest = len - bytes.len() as u64;
        if rest == 0 {
            return Some(bytes);
        }
        page = match &mut list {
            None if rest <= PAGE => second,
            None => {
                if !second.is_multiple_of(8) {
                    return None;
                }
                let mut at = second;
                if at % PAGE == PAGE - 8 {
                    at = load(at);
                    if !at.is_multiple_of(8) {
                        return None;
                    }
                }
                list = Some(at + 8);
                load(at)
            }
            Some(at) => {
                if *at % PAGE == PAGE - 8 && rest > PAGE {
                    *at = load(*at);
                    if *at % 8 != 0 {
                        return None;
                    }
                }
                let entry = load(*at);
                *at += 8;
                entry
            }
        };
        if !page.is_multiple_of(PAGE) {
            return None;
        }
    }
}

proptest! {
    /// Pages are anywhere, and some have an offset. Lists begin near the end of a page, so that they chain.
    #[test]
    fn prp_agrees_with_a_naive_walk(
        first in 0..PAGE * 8,
        len in 1..PAGE * 20,
        list_at in 500..512u64,
        chain_at in 490..510u64,
        entries in prop::collection::vec((0..PAGES - 4, prop::bool::weighted(0.01)), 1024),
    ) {
        let (memory, mut dma) = guest();
        let entries: Vec<u64> = entries.iter().map(|(page, odd)| page * PAGE + if *odd { 16 } else { 0 }).collect();
        // There are two pages of lists at the end of memory. The last entry of the first leads into the second.
        let (list, chain) = ((PAGES - 3) * PAGE, (PAGES - 2) * PAGE);
        store(&memory, list, &entries);
        store(&memory, list + PAGE - 8, &[chain + 8 * chain_at]);
        store(&memory, chain + PAGE - 8, &[chain]);
        let first = first & !3;
        let second = if len + first % PAGE <= 2 * PAGE { entries[0] } else { list + 8 * list_at };
        let mut found = Runs::default();
        let result = found.set_prp(&mut dma, PAGE, [first, second], len);
        match naive(&memory, first, second, len) {
            None => prop_assert_eq!(result, Err(Status::PRP_OFFSET_INVALID)),
            Some(bytes) => {
                prop_assert_eq!(result, Ok(()));
                let flat: Vec<u64> =
                    runs(&found).into_iter().flat_map(|(at, len)| (0..len).map(move |i| at.unwrap() + i)).collect();
                prop_assert_eq!(flat, bytes);
            }
        }
    }

    /// Whatever is in memory, both walks end without a panic, and with as many bytes as asked for.
    #[test]
    fn any_pointer_ends(words in prop::collection::vec(any::<u64>(), 64), data in any::<[u64; 2]>(), len in 1..1u64 << 23) {
        let (memory, mut dma) = guest();
        let words: Vec<u64> = words.iter().map(|word| word & 0x3000_0000_0003_fff8).collect();
        store(&memory, 0, &words);
        for mask in [u64::MAX, 0x3000_0000_0003_fff8] {
            let pointer = data.map(|word| word & mask);
            let mut found = Runs::default();
            if found.set_prp(&mut dma, PAGE, pointer, len).is_ok() {
                prop_assert_eq!(found.runs.iter().map(|run| run.len).sum::<u64>(), len);
            }
            if found.set_sgl(&mut dma, pointer, len, true).is_ok() {
                prop_assert_eq!(found.runs.iter().map(|run| run.len).sum::<u64>(), len);
            }
        }
    }
}

#[test]
fn prp_lists_that_lead_to_themselves_end() {
    let (memory, mut dma) = guest();
    let last = 3 * PAGE - 8;
    store(&memory, last, &[last]);
    let result = Runs::default().set_prp(&mut dma, PAGE, [0, last], 1 << 20);
    assert_eq!(result, Err(Status::PRP_OFFSET_INVALID));
}

#[test]
fn prp_list_outside_memory_is_a_transfer_error() {
    let (_memory, mut dma) = guest();
    let result = Runs::default().set_prp(&mut dma, PAGE, [0, PAGES * PAGE], 1 << 20);
    assert_eq!(result, Err(Status::DATA_TRANSFER_ERROR));
}

#[test]
fn pages_in_a_row_are_one_run() {
    let (memory, mut dma) = guest();
    store(&memory, 0, &[2 * PAGE, 3 * PAGE, 5 * PAGE]);
    let mut found = Runs::default();
    found.set_prp(&mut dma, PAGE, [PAGE + 2048, 0], 2048 + 3 * PAGE).unwrap();
    assert_eq!(runs(&found), [(Some(PAGE + 2048), 2048 + 2 * PAGE), (Some(5 * PAGE), PAGE)]);
}

const DATA: u64 = 0;
const BUCKET: u64 = 1;
const SEGMENT: u64 = 2;
const LAST: u64 = 3;

/// An SGL descriptor.
fn descriptor(kind: u64, address: u64, len: u64) -> [u64; 2] {
    [address, kind << 60 | len]
}

fn sgl(
    memory: &GuestMemoryMmap,
    dma: &mut Dma,
    segments: &[(u64, &[[u64; 2]])],
    first: [u64; 2],
) -> Result<Runs, Status> {
    for (at, descriptors) in segments {
        store(memory, *at, &descriptors.concat());
    }
    let mut found = Runs::default();
    found.set_sgl(dma, first, 4096, true).map(|()| found)
}

#[test]
fn sgl_of_one_descriptor() {
    let (memory, mut dma) = guest();
    let found = sgl(&memory, &mut dma, &[], descriptor(DATA, 0x123, 4096)).unwrap();
    assert_eq!(runs(&found), [(Some(0x123), 4096)]);
    let short = sgl(&memory, &mut dma, &[], descriptor(DATA, 0x123, 4095));
    assert_eq!(short.unwrap_err(), Status::DATA_SGL_LENGTH_INVALID);
    let long = sgl(&memory, &mut dma, &[], descriptor(DATA, 0x123, 10_000)).unwrap();
    assert_eq!(runs(&long), [(Some(0x123), 4096)]);
}

#[test]
fn sgl_of_segments_with_a_bit_bucket() {
    let (memory, mut dma) = guest();
    let one = [descriptor(DATA, 0x1000, 96), descriptor(BUCKET, 0, 1000), descriptor(LAST, 0x9000, 32)];
    let two = [descriptor(DATA, 0x3000, 0), descriptor(DATA, 0x2001, 3000)];
    let segments: [(u64, &[[u64; 2]]); 2] = [(0x8000, &one), (0x9000, &two)];
    let found = sgl(&memory, &mut dma, &segments, descriptor(SEGMENT, 0x8000, 48)).unwrap();
    assert_eq!(runs(&found), [(Some(0x1000), 96), (None, 1000), (Some(0x2001), 3000)]);
}

#[test]
fn sgl_errors_have_their_codes() {
    let (memory, mut dma) = guest();
    let data = descriptor(DATA, 0x1000, 4096);
    let mut case = |segments: &[(u64, &[[u64; 2]])], first| sgl(&memory, &mut dma, segments, first).map(drop);
    // Lengths that are not a whole number of descriptors.
    assert_eq!(case(&[], descriptor(LAST, 0x8000, 0)), Err(Status::INVALID_SGL_SEGMENT));
    assert_eq!(case(&[], descriptor(LAST, 0x8000, 15)), Err(Status::INVALID_SGL_SEGMENT));
    // A segment that is not the last but leads nowhere, and a last segment that leads on.
    assert_eq!(case(&[(0x8000, &[data])], descriptor(SEGMENT, 0x8000, 16)), Err(Status::INVALID_SGL_SEGMENT));
    let onward = [data, descriptor(LAST, 0x9000, 16)];
    assert_eq!(case(&[(0x8000, &onward)], descriptor(LAST, 0x8000, 32)), Err(Status::INVALID_SGL_SEGMENT));
    // A segment descriptor that is not the last of its segment.
    let early = [descriptor(LAST, 0x9000, 16), data];
    assert_eq!(case(&[(0x8000, &early)], descriptor(SEGMENT, 0x8000, 32)), Err(Status::INVALID_SGL_SEGMENT));
    // Types and subtypes that are not supported.
    for kind in [0x01, 0x40, 0x50, 0xf0] {
        assert_eq!(case(&[], [0x1000, kind << 56 | 4096]), Err(Status::SGL_TYPE_INVALID));
    }
    // A segment that leads to itself.
    let circle = [descriptor(DATA, 0, 0), descriptor(SEGMENT, 0x8000, 32)];
    assert_eq!(case(&[(0x8000, &circle)], descriptor(SEGMENT, 0x8000, 32)), Err(Status::INVALID_SGL_COUNT));
    // Too many descriptors.
    assert_eq!(case(&[], descriptor(LAST, 0, 0xffff_fff0)), Err(Status::INVALID_SGL_COUNT));
    // A segment outside of memory.
    assert_eq!(case(&[], descriptor(LAST, 1 << 40, 16)), Err(Status::DATA_TRANSFER_ERROR));
}
