//! A reader's walk over all that is mapped, in steps that are short.
//!
//! The writer goes on meanwhile. What is mapped all the time is found once and as it is. What is mapped or unmapped during the
//! walk may be found, or found in part, or not.

use super::AddressSpace;
use super::node::{ROOT_LEVEL, Slot, TableEntry, shift, span};
use crate::iommu::grace;
use viommu_wire::virtio_iommu::MapFlags;

/// Slots that one step looks at. A step is a read-side section, and whoever removes something waits for its end.
const STEP: usize = 2048;

/// Pages one behind the other that are of one mapping, or that LINKs led one behind the other with the same flags and tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The first address.
    pub start: u64,
    /// The last address.
    pub end: u64,
    /// Where the first address leads.
    pub phys: u64,
    /// What is allowed.
    pub flags: MapFlags,
    /// `Some`: LINKs made them, with this tag; `None`: one MAP did.
    pub tag: Option<u64>,
}

/// How far a walk came; the default is at the first address.
#[derive(Debug, Default)]
pub struct Walk {
    /// The first address that was not looked at.
    next: u64,
    /// What was found last; more of it may follow.
    open: Option<Mapped>,
}

/// Where a table was left before its end, or at it.
type Left = Option<u64>;

impl Walk {
    /// Whether something was found that is not given yet, as more of it may follow.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Goes on for a bounded time, and gives `take` what is found, in the order of the addresses. Returns whether there
    /// is more. The guard must be of a reader of the address space's grace periods, and is to be dropped before the next step.
    ///
    /// # Panics
    /// If the guard is of another reader.
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

    /// Looks at the slots of a table of `level` from the one that covers `from` on.
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

    /// Found a leaf, of which what lies before `start` was passed already.
    fn leaf(&mut self, leaf: TableEntry, table: TableEntry, level: u32, start: u64, take: &mut impl FnMut(Mapped)) {
        if !leaf.is_linked() {
            return self.add(leaf, level, start, None, take);
        }
        // SAFETY: As in `table`: only tables have leaves that are LINKED, and those tables are tagged.
        let Some(tagged) = (unsafe { table.tagged() }) else { return };
        // Looked at once more, as a tag counts only with its leaf.
        let (leaf, tag) = tagged.find(start);
        if leaf.is_leaf() {
            self.add(leaf, 0, start, leaf.is_linked().then_some(tag), take);
        }
    }

    /// Adds what a leaf of `level` leads to from `start` on to what was found last, or begins anew with it.
    fn add(&mut self, leaf: TableEntry, level: u32, start: u64, tag: Option<u64>, take: &mut impl FnMut(Mapped)) {
        let offset = start & span(level);
        let phys = leaf.phys().wrapping_add(offset);
        let found = Mapped { start, end: start | span(level), phys, flags: leaf.flags(), tag };
        // Each page of a LINK is a mapping of its own, and what lies beside it may be one more of the same.
        let begins = tag.is_none() && leaf.is_first();
        match &mut self.open {
            Some(open) if !begins && follows(open, &found) => open.end = found.end,
            open => open.replace(found).into_iter().for_each(take),
        }
    }
}

/// Whether what was found goes on where another ended.
fn follows(open: &Mapped, found: &Mapped) -> bool {
    let len = found.start.wrapping_sub(open.start);
    open.end.wrapping_add(1) == found.start
        && open.phys.wrapping_add(len) == found.phys
        && (open.flags, open.tag) == (found.flags, found.tag)
}
