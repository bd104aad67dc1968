//! The I/O queues that exist, and those that the host may create (sections 5.3 to 5.6). This module does no DMA and
//! knows no thread.

use std::collections::{BTreeMap, BTreeSet};

use super::spec::{QUEUE_ENTRIES_MAX, Sqe, Status};

/// A queue to create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NewQueue {
    pub id: u16,
    pub size: u32,
    pub base: u64,
}

/// The I/O queues.
pub(super) struct QueueTable {
    /// The most queues of each kind. There is one interrupt vector more.
    most: u16,
    /// The numbers of submission and completion queues that Set Features granted.
    granted: (u16, u16),
    cqs: BTreeSet<u16>,
    /// The submission queues, each with its completion queue.
    sqs: BTreeMap<u16, u16>,
}

impl QueueTable {
    /// A table without queues. The host may create `most` of each kind.
    pub fn new(most: u16) -> Self {
        QueueTable { most, granted: (most, most), cqs: BTreeSet::new(), sqs: BTreeMap::new() }
    }

    /// The numbers of submission and completion queues that the host may create.
    pub fn granted(&self) -> (u16, u16) {
        self.granted
    }

    /// Sets the numbers of a saved state; `None` if they are not possible.
    pub fn grant(&mut self, granted: (u16, u16)) -> Option<()> {
        let possible = [granted.0, granted.1].iter().all(|granted| (1..=self.most).contains(granted));
        self.granted = possible.then_some(granted)?;
        Some(())
    }

    /// Executes Set Features, Number of Queues. Returns the result of the command.
    pub fn set_number(&mut self, wanted: u32) -> Result<u32, Status> {
        let (sqs, cqs) = (wanted as u16, (wanted >> 16) as u16);
        if sqs == u16::MAX || cqs == u16::MAX {
            return Err(Status::INVALID_FIELD);
        }
        if !self.cqs.is_empty() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        self.granted = ((sqs + 1).min(self.most), (cqs + 1).min(self.most));
        Ok(self.number())
    }

    /// Executes Get Features, Number of Queues. Returns the result of the command.
    pub fn number(&self) -> u32 {
        u32::from(self.granted.0 - 1) | u32::from(self.granted.1 - 1) << 16
    }

    /// Decodes Create I/O Completion Queue: the queue to create, and its vector. `page` is the memory page size in
    /// bytes.
    pub fn new_cq(&self, sqe: &Sqe, page: u64) -> Result<(NewQueue, Option<u16>), Status> {
        const INTERRUPTS_ENABLED: u32 = 1 << 1;
        let queue = new_queue(sqe, page, self.granted.1, |id| self.cqs.contains(&id))?;
        let vector = (sqe.cdw11.get() >> 16) as u16;
        if vector > self.most {
            return Err(Status::INVALID_INTERRUPT_VECTOR);
        }
        Ok((queue, (sqe.cdw11.get() & INTERRUPTS_ENABLED != 0).then_some(vector)))
    }

    /// Decodes Create I/O Submission Queue: the queue to create, and its completion queue.
    pub fn new_sq(&self, sqe: &Sqe, page: u64) -> Result<(NewQueue, u16), Status> {
        let cq = (sqe.cdw11.get() >> 16) as u16;
        if cq == 0 {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if !self.cqs.contains(&cq) {
            return Err(Status::COMPLETION_QUEUE_INVALID);
        }
        Ok((new_queue(sqe, page, self.granted.0, |id| self.sqs.contains_key(&id))?, cq))
    }

    /// Adds a completion queue. Returns false if its identifier was in use.
    pub fn add_cq(&mut self, id: u16) -> bool {
        self.cqs.insert(id)
    }

    /// Adds a submission queue. Returns false if its identifier was in use.
    pub fn add_sq(&mut self, id: u16, cq: u16) -> bool {
        self.sqs.insert(id, cq).is_none()
    }

    /// Executes Delete I/O Submission Queue on the table. Returns the queue's identifier.
    pub fn delete_sq(&mut self, sqe: &Sqe) -> Result<u16, Status> {
        let id = sqe.cdw10.get() as u16;
        self.sqs.remove(&id).map(|_| id).ok_or(Status::INVALID_QUEUE_ID)
    }

    /// Executes Delete I/O Completion Queue on the table. Returns the queue's identifier.
    pub fn delete_cq(&mut self, sqe: &Sqe) -> Result<u16, Status> {
        let id = sqe.cdw10.get() as u16;
        if !self.cqs.contains(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if self.sqs.values().any(|cq| *cq == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.cqs.remove(&id);
        Ok(id)
    }
}

/// Decodes the part that both commands for creation share: identifier, size and address.
fn new_queue(sqe: &Sqe, page: u64, granted: u16, exists: impl FnOnce(u16) -> bool) -> Result<NewQueue, Status> {
    const PHYSICALLY_CONTIGUOUS: u32 = 1;
    let id = sqe.cdw10.get() as u16;
    let size = (sqe.cdw10.get() >> 16) + 1;
    if id == 0 || id > granted || exists(id) {
        return Err(Status::INVALID_QUEUE_ID);
    }
    if !(2..=QUEUE_ENTRIES_MAX).contains(&size) {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    if sqe.cdw11.get() & PHYSICALLY_CONTIGUOUS == 0 {
        return Err(Status::INVALID_FIELD);
    }
    let base = sqe.data[0].get();
    if !base.is_multiple_of(page) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    Ok(NewQueue { id, size, base })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A command that creates or deletes a queue.
    fn command(id: u32, entries: u32, cdw11: u32, base: u64) -> Sqe {
        let cdw10 = ((entries.wrapping_sub(1) << 16) | id).into();
        Sqe { cdw10, cdw11: cdw11.into(), data: [base.into(), 0.into()], ..Sqe::default() }
    }

    #[test]
    fn a_submission_queue_needs_its_completion_queue_and_keeps_it() {
        let mut table = QueueTable::new(4);
        let (cq, sq) = (command(2, 16, 3 << 16 | 0b11, 0x1000), command(1, 8, 2 << 16 | 1, 0x2000));
        assert_eq!(table.new_sq(&sq, 4096), Err(Status::COMPLETION_QUEUE_INVALID));
        assert_eq!(table.new_cq(&cq, 4096), Ok((NewQueue { id: 2, size: 16, base: 0x1000 }, Some(3))));
        assert!(table.add_cq(2) && !table.add_cq(2));
        assert_eq!(table.new_cq(&cq, 4096), Err(Status::INVALID_QUEUE_ID));
        assert_eq!(table.new_sq(&sq, 4096), Ok((NewQueue { id: 1, size: 8, base: 0x2000 }, 2)));
        assert!(table.add_sq(1, 2));
        assert_eq!(table.delete_cq(&cq), Err(Status::INVALID_QUEUE_DELETION));
        assert_eq!((table.delete_sq(&sq), table.delete_sq(&sq)), (Ok(1), Err(Status::INVALID_QUEUE_ID)));
        assert_eq!((table.delete_cq(&cq), table.delete_cq(&cq)), (Ok(2), Err(Status::INVALID_QUEUE_ID)));
    }

    #[test]
    fn wrong_queues_are_refused_with_their_status() {
        let table = QueueTable::new(4);
        for (command, status) in [
            (command(0, 16, 1, 0), Status::INVALID_QUEUE_ID),
            (command(5, 16, 1, 0), Status::INVALID_QUEUE_ID),
            (command(1, 1, 1, 0), Status::INVALID_QUEUE_SIZE),
            (command(1, 1025, 1, 0), Status::INVALID_QUEUE_SIZE),
            (command(1, 16, 0, 0), Status::INVALID_FIELD),
            (command(1, 16, 1, 0x800), Status::PRP_OFFSET_INVALID),
            (command(1, 16, 5 << 16 | 1, 0), Status::INVALID_INTERRUPT_VECTOR),
        ] {
            assert_eq!(table.new_cq(&command, 4096), Err(status), "{command:?}");
        }
    }

    #[test]
    fn the_number_of_queues_is_set_before_there_are_some() {
        let mut table = QueueTable::new(4);
        assert_eq!(table.set_number(1 << 16 | 9), Ok(1 << 16 | 3));
        assert_eq!(table.set_number(0xffff), Err(Status::INVALID_FIELD));
        assert_eq!((table.granted(), table.number()), ((4, 2), 1 << 16 | 3));
        table.add_cq(1);
        assert_eq!(table.set_number(0), Err(Status::COMMAND_SEQUENCE_ERROR));
        assert_eq!(table.grant((5, 1)), None);
        assert_eq!(table.grant((0, 1)), None);
        assert_eq!(table.grant((2, 1)), Some(()));
    }
}
