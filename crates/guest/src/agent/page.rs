//! A page of ftrace's ring buffer, as `trace_pipe_raw` gives it (Documentation/trace/ring-buffer-design.rst and
//! `events/header_page`, `events/header_event` in tracefs).
//!
//! A page begins with the time of its first event (u64), then the bytes that follow (u64, with flags). Each event has a
//! word: 5 bits of type or length, 27 bits of time since the event before.

/// Bytes before the first event.
const HEADER: usize = 16;
/// The bytes of a page that hold events; the bits above are flags.
const LENGTH_MASK: u64 = 0xf_ffff;
/// Events were overwritten before this page.
const MISSED: u64 = 1 << 31;
const TIME_BITS: u32 = 27;
/// How many low bits of a time an absolute time stamp has; the bits above stay as they were.
const ABSOLUTE_BITS: u32 = TIME_BITS + 32;

/// Smaller types are the length in words.
const PADDING: u32 = 29;
const TIME_EXTEND: u32 = 30;
const TIME_STAMP: u32 = 31;

/// An event: when, in nanoseconds of the trace's clock, and its record.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    pub time: u64,
    pub record: &'a [u8],
}

/// A page that was read.
pub struct Page<'a> {
    /// The time of its first event, ns.
    pub time: u64,
    /// Whether events are missing before it.
    pub missed: bool,
    rest: &'a [u8],
    now: u64,
}

impl<'a> Page<'a> {
    /// Takes the bytes of one read. `None` if they are no page.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        let time = u64::from_le_bytes(*bytes.first_chunk()?);
        let commit = u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
        let rest = bytes.get(HEADER..)?.get(..(commit & LENGTH_MASK) as usize)?;
        Some(Self { time, missed: commit & MISSED != 0, rest, now: time })
    }

    fn word(&mut self) -> Option<u32> {
        let (word, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u32::from_le_bytes(*word))
    }

    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(bytes)
    }

    /// The rest of an event whose length is in its next word; the length includes that word.
    fn long(&mut self) -> Option<&'a [u8]> {
        let length = self.word()? as usize;
        self.bytes(length.checked_sub(4)?)
    }
}

impl<'a> Iterator for Page<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        loop {
            let head = self.word()?;
            let (kind, delta) = (head & 0x1f, u64::from(head >> 5));
            match kind {
                TIME_EXTEND => self.now += (u64::from(self.word()?) << TIME_BITS) + delta,
                TIME_STAMP => {
                    let low = (u64::from(self.word()?) << TIME_BITS) + delta;
                    self.now = self.now >> ABSOLUTE_BITS << ABSOLUTE_BITS | low;
                }
                // Nothing more on this page.
                PADDING if delta == 0 => return None,
                // An event that was discarded.
                PADDING => drop(self.long()?),
                _ => {
                    self.now += delta;
                    let record = if kind == 0 { self.long()? } else { self.bytes(kind as usize * 4)? };
                    return Some(Entry { time: self.now, record });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(flags: u64, words: &[u32]) -> Vec<u8> {
        let mut page = 1_000_000_u64.to_le_bytes().to_vec();
        page.extend(((words.len() as u64 * 4) | flags).to_le_bytes());
        page.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        page.extend([0xee; 64]);
        page
    }

    fn head(kind: u32, delta: u32) -> u32 {
        delta << 5 | kind
    }

    fn entries(bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        Page::new(bytes).unwrap().map(|entry| (entry.time, entry.record.to_vec())).collect()
    }

    #[test]
    fn events_of_both_forms_of_length_have_their_times() {
        let bytes = page(0, &[head(1, 0), 7, head(0, 500), 12, 8, 9, head(2, 3), 1, 2]);
        let found = entries(&bytes);
        assert_eq!(found.iter().map(|(time, _)| *time).collect::<Vec<_>>(), [1_000_000, 1_000_500, 1_000_503]);
        assert_eq!(found[0].1, 7_u32.to_le_bytes());
        assert_eq!(found[1].1.len(), 8);
        assert_eq!(found[2].1.len(), 8);
    }

    #[test]
    fn long_gaps_absolute_times_and_padding_count() {
        let extended = page(0, &[head(TIME_EXTEND, 5), 2, head(1, 1), 7]);
        assert_eq!(entries(&extended)[0].0, 1_000_000 + (2 << 27) + 5 + 1);
        let absolute = page(0, &[head(TIME_STAMP, 9), 3, head(1, 0), 7]);
        assert_eq!(entries(&absolute)[0].0, (3 << 27) + 9);
        let discarded = page(0, &[head(PADDING, 1), 12, 0, 0, head(1, 4), 7, head(PADDING, 0), 8, 9]);
        assert_eq!(entries(&discarded), [(1_000_004, 7_u32.to_le_bytes().to_vec())]);
    }

    #[test]
    fn a_loss_is_flagged_and_what_is_cut_off_ends_the_page() {
        let bytes = page(MISSED | 1 << 30, &[head(1, 0), 7]);
        assert!(Page::new(&bytes).unwrap().missed);
        assert_eq!(entries(&page(0, &[head(1, 0), 7, head(5, 1), 7])).len(), 1);
        assert_eq!(entries(&page(0, &[head(0, 0), 2])).len(), 0);
        assert!(Page::new(&bytes[..12]).is_none());
        assert!(Page::new(&page(0xff_fff, &[])).is_none());
    }
}
