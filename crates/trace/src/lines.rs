//! Lines of JSON that clients share, so that each is made once.

use crate::line;
use crate::record::Record;

/// Bytes of a chunk after which the next one begins. Two chunks are kept.
const CHUNK_MAX: usize = 512 << 10;

/// Lines of a chunk, including those that no client wanted, after which the next one begins.
const ENDS_MAX: usize = 32 << 10;

/// The most records that no client wanted, in a row, before a new chunk begins.
const GAP_MAX: u64 = 4096;

/// The lines of consecutive records.
#[derive(Default)]
struct Chunk {
    /// The position of the first record in the history.
    first: u64,
    bytes: Vec<u8>,
    /// The end of each line in `bytes`. A line that no client wanted is empty.
    ends: Vec<usize>,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.first + self.ends.len() as u64
    }

    fn line(&self, position: u64) -> Option<&[u8]> {
        let n = usize::try_from(position.checked_sub(self.first)?).ok()?;
        let end = *self.ends.get(n)?;
        let begin = n.checked_sub(1).map_or(0, |before| self.ends[before]);
        (begin < end).then(|| &self.bytes[begin..end])
    }
}

/// The lines of the newest records that clients got.
#[derive(Default)]
pub struct Lines {
    old: Chunk,
    new: Chunk,
}

impl Lines {
    /// Appends the line of the record at this position of the history.
    pub fn append(&mut self, position: u64, record: &Record, out: &mut Vec<u8>) {
        if let Some(line) = self.new.line(position).or_else(|| self.old.line(position)) {
            out.extend_from_slice(line);
            return;
        }
        if position < self.new.end() {
            // The client is far behind, or wants a record that the others did not. Its line is made for it alone.
            make(record, out);
            return;
        }
        let is_full = self.new.bytes.len() >= CHUNK_MAX || self.new.ends.len() >= ENDS_MAX;
        if position - self.new.end() > GAP_MAX || is_full {
            std::mem::swap(&mut self.old, &mut self.new);
            self.new.first = position;
            self.new.bytes.clear();
            self.new.ends.clear();
        }
        let begin = self.new.bytes.len();
        self.new.ends.resize((position - self.new.first) as usize, begin);
        make(record, &mut self.new.bytes);
        self.new.ends.push(self.new.bytes.len());
        out.extend_from_slice(&self.new.bytes[begin..]);
    }
}

/// Cannot fail: this process made the record, so it is of this version.
fn make(record: &Record, out: &mut Vec<u8>) {
    let _ = line::json(record, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Event;
    use proptest::prelude::*;

    proptest! {
        /// Each client gets the right lines, whichever it asks for and in whichever order.
        #[test]
        fn everybody_gets_the_right_lines(
            asked in prop::collection::vec((0u64..20_000, 1u64..3_000, prop_oneof![Just(1usize), Just(4000)]), 1..20),
        ) {
            let mut lines = Lines::default();
            for (from, count, every) in asked {
                for position in (from..from + count * every as u64).step_by(every) {
                    let record = Event::Panic { endpoint: position as u32 }.encode(position, position);
                    let (mut found, mut wanted) = (Vec::new(), Vec::new());
                    lines.append(position, &record, &mut found);
                    make(&record, &mut wanted);
                    prop_assert_eq!(found, wanted);
                }
            }
            let chunks = [&lines.old, &lines.new];
            prop_assert!(chunks.iter().all(|chunk| chunk.bytes.len() <= CHUNK_MAX + 1024));
            prop_assert!(chunks.iter().all(|chunk| chunk.ends.len() <= ENDS_MAX + GAP_MAX as usize + 1));
        }
    }
}
