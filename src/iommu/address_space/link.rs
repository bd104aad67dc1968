//! Pages that are mapped one by one and carry a tag: the LINK of the split protocol.
//!
//! Each page is a mapping of its own, in a leaf of 4 KiB, whatever its neighbours are. So each can be removed alone,
//! and removing one never needs memory.

use super::budget::Budget;
use super::node::{ROOT_LEVEL, Root, Slot, TableEntry, Tagged, page_number, pieces, root_slot, span};
use super::writer::{Obstacle, Unlinked, Writer, add_live};
use viommu_wire::virtio_iommu::MapFlags;

/// Consecutive pages in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The address of the first page, aligned to 4 KiB.
    pub phys: u64,
    /// How many pages there are.
    pub pages: u64,
}

impl Writer {
    /// Links all pages, or changes nothing that a reader could see.
    #[allow(clippy::too_many_arguments, reason = "as many as a LINK has")]
    pub(super) fn link(
        &mut self,
        root: &Root,
        budget: &Budget,
        unlinked: &mut Unlinked,
        start: u64,
        runs: impl Iterator<Item = Run> + Clone,
        flags: MapFlags,
        tag: u64,
    ) -> Result<(), Obstacle> {
        let pages: u64 = runs.clone().map(|run| run.pages).sum();
        let Some(end) = pages.checked_sub(1).map(|last| start + ((last * (span(0) + 1)) | span(0))) else {
            return Ok(());
        };
        for (start, end) in tables(start, end) {
            let (table, _) = self.tagged_at(root, budget, unlinked, start)?;
            if pieces(table.node().slots(), 0, start, end).any(|piece| !piece.slot.load().is_empty()) {
                return Err(Obstacle::Mapping);
            }
        }
        let mut targets = runs.flat_map(|run| (0..run.pages).map(move |page| run.phys + page * (span(0) + 1)));
        for (start, end) in tables(start, end) {
            // The table exists by now, so nothing is allocated and nothing can fail.
            let (table, slot) = self.tagged_at(root, budget, unlinked, start)?;
            let pages = (start..=end).step_by(span(0) as usize + 1);
            let count = (end - start) / (span(0) + 1) + 1;
            for (iova, phys) in pages.zip(&mut targets) {
                table.link(iova, TableEntry::leaf(phys, flags), tag);
            }
            add_live(Some(slot), count);
        }
        self.mappings += pages;
        Ok(())
    }

    /// The table of pages that covers `iova`, and the slot that leads to it. A table without tags is replaced by a
    /// tagged one.
    fn tagged_at<'a>(
        &mut self,
        root: &'a Root,
        budget: &Budget,
        unlinked: &mut Unlinked,
        iova: u64,
    ) -> Result<(&'a Tagged, &'a Slot), Obstacle> {
        let mut parent = None;
        let mut slot = root_slot(root, iova);
        for level in (1..ROOT_LEVEL).rev() {
            let table = self.table_at(slot, parent, level, budget, iova)?;
            parent = Some(slot);
            slot = table.slot(level, iova);
        }
        let mut entry = self.entry_at(slot, parent, 0, budget, iova, true)?;
        if !entry.is_tagged() {
            entry = self.replace(slot, entry, budget, unlinked)?;
        }
        // SAFETY: A table; we are the writer, and tables are freed only after `&mut self` has ended.
        unsafe { entry.tagged() }.map(|table| (table, slot)).ok_or(Obstacle::NoMemory)
    }

    /// Puts a tagged table with the same pages in the place of `old`, to which `slot` leads. Readers may use either.
    fn replace(
        &mut self,
        slot: &Slot,
        old: TableEntry,
        budget: &Budget,
        unlinked: &mut Unlinked,
    ) -> Result<TableEntry, Obstacle> {
        let new = budget.allocate(true).ok_or(Obstacle::NoMemory)?.idle(old.is_idle()).plus(old.live());
        // SAFETY: Both are tables, and we are the writer.
        if let (Some(table), from) = unsafe { (new.tagged(), old.node()) } {
            table.copy(from);
        }
        slot.store(new);
        self.bytes += new.bytes();
        self.retire(old, unlinked);
        Ok(new)
    }
}

/// Whether the table of `level` with these `slots` maps nothing in the inclusive range. For the writer.
pub(super) fn is_empty(slots: &[Slot], level: u32, start: u64, end: u64) -> bool {
    pieces(slots, level, start, end).all(|piece| {
        let entry = piece.slot.load();
        if entry.is_lone() {
            return !(page_number(piece.start)..=page_number(piece.end)).contains(&entry.lone_number());
        }
        if !entry.is_table() {
            return entry.is_empty();
        }
        // SAFETY: A table, and we are the writer.
        entry.live() == 0 || is_empty(unsafe { entry.node() }.slots(), level - 1, piece.start, piece.end)
    })
}

/// Cuts the inclusive range at the borders of tables of pages.
fn tables(start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let last = move |start: u64| (start | span(1)).min(end);
    let next = move |&(_, end_of_one): &(u64, u64)| (end_of_one < end).then(|| (end_of_one + 1, last(end_of_one + 1)));
    std::iter::successors(Some((start, last(start))), next)
}
