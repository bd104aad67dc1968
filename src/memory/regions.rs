//! Regions in the order of their addresses, in a form in which a changed copy is cheap.

use std::sync::Arc;

use super::Region;

/// The most regions of a chunk.
const CHUNK_MAX: usize = 256;

/// Regions that do not overlap. A change makes a new value, which shares all but one chunk with the old one. So readers
/// can go on with the old value, and a client that describes its memory in tens of thousands of pieces does not have
/// all of them copied for each.
#[derive(Clone, Default)]
pub struct Regions {
    /// No chunk is empty.
    chunks: Vec<Chunk>,
    count: usize,
}

#[derive(Clone)]
struct Chunk {
    /// The address of the first region.
    first: u64,
    regions: Arc<Vec<(u64, Arc<Region>)>>,
}

impl Chunk {
    fn new(regions: Vec<(u64, Arc<Region>)>) -> Option<Chunk> {
        let first = regions.first()?.0;
        Some(Chunk { first, regions: Arc::new(regions) })
    }
}

impl Regions {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Region>> {
        self.chunks.iter().flat_map(|chunk| chunk.regions.iter().map(|(_, region)| region))
    }

    /// The last region that begins at `gpa` or before.
    #[inline]
    pub(super) fn at_or_before(&self, gpa: u64) -> Option<&Arc<Region>> {
        let chunk = self.chunks.partition_point(|chunk| chunk.first <= gpa).checked_sub(1)?;
        let regions = &self.chunks[chunk].regions;
        let at = regions.partition_point(|&(start, _)| start <= gpa).checked_sub(1)?;
        Some(&regions[at].1)
    }

    /// The region that has this address.
    #[inline]
    pub(super) fn find(&self, gpa: u64) -> Option<&Arc<Region>> {
        self.at_or_before(gpa).filter(|region| gpa - region.gpa < region.len)
    }

    /// The regions that overlap the inclusive range, in the order of their addresses.
    pub(super) fn touching(&self, first: u64, last: u64) -> impl Iterator<Item = &Arc<Region>> {
        let begin = self.at_or_before(first).filter(|region| region.last() >= first).map_or(first, |region| region.gpa);
        let chunk = self.chunks.partition_point(|chunk| chunk.first <= begin).saturating_sub(1);
        let regions = self.chunks[chunk..].iter().flat_map(|chunk| chunk.regions.iter());
        regions.skip_while(move |(gpa, _)| *gpa < begin).take_while(move |(gpa, _)| *gpa <= last).map(|(_, r)| r)
    }

    /// The same regions with one more, which must overlap none of them.
    pub(super) fn with(&self, region: Arc<Region>) -> Regions {
        let mut chunks = self.chunks.clone();
        let at = chunks.partition_point(|chunk| chunk.first <= region.gpa).saturating_sub(1);
        let mut regions = chunks.get(at).map_or_else(Vec::new, |chunk| Vec::clone(&chunk.regions));
        let place = regions.partition_point(|(gpa, _)| *gpa < region.gpa);
        regions.insert(place, (region.gpa, region));
        let upper = if regions.len() > CHUNK_MAX { regions.split_off(CHUNK_MAX / 2) } else { Vec::new() };
        let changed = [regions, upper].into_iter().filter_map(Chunk::new);
        chunks.splice(at..(at + 1).min(chunks.len()), changed);
        Regions { chunks, count: self.count + 1 }
    }

    /// The same regions without those that begin at these addresses, which must be sorted.
    pub(super) fn without(&self, gone: &[u64]) -> Regions {
        let mut chunks: Vec<Chunk> = Vec::with_capacity(self.chunks.len());
        let mut count = 0;
        let mut gone = gone.iter().copied().peekable();
        for (index, chunk) in self.chunks.iter().enumerate() {
            let end = self.chunks.get(index + 1).map_or(u64::MAX, |next| next.first);
            let touched = gone.peek().is_some_and(|gpa| (chunk.first..end).contains(gpa));
            let small = chunks.last().is_some_and(|last| last.regions.len() + chunk.regions.len() <= CHUNK_MAX / 2);
            if !touched && !small {
                count += chunk.regions.len();
                chunks.push(chunk.clone());
                continue;
            }
            let mut regions = Vec::clone(&chunk.regions);
            regions.retain(|(gpa, _)| gone.next_if_eq(gpa).is_none());
            count += regions.len();
            // Chunks that have become small are merged; otherwise their number would grow without end.
            if let Some(last) = chunks.last_mut().filter(|last| last.regions.len() + regions.len() <= CHUNK_MAX / 2) {
                Arc::make_mut(&mut last.regions).append(&mut regions);
            } else {
                chunks.extend(Chunk::new(regions));
            }
        }
        Regions { chunks, count }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn region(gpa: u64, len: u64) -> Arc<Region> {
        Arc::new(Region { gpa, len, readable: true, writable: true, backing: None })
    }

    proptest! {
        /// Compares with a map. There are so many regions that chunks split, become empty and are merged.
        #[test]
        fn agree_with_a_map(seed in any::<u64>(), bias in 1u64..4) {
            let (mut regions, mut map, mut random) = (Regions::default(), BTreeMap::new(), seed);
            for step in 0u64..3000 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let gpa = (random >> 33) % 4096 * 16;
                let add = if step < 1500 { (random >> 60) >= bias } else { (random >> 60) < bias };
                if add && !map.contains_key(&gpa) {
                    regions = regions.with(region(gpa, 8));
                    map.insert(gpa, 8);
                } else if !add {
                    let last = gpa + 16 * 64;
                    let gone: Vec<u64> = map.range(gpa..=last).map(|(gpa, _)| *gpa).collect();
                    let found: Vec<u64> = regions.touching(gpa, last).map(|region| region.gpa).collect();
                    prop_assert_eq!(&found, &gone);
                    regions = regions.without(&gone);
                    map.retain(|gpa, _| !gone.contains(gpa));
                }
                prop_assert_eq!(regions.len(), map.len());
            }
            prop_assert!(regions.iter().map(|region| region.gpa).eq(map.keys().copied()));
            prop_assert!(regions.chunks.iter().all(|chunk| !chunk.regions.is_empty() && chunk.first == chunk.regions[0].0));
            prop_assert!(regions.chunks.windows(2).all(|pair| pair[0].regions.len() + pair[1].regions.len() > 2));
            for gpa in (0..4096 * 16).step_by(8) {
                prop_assert_eq!(regions.find(gpa).is_some(), map.contains_key(&gpa));
            }
        }
    }
}
