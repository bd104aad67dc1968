//! A reader's walk over all mappings, in short steps.
//!
//! The writer goes on meanwhile. A mapping that exists all the time is found exactly once and completely. One that is
//! made or removed during the walk may be found, found in part, or not be found.

use super::AddressSpace;
use super::node::{ROOT_LEVEL, Slot, TableEntry, shift, span};
use crate::iommu::grace;
use viommu_wire::virtio_iommu::MapFlags;

/// The number of slots that one step reads. A step is a read-side section, and a thread that removes something waits
/// for its end.
const STEP: usize = 2048;

/// Consecutive pages of one mapping, or consecutive pages that LINKs led to consecutive memory with the same flags and
/// tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The first address.
    pub start: u64,
    /// The last address.
    pub end: u64,
    /// Where the first address leads.
    pub phys: u64,
    /// The accesses that are allowed.
    pub flags: MapFlags,
    /// `Some` if LINKs made them, with this tag; `None` if a MAP did.
    pub tag: Option<u64>,
}

/// The position of a walk. The default is the first address.
#[derive(Debug, Default)]
pub struct Walk {
    /// The first address that was not visited.
    next: u64,
    /// The last find, of which more may follow.
    open: Option<Mapped>,
}

/// The address at which a step stopped inside a table; `None` if it reached the table's end.
type Left = Option<u64>;

impl Walk {
    /// Whether there is a find that was not passed on yet, since more of it may follow.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Goes on for a bounded time and passes the finds to `take`, in the order of the addresses. Returns whether there
    /// is more. The guard must belong to a reader of the address space's grace periods, and is to be dropped before the
    /// next step.
    ///
    /// # Panics
    /// If the guard belongs to another reader.
    pub fn step(&mut self, space: &AddressSpace, guard: &grace::Guard<'_>, mut take: impl FnMut(Mapped)) -> bool {
        assert!(guard.is_of(&space.grace), "The guard is of another grace period than the address space");
        let mut left = STEP;
        let next = self.table(&space.root, TableEntry::EMPTY, ROOT_LEVEL, self.next, &mut left, &mut take);
        match next {
            Some(next) => self.next = next,
            None => self.open.take().into_iter().for_each(take),
        }
        next.is_some()
    }

    /// Visits the slots of a table of `level`, from the one that covers `from` on.
    fn table(
        &mut self,
        slots: &[Slot],
        table: TableEntry,
        level: u32,
        from: u64,
        left: &mut usize,
        take: &mut impl FnMut(Mapped),
    ) -> Left {
        let first = from >> shift(level);
        let numbers = first..=first | (slots.len() as u64 - 1);
        for number in numbers {
            let start = (number << shift(level)).max(from);
            if *left == 0 {
                return Some(start);
            }
            *left -= 1;
            let slot = &slots[number as usize & (slots.len() - 1)];
            let entry = slot.load();
            if entry.is_leaf() {
                self.leaf(entry, table, level, start, take);
            } else if level == 1 && entry.is_lone() {
                let page = (number << shift(1)) + (entry.lone_number() << shift(0));
                if page >= start {
                    self.add(entry.lone_leaf(), 0, page, None, take);
                }
            } else if entry.is_table() {
                // SAFETY: A table, and the caller of `step` is in a read-side section in which the entry was loaded.
                let below = unsafe { entry.node() };
                if let Some(next) = self.table(below.slots(), entry, level - 1, start, left, take) {
                    return Some(next);
                }
            }
        }
        None
    }

    /// Visits a leaf. The part before `start` was visited already.
    fn leaf(&mut self, leaf: TableEntry, table: TableEntry, level: u32, start: u64, take: &mut impl FnMut(Mapped)) {
        if !leaf.is_linked() {
            return self.add(leaf, level, start, None, take);
        }
        // SAFETY: As in `table`: only tables have leaves that are LINKED, and those tables are tagged.
        let Some(tagged) = (unsafe { table.tagged() }) else { return };
        // Read the leaf again, since a tag is valid only together with its leaf.
        let (leaf, tag) = tagged.find(start);
        if leaf.is_leaf() {
            self.add(leaf, 0, start, leaf.is_linked().then_some(tag), take);
        }
    }

    /// Extends the last find by a leaf of `level`, from `start` on, or begins a new find with it.
    fn add(&mut self, leaf: TableEntry, level: u32, start: u64, tag: Option<u64>, take: &mut impl FnMut(Mapped)) {
        let offset = start & span(level);
        let phys = leaf.phys().wrapping_add(offset);
        let found = Mapped { start, end: start | span(level), phys, flags: leaf.flags(), tag };
        // Each page of a LINK is a mapping of its own, and its neighbour may be another page of the same LINK.
        let begins = tag.is_none() && leaf.is_first();
        match &mut self.open {
            Some(open) if !begins && follows(open, &found) => open.end = found.end,
            open => open.replace(found).into_iter().for_each(take),
        }
    }
}

/// Whether a find continues where another ended.
fn follows(open: &Mapped, found: &Mapped) -> bool {
    let len = found.start.wrapping_sub(open.start);
    open.end.wrapping_add(1) == found.start
        && open.phys.wrapping_add(len) == found.phys
        && (open.flags, open.tag) == (found.flags, found.tag)
}
