//! Changing the tree: one writer at a time, behind the address space's lock.
//!
//! A table that has lost its last mapping is kept for a while. Otherwise a driver that maps and unmaps page after page
//! would allocate and free a table each time. Such a table is *idle*: it is listed, and unlinked when too many are
//! listed and it is the oldest. Every table without live slots is listed. A listed table may have got live slots again;
//! this is noticed when it is the oldest.

use std::collections::VecDeque;

use super::budget::Budget;
use super::node::{LAST_ADDRESS, Node, ROOT_LEVEL, Root, Slot, TableEntry, page_number, pieces, root_slot, span};
use super::{MapError, Splits};
use viommu_wire::virtio_iommu::MapFlags;

/// The most idle tables that an address space keeps.
const IDLE_MAX: usize = if cfg!(loom) { 0 } else { 32 };

/// Tables that are out of the tree. Readers may still use them, so they must be freed only after a grace period.
pub(super) type Unlinked = Vec<TableEntry>;

/// The writer's side of an address space.
pub(super) struct Writer {
    pub(super) mappings: u64,
    /// Bytes of the tables in the tree.
    pub(super) bytes: u64,
    /// The idle tables, oldest first: their level and an address that they cover.
    idle: VecDeque<(u32, u64)>,
}

/// A MAP.
#[derive(Clone, Copy)]
pub(super) struct MapRequest {
    pub start: u64,
    pub end: u64,
    pub phys: u64,
    pub flags: MapFlags,
}

/// Why a MAP is impossible in the present tree.
pub(super) enum Obstacle {
    /// A mapping is in the way.
    Mapping,
    /// A table is where a leaf has to be. If no table is idle, this one has a mapping.
    Table,
    /// There is no memory for a table.
    NoMemory,
}

impl From<Obstacle> for MapError {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Mapping | Obstacle::Table => MapError::Overlap,
            Obstacle::NoMemory => MapError::NoMemory,
        }
    }
}

impl Writer {
    pub(super) fn new() -> Self {
        Writer { mappings: 0, bytes: 0, idle: VecDeque::new() }
    }

    /// Maps the range, or changes nothing that a reader could see.
    pub(super) fn map(&mut self, root: &Root, budget: &Budget, request: &MapRequest) -> Result<(), Obstacle> {
        if request.end - request.start == span(0) {
            self.map_page(root, budget, request)?;
        } else {
            self.prepare(root, None, ROOT_LEVEL, budget, request.start, request.end)?;
            fill(root, None, ROOT_LEVEL, request, request.start, request.end);
        }
        self.mappings += 1;
        Ok(())
    }

    /// Maps a single page in one walk.
    fn map_page(&mut self, root: &Root, budget: &Budget, request: &MapRequest) -> Result<(), Obstacle> {
        let mut parent = None;
        let mut slot = root_slot(root, request.start);
        for level in (0..ROOT_LEVEL).rev() {
            if level == 0
                && slot.load().is_empty()
                && let Some(lone) = TableEntry::lone(request.start, request.phys, request.flags)
            {
                slot.store(lone);
                add_live(parent, 1);
                return Ok(());
            }
            let table = self.table_at(slot, parent, level, budget, request.start)?;
            parent = Some(slot);
            slot = table.slot(level, request.start);
        }
        if !slot.load().is_empty() {
            return Err(Obstacle::Mapping);
        }
        slot.store(TableEntry::leaf(request.phys, request.flags).marked(true, true));
        add_live(parent, 1);
        Ok(())
    }

    /// Makes sure that nothing is in the way of a MAP and that all tables that it needs exist. `slots` are those of a
    /// table of `level`, to which the slot `parent` leads. The range lies inside that table.
    fn prepare(
        &mut self,
        slots: &[Slot],
        parent: Option<&Slot>,
        level: u32,
        budget: &Budget,
        start: u64,
        end: u64,
    ) -> Result<(), Obstacle> {
        for piece in pieces(slots, level, start, end) {
            if !piece.whole {
                let table = self.table_at(piece.slot, parent, level - 1, budget, piece.start)?;
                self.prepare(table.slots(), Some(piece.slot), level - 1, budget, piece.start, piece.end)?;
                continue;
            }
            let entry = piece.slot.load();
            if entry.is_table() {
                return Err(Obstacle::Table);
            }
            if !entry.is_empty() {
                return Err(Obstacle::Mapping);
            }
        }
        Ok(())
    }

    /// The table of `level` to which `slot` leads, allocated if there is none. `parent` leads to the table that has
    /// `slot`.
    pub(super) fn table_at<'a>(
        &mut self,
        slot: &'a Slot,
        parent: Option<&Slot>,
        level: u32,
        budget: &Budget,
        iova: u64,
    ) -> Result<&'a Node, Obstacle> {
        let entry = self.entry_at(slot, parent, level, budget, iova, false)?;
        // SAFETY: A table; we are the writer, and tables are freed only after `&mut self` has ended.
        Ok(unsafe { entry.node() })
    }

    /// The same, as the slot's entry. `tagged` applies only to a table that is allocated here.
    pub(super) fn entry_at(
        &mut self,
        slot: &Slot,
        parent: Option<&Slot>,
        level: u32,
        budget: &Budget,
        iova: u64,
        tagged: bool,
    ) -> Result<TableEntry, Obstacle> {
        let mut entry = slot.load();
        if entry.is_leaf() {
            return Err(Obstacle::Mapping);
        }
        if entry.is_empty() {
            entry = budget.allocate(tagged).ok_or(Obstacle::NoMemory)?;
            slot.store(entry);
            add_live(parent, 1);
            self.bytes += entry.bytes();
            self.idle.push_back((level, iova));
        } else if entry.is_lone() {
            let lone = entry;
            entry = budget.allocate(tagged).ok_or(Obstacle::NoMemory)?.idle(false).plus(1);
            // SAFETY: The table is new, and no reader knows it before `entry` is stored.
            unsafe { entry.node() }.slots()[lone.lone_number() as usize].store(lone.lone_leaf());
            slot.store(entry);
            self.bytes += entry.bytes();
        }
        Ok(entry)
    }

    /// Removes every mapping inside the inclusive range and returns their number. An error if a mapping sticks out of
    /// it.
    pub(super) fn unmap(&mut self, root: &Root, start: u64, end: u64, unlinked: &mut Unlinked) -> Result<u64, Splits> {
        if start ^ end <= span(0) {
            return self.unmap_page(root, start, end);
        }
        // A mapping that sticks out covers the first or the last byte of the range.
        for byte in [start, end] {
            if let Some((entry, level, _)) = find(root, byte) {
                let (first, last) = (byte & !span(level), byte | span(level));
                let begins = first > start || first == start && entry.is_first();
                let ends = last < end || last == end && entry.is_last();
                if byte == start && !begins || byte == end && !ends {
                    return Err(Splits);
                }
            }
        }
        let removed = self.remove(root, None, ROOT_LEVEL, start, end, unlinked);
        self.mappings -= removed;
        Ok(removed)
    }

    /// The same for a range inside a single page, in one walk.
    fn unmap_page(&mut self, root: &Root, start: u64, end: u64) -> Result<u64, Splits> {
        // The slot that leads to the table that has `slot`.
        let mut parent = None;
        let mut slot = root_slot(root, start);
        let mut entry = slot.load();
        let mut level = ROOT_LEVEL;
        while entry.is_table() {
            level -= 1;
            parent = Some(slot);
            // SAFETY: A table, and we are the writer.
            slot = unsafe { entry.node() }.slot(level, start);
            entry = slot.load();
        }
        let leaf = match entry {
            entry if entry.is_lone() => entry.lone_leaf_at(start),
            entry => Some(entry).filter(|entry| !entry.is_empty()),
        };
        let Some(leaf) = leaf else { return Ok(0) };
        let large = level > 0 && !entry.is_lone();
        if large || end - start != span(0) || !leaf.is_first() || !leaf.is_last() {
            return Err(Splits);
        }
        slot.store(TableEntry::EMPTY);
        if let Some(parent) = parent {
            self.drop_live(parent, 1, level, start);
        }
        self.mappings -= 1;
        Ok(1)
    }

    /// Removes whatever is inside the range from a table of `level` with these `slots`, to which `parent` leads. Tables
    /// that lie wholly inside the range are removed too. Returns the number of mappings.
    fn remove(
        &mut self,
        slots: &[Slot],
        parent: Option<&Slot>,
        level: u32,
        start: u64,
        end: u64,
        unlinked: &mut Unlinked,
    ) -> u64 {
        let (mut mappings, mut cleared) = (0, 0);
        let live = parent.map_or(slots.len() as u64, |slot| slot.load().live());
        for piece in pieces(slots, level, start, end) {
            if cleared == live {
                break;
            }
            let entry = piece.slot.load();
            if entry.is_empty() {
                continue;
            }
            if entry.is_table() && !piece.whole {
                // SAFETY: A table, and we are the writer.
                let table = unsafe { entry.node() };
                mappings += self.remove(table.slots(), Some(piece.slot), level - 1, piece.start, piece.end, unlinked);
                continue;
            }
            let touched = page_number(piece.start)..=page_number(piece.end);
            if entry.is_lone() && !piece.whole && !touched.contains(&entry.lone_number()) {
                continue;
            }
            piece.slot.store(TableEntry::EMPTY);
            cleared += 1;
            mappings += self.harvest(entry, unlinked);
        }
        if let Some(parent) = parent.filter(|_| cleared > 0) {
            self.drop_live(parent, cleared, level, start);
        }
        mappings
    }

    /// Counts the mappings that begin below `entry`, whose slot is cleared by now, and retires the tables there.
    fn harvest(&mut self, entry: TableEntry, unlinked: &mut Unlinked) -> u64 {
        if entry.is_leaf() {
            return u64::from(entry.is_first());
        }
        if entry.is_lone() {
            return 1;
        }
        // SAFETY: A table, and we are the writer.
        let slots = unsafe { entry.node() }.slots();
        let live = slots.iter().map(Slot::load).filter(|entry| !entry.is_empty()).take(entry.live() as usize);
        let mappings = live.map(|entry| self.harvest(entry, unlinked)).sum();
        self.retire(entry, unlinked);
        mappings
    }

    /// Removes everything and returns the number of mappings.
    pub(super) fn clear(&mut self, root: &Root, unlinked: &mut Unlinked) -> u64 {
        let removed = self.remove(root, None, ROOT_LEVEL, 0, LAST_ADDRESS, unlinked);
        self.mappings -= removed;
        self.idle.clear();
        removed
    }

    /// Removes everything that MAP mapped and nothing that LINK linked. Returns the number of mappings.
    pub(super) fn clear_maps(&mut self, root: &Root, unlinked: &mut Unlinked) -> u64 {
        let removed = self.remove_maps(root, None, unlinked);
        self.mappings -= removed;
        // The list may name tables that are gone, and a new one in their place would be taken for one of them.
        self.unlink_idle(root, unlinked);
        removed
    }

    /// The same below a table with these `slots`, to which `parent` leads. Tables that are empty then are unlinked, except
    /// the one with these slots. Their places on the list of idle tables are left to the caller.
    fn remove_maps(&mut self, slots: &[Slot], parent: Option<&Slot>, unlinked: &mut Unlinked) -> u64 {
        let live = parent.map_or(slots.len() as u64, |slot| slot.load().live());
        let used = slots.iter().filter(|slot| !slot.load().is_empty()).take(live as usize);
        let (mut mappings, mut cleared) = (0, 0);
        for slot in used {
            let entry = slot.load();
            if entry.is_table() {
                // SAFETY: A table, and we are the writer.
                mappings += self.remove_maps(unsafe { entry.node() }.slots(), Some(slot), unlinked);
                let entry = slot.load();
                if entry.live() > 0 {
                    continue;
                }
                self.retire(entry, unlinked);
            } else if entry.is_linked() {
                continue;
            } else {
                mappings += u64::from(entry.is_lone() || entry.is_first());
            }
            slot.store(TableEntry::EMPTY);
            cleared += 1;
        }
        if let Some(parent) = parent {
            parent.store(parent.load().minus(cleared));
        }
        mappings
    }

    /// Unlinks the oldest idle tables until only as many are left as the address space keeps.
    pub(super) fn trim(&mut self, root: &Root, unlinked: &mut Unlinked) {
        while self.idle.len() > IDLE_MAX {
            self.unlink_oldest(root, unlinked);
        }
    }

    /// Unlinks all idle tables. Each table that is left has a mapping.
    pub(super) fn unlink_idle(&mut self, root: &Root, unlinked: &mut Unlinked) {
        while !self.idle.is_empty() {
            self.unlink_oldest(root, unlinked);
        }
    }

    /// Takes the oldest table off the list, and out of the tree if it still has no live slots.
    fn unlink_oldest(&mut self, root: &Root, unlinked: &mut Unlinked) {
        let Some((level, iova)) = self.idle.pop_front() else { return };
        let mut parent = None;
        let mut slot = root_slot(root, iova);
        for above in (level + 1..ROOT_LEVEL).rev() {
            let entry = slot.load();
            if !entry.is_table() {
                return;
            }
            parent = Some(slot);
            // SAFETY: A table, and we are the writer.
            slot = unsafe { entry.node() }.slot(above, iova);
        }
        let entry = slot.load();
        if !entry.is_table() || !entry.is_idle() {
            return;
        }
        if entry.live() > 0 {
            slot.store(entry.idle(false));
            return;
        }
        slot.store(TableEntry::EMPTY);
        self.retire(entry, unlinked);
        if let Some(parent) = parent {
            self.drop_live(parent, 1, level + 1, iova);
        }
    }

    /// Subtracts `less` live slots from the table of `level` that covers `iova` and to which `slot` leads.
    fn drop_live(&mut self, slot: &Slot, less: u64, level: u32, iova: u64) {
        let mut entry = slot.load().minus(less);
        if entry.live() == 0 && !entry.is_idle() {
            entry = entry.idle(true);
            self.idle.push_back((level, iova));
        }
        slot.store(entry);
    }

    /// Adds a table that the tree does not lead to any more to `unlinked`.
    pub(super) fn retire(&mut self, entry: TableEntry, unlinked: &mut Unlinked) {
        self.bytes -= entry.bytes();
        unlinked.push(entry);
    }
}

/// The leaf that covers `iova`, its level, and the tag of the LINK that made it, or 0.
#[inline]
pub(super) fn find(root: &Root, iova: u64) -> Option<(TableEntry, u32, u64)> {
    let mut table = TableEntry::EMPTY;
    let mut entry = root_slot(root, iova).load();
    for level in (0..=ROOT_LEVEL).rev() {
        if entry.is_leaf() {
            return if entry.is_linked() { find_linked(table, iova) } else { Some((entry, level, 0)) };
        }
        if entry.is_empty() || level == 0 {
            return None;
        }
        if level == 1 && entry.is_lone() {
            return Some((entry.lone_leaf_at(iova)?, 0, 0));
        }
        table = entry;
        // SAFETY: A table. The caller is in a read-side section or is the writer.
        entry = unsafe { table.node() }.slot(level - 1, iova).load();
    }
    None
}

/// The same, where a leaf that a LINK made was just seen in `table`. A function of its own, so that the path for leaves
/// of a MAP stays short.
#[inline(never)]
fn find_linked(table: TableEntry, iova: u64) -> Option<(TableEntry, u32, u64)> {
    // SAFETY: As in `find`: only tables have leaves that are LINKED, and those tables are tagged.
    let (leaf, tag) = unsafe { table.tagged() }?.find(iova);
    leaf.is_leaf().then_some((leaf, 0, tag))
}

/// Adds live slots to the table to which `slot` leads. The root does not count its own.
pub(super) fn add_live(slot: Option<&Slot>, more: u64) {
    if let Some(slot) = slot {
        slot.store(slot.load().plus(more));
    }
}

/// Writes the leaves of a MAP that [`Writer::prepare`] has prepared.
fn fill(slots: &[Slot], parent: Option<&Slot>, level: u32, request: &MapRequest, start: u64, end: u64) {
    let mut filled = 0;
    for piece in pieces(slots, level, start, end) {
        if piece.whole {
            let phys = request.phys.wrapping_add(piece.start - request.start);
            let leaf = TableEntry::leaf(phys, request.flags);
            piece.slot.store(leaf.marked(piece.start == request.start, piece.end == request.end));
            filled += 1;
        } else {
            // SAFETY: `prepare` has put a table there; we are the writer.
            let table = unsafe { piece.slot.load().node() };
            fill(table.slots(), Some(piece.slot), level - 1, request, piece.start, piece.end);
        }
    }
    add_live(parent, filled);
}
