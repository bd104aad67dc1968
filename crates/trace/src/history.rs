//! The last events, kept for all clients together.

use crate::record::Record;

/// A ring of records. A position is the number of records that were pushed before. It equals the record's sequence
/// number, since the collector leaves none out.
pub struct History {
    records: Vec<Record>,
    capacity: usize,
    end: u64,
}

impl History {
    /// An empty history for `capacity` records, rounded up to a power of two.
    pub fn new(capacity: usize) -> Self {
        History { records: Vec::new(), capacity: capacity.max(2).next_power_of_two(), end: 0 }
    }

    /// The position of the oldest record that is kept.
    pub fn first(&self) -> u64 {
        self.end.saturating_sub(self.capacity as u64)
    }

    /// The position that the next record gets.
    pub fn end(&self) -> u64 {
        self.end
    }

    fn index(&self, position: u64) -> usize {
        (position & (self.capacity as u64 - 1)) as usize
    }

    /// The record that the next push overwrites; `None` while there is room.
    pub fn victim(&self) -> Option<&Record> {
        (self.end >= self.capacity as u64).then(|| &self.records[self.index(self.end)])
    }

    /// Appends a record.
    pub fn push(&mut self, record: Record) {
        if self.records.len() < self.capacity {
            self.records.push(record);
        } else {
            let index = self.index(self.end);
            self.records[index] = record;
        }
        self.end += 1;
    }

    /// The records from `position` on that are adjacent in memory. Empty only at the end of the history. A position
    /// before the oldest record counts as that of the oldest.
    pub fn run(&self, position: u64) -> &[Record] {
        let position = position.max(self.first());
        if position >= self.end {
            return &[];
        }
        let index = self.index(position);
        let len = (self.end - position).min((self.capacity - index) as u64) as usize;
        &self.records[index..index + len]
    }

    /// The records from the newest to the oldest, each with its position.
    pub fn newest_first(&self) -> impl Iterator<Item = (u64, &Record)> {
        (self.first()..self.end).rev().map(|position| (position, &self.records[self.index(position)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Event;

    #[test]
    fn the_oldest_go_first() {
        let mut history = History::new(4);
        assert!(history.run(0).is_empty());
        for seq in 0..11u64 {
            let victim = history.victim().map(|record| record.seq.get());
            assert_eq!(victim, seq.checked_sub(4));
            history.push(Event::Panic { endpoint: 0 }.encode(0, seq));
            assert_eq!(history.end(), seq + 1);
            assert_eq!(history.first(), (seq + 1).saturating_sub(4));
            let mut position = 0;
            let mut seen = Vec::new();
            while position < history.end() {
                position = position.max(history.first());
                let run = history.run(position);
                seen.extend(run.iter().map(|record| record.seq.get()));
                position += run.len() as u64;
            }
            assert_eq!(seen, (history.first()..history.end()).collect::<Vec<_>>());
            seen.reverse();
            assert_eq!(history.newest_first().map(|(position, _)| position).collect::<Vec<_>>(), seen);
        }
    }
}
