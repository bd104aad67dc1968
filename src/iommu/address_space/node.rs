//! Tables, their slots, and what a slot's 64 bits mean.
//!
//! | | 63..55 | 54 | 53, 52 | 51..12 | 11..6 | 5 | 4 | 3 | 2 | 1 | 0 |
//! |---|---|---|---|---|---|---|---|---|---|---|---|
//! | empty | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |
//! | leaf | phys | phys | phys | phys | LINKED at 6, else 0 | LAST | FIRST | MMIO | WRITE | READ | 1 |
//! | lone page | page | 0 | 0 | phys | 0 | MMIO | WRITE | READ | 1 | 0 | 0 |
//! | table | live slots | live slots | address | address | address | 0 | 0 | TAGGED | 0 | IDLE | 0 |
//!
//! A *lone page* stands in a slot of level 1, which covers 2 MiB, in place of a table that would use one of its 512
//! slots. It names the page and where the page leads. A second page in the same 2 MiB turns it into a table.
//!
//! A leaf that a LINK made is a page and is LINKED. Its table is a *tagged* one, which has a tag for each slot behind
//! the slots.
//!
//! Some facts about a table are only for the writer: how many of its slots are not empty, and whether it is listed as
//! idle. They stand in the slot that leads to the table, which the writer has just read. In the table itself they would
//! cost one more cache miss.

use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::iommu::sync::AtomicU64;
use viommu_wire::virtio_iommu::MapFlags;

/// The smallest mapping is 4 KiB.
pub(super) const PAGE_SHIFT: u32 = 12;

/// The shape of the tree: 128 slots of 2^57 bytes in the root, and five levels of 512 slots below.
#[cfg(not(loom))]
mod shape {
    pub const BITS: u32 = 9;
    pub const LEVELS: u32 = 6;
    pub const ROOT_BITS: u32 = 7;
}

/// A tree small enough for the model checker; it covers 16 KiB.
#[cfg(loom)]
mod shape {
    pub const BITS: u32 = 1;
    pub const LEVELS: u32 = 2;
    pub const ROOT_BITS: u32 = 1;
}

pub(super) const ROOT_LEVEL: u32 = shape::LEVELS - 1;
const NODE_LEN: usize = 1 << shape::BITS;
const ROOT_LEN: usize = 1 << shape::ROOT_BITS;

/// The last address.
pub(super) const LAST_ADDRESS: u64 = u64::MAX >> (64 - PAGE_SHIFT - shape::BITS * ROOT_LEVEL - shape::ROOT_BITS);

/// The slots of the root.
pub(super) type Root = [Slot; ROOT_LEN];

/// The bytes charged for a table: its own, and those that the allocator needs to align it and to know its size.
pub(super) const fn node_bytes(tagged: bool) -> u64 {
    (if tagged { size_of::<Tagged>() } else { size_of::<Node>() } + 64) as u64
}

/// log2 of the bytes that a slot of `level` covers.
#[inline]
pub(super) fn shift(level: u32) -> u32 {
    PAGE_SHIFT + shape::BITS * level
}

/// The last byte of a slot of `level`, counted from its first.
#[inline]
pub(super) fn span(level: u32) -> u64 {
    (1 << shift(level)) - 1
}

/// A table below the root.
#[repr(C, align(64))]
pub(super) struct Node {
    slots: [Slot; NODE_LEN],
    /// Touched by each access and when the table is freed, so that the model checker can see an access after that.
    #[cfg(loom)]
    alive: loom::cell::UnsafeCell<()>,
}

/// A table of pages that has a tag for each.
#[repr(C)]
pub(super) struct Tagged {
    node: Node,
    /// A tag is valid while its slot is LINKED, and is stored before the slot.
    tags: [AtomicU64; NODE_LEN],
}

#[cfg(not(loom))]
impl Node {
    /// A table of empty slots, tagged or not; `None` if there is no memory.
    fn allocate(tagged: bool) -> Option<NonNull<Node>> {
        use std::alloc::{Layout, alloc_zeroed, dealloc};
        let layout = if tagged { Layout::new::<Tagged>() } else { Layout::new::<Node>() };
        // SAFETY: Neither is of size 0.
        let node = NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<Node>())?;
        if node.addr().get() as u64 & !TableEntry::ADDRESS != 0 {
            // Linux gives such an address only on request.
            // SAFETY: Allocated above with this layout, and nobody else knows it.
            unsafe { dealloc(node.as_ptr().cast(), layout) };
            return None;
        }
        Some(node)
    }
}

#[cfg(loom)]
impl Node {
    fn new() -> Node {
        Node { slots: std::array::from_fn(|_| Slot::default()), alive: loom::cell::UnsafeCell::new(()) }
    }

    fn allocate(tagged: bool) -> Option<NonNull<Node>> {
        if !tagged {
            return Some(NonNull::from(Box::leak(Box::new(Node::new()))));
        }
        let tags = std::array::from_fn(|_| AtomicU64::default());
        Some(NonNull::from(Box::leak(Box::new(Tagged { node: Node::new(), tags }))).cast())
    }
}

impl Node {
    #[inline]
    pub(super) fn slots(&self) -> &[Slot; NODE_LEN] {
        #[cfg(loom)]
        self.alive.with(|_| ());
        &self.slots
    }

    /// The slot of `level` that covers `iova`.
    #[inline]
    pub(super) fn slot(&self, level: u32, iova: u64) -> &Slot {
        &self.slots()[index(level, iova)]
    }
}

/// The number of the page of `iova` in its 2 MiB.
pub(super) fn page_number(iova: u64) -> u64 {
    index(0, iova) as u64
}

/// The index, in a table of `level`, of the slot that covers `iova`.
#[inline]
fn index(level: u32, iova: u64) -> usize {
    (iova >> shift(level)) as usize & (NODE_LEN - 1)
}

/// The slot of the root that covers `iova`.
#[inline]
pub(super) fn root_slot(root: &Root, iova: u64) -> &Slot {
    &root[(iova >> shift(ROOT_LEVEL)) as usize & (ROOT_LEN - 1)]
}

impl Tagged {
    /// The slots, as those of any table.
    #[inline]
    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// Links the page of `iova`, whose slot is empty, to where `leaf` leads.
    pub(super) fn link(&self, iova: u64, leaf: TableEntry, tag: u64) {
        // Release: a reader that sees this tag with the old leaf also sees, when it loads the slot again, that the leaf
        // has gone.
        self.tags[index(0, iova)].store(tag, Release);
        self.node.slot(0, iova).store(leaf.linked());
    }

    /// The leaf of the page of `iova`, and the tag of the LINK that made it, or 0. The page may be linked again at any
    /// time, so a tag is valid only if the leaf was the same before and after the tag was read.
    #[inline]
    pub(super) fn find(&self, iova: u64) -> (TableEntry, u64) {
        let slot = self.node.slot(0, iova);
        let mut leaf = slot.load();
        while leaf.is_linked() {
            let tag = self.tags[index(0, iova)].load(Acquire);
            let again = slot.load();
            if again == leaf {
                return (leaf, tag);
            }
            leaf = again;
        }
        (leaf, 0)
    }

    /// Copies the slots of a table without tags. No reader may know this table yet.
    pub(super) fn copy(&self, from: &Node) {
        for (slot, old) in self.node.slots().iter().zip(from.slots()) {
            slot.store(old.load());
        }
    }
}

/// A slot that a range touches, with the part of the range that the slot covers.
pub(super) struct Piece<'a> {
    pub slot: &'a Slot,
    pub start: u64,
    pub end: u64,
    /// Whether the part is all that the slot covers.
    pub whole: bool,
}

/// Cuts the inclusive range at the borders of the slots of a table of `level`. The range must lie inside the table.
pub(super) fn pieces(slots: &[Slot], level: u32, start: u64, end: u64) -> impl Iterator<Item = Piece<'_>> {
    let mask = slots.len() - 1;
    let (first, last) = (start >> shift(level), end >> shift(level));
    (first..=last).map(move |number| {
        let (slot_start, slot_end) = (number << shift(level), (number << shift(level)) | span(level));
        let (start, end) = (start.max(slot_start), end.min(slot_end));
        let whole = start == slot_start && end == slot_end;
        Piece { slot: &slots[number as usize & mask], start, end, whole }
    })
}

/// A slot. Readers load it at any time, and the writer stores to it.
#[derive(Default)]
#[repr(transparent)]
pub(super) struct Slot(AtomicU64);

impl Slot {
    /// Acquire: the reader sees what the writer did before it stored the entry, above all the cleared table that it
    /// leads to.
    #[inline]
    pub(super) fn load(&self) -> TableEntry {
        TableEntry(self.0.load(Acquire))
    }

    /// Release: the other half. With a single writer, load and store need not be one step.
    #[inline]
    pub(super) fn store(&self, entry: TableEntry) {
        self.0.store(entry.0, Release);
    }
}

/// The value of a slot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct TableEntry(u64);

impl TableEntry {
    pub(super) const EMPTY: TableEntry = TableEntry(0);

    const LEAF: u64 = 1 << 0;
    const FLAGS_SHIFT: u32 = 1;
    const FLAGS: u64 = 0b111 << Self::FLAGS_SHIFT;
    const FIRST: u64 = 1 << 4;
    const LAST: u64 = 1 << 5;
    const LINKED: u64 = 1 << 6;
    const PHYS: u64 = !((1 << PAGE_SHIFT) - 1);

    const LONE: u64 = 1 << 2;
    const LONE_FLAGS_SHIFT: u32 = 3;
    const LONE_PHYS: u64 = ((1 << 52) - 1) & Self::PHYS;
    const LONE_PAGE_SHIFT: u32 = 55;

    const IDLE: u64 = 1 << 1;
    const TAGGED: u64 = 1 << 3;
    const ADDRESS: u64 = ((1 << Self::LIVE_SHIFT) - 1) & !0x3f;
    const LIVE_SHIFT: u32 = 54;

    /// A mapping, or a part of one, that leads to `phys`.
    #[inline]
    pub(super) fn leaf(phys: u64, flags: MapFlags) -> Self {
        let flags = (u64::from(flags.bits()) << Self::FLAGS_SHIFT) & Self::FLAGS;
        TableEntry((phys & Self::PHYS) | flags | Self::LEAF)
    }

    /// The same leaf, marked as the first or last of its mapping, or both.
    #[inline]
    pub(super) fn marked(self, first: bool, last: bool) -> Self {
        TableEntry(self.0 | if first { Self::FIRST } else { 0 } | if last { Self::LAST } else { 0 })
    }

    /// The only page in its 2 MiB; `None` if `phys` has too many bits.
    #[inline]
    pub(super) fn lone(iova: u64, phys: u64, flags: MapFlags) -> Option<Self> {
        let flags = (u64::from(flags.bits()) & 0b111) << Self::LONE_FLAGS_SHIFT;
        let page = page_number(iova) << Self::LONE_PAGE_SHIFT;
        (phys & !Self::LONE_PHYS == 0).then_some(TableEntry(page | phys | flags | Self::LONE))
    }

    /// Of a leaf that is a page: the same leaf, marked as made by a LINK.
    fn linked(self) -> Self {
        TableEntry(self.0 | Self::LINKED | Self::FIRST | Self::LAST)
    }

    /// A new table, idle and without live slots; `None` if there is no memory.
    pub(super) fn new_table(tagged: bool) -> Option<Self> {
        let address = Node::allocate(tagged)?.as_ptr().expose_provenance() as u64;
        Some(TableEntry(address | Self::IDLE | if tagged { Self::TAGGED } else { 0 }))
    }

    /// Of a table: frees its memory.
    ///
    /// # Safety
    /// Nobody else may use the table, be able to reach it, or free it.
    pub(super) unsafe fn free(self) {
        #[cfg(loom)]
        // SAFETY: A table, and ours alone.
        unsafe { self.node() }.alive.with_mut(|_| ());
        if self.is_tagged() {
            // SAFETY: It was allocated with the layout of a `Tagged`, as a box is. Zeroes are valid, and it is ours
            // alone.
            drop(unsafe { Box::from_raw(self.address().cast::<Tagged>()) });
        } else {
            // SAFETY: As above, with the layout of a `Node`.
            drop(unsafe { Box::from_raw(self.address()) });
        }
    }

    #[inline]
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[inline]
    pub(super) fn is_leaf(self) -> bool {
        self.0 & Self::LEAF != 0
    }

    #[inline]
    pub(super) fn is_lone(self) -> bool {
        self.0 & (Self::LEAF | Self::LONE) == Self::LONE
    }

    #[inline]
    pub(super) fn is_table(self) -> bool {
        !self.is_empty() && self.0 & (Self::LEAF | Self::LONE) == 0
    }

    /// Of a lone page: its number within the 2 MiB.
    #[inline]
    pub(super) fn lone_number(self) -> u64 {
        self.0 >> Self::LONE_PAGE_SHIFT
    }

    /// Of a lone page: the leaf that represents it in a table.
    #[inline]
    pub(super) fn lone_leaf(self) -> Self {
        let flags = MapFlags::from_bits_truncate((self.0 >> Self::LONE_FLAGS_SHIFT) as u32 & 0b111);
        Self::leaf(self.0 & Self::LONE_PHYS, flags).marked(true, true)
    }

    /// Of a lone page: its leaf, if it is the page of `iova`.
    #[inline]
    pub(super) fn lone_leaf_at(self, iova: u64) -> Option<Self> {
        (self.lone_number() == page_number(iova)).then(|| self.lone_leaf())
    }

    /// Of a leaf: where it leads.
    #[inline]
    pub(super) fn phys(self) -> u64 {
        self.0 & Self::PHYS
    }

    /// Of a leaf: its flags.
    #[inline]
    pub(super) fn flags(self) -> MapFlags {
        MapFlags::from_bits_truncate(((self.0 & Self::FLAGS) >> Self::FLAGS_SHIFT) as u32)
    }

    /// Of a leaf: whether it is the first of its mapping.
    #[inline]
    pub(super) fn is_first(self) -> bool {
        self.0 & Self::FIRST != 0
    }

    /// Of a leaf: whether it is the last of its mapping.
    #[inline]
    pub(super) fn is_last(self) -> bool {
        self.0 & Self::LAST != 0
    }

    /// Of a leaf: whether a LINK made it.
    #[inline]
    pub(super) fn is_linked(self) -> bool {
        self.0 & (Self::LEAF | Self::LINKED) == Self::LEAF | Self::LINKED
    }

    /// Of a table: whether it has tags.
    #[inline]
    pub(super) fn is_tagged(self) -> bool {
        self.0 & Self::TAGGED != 0
    }

    /// Of a table: the bytes charged for it.
    pub(super) fn bytes(self) -> u64 {
        node_bytes(self.is_tagged())
    }

    /// Of a table: its address.
    #[inline]
    fn address(self) -> *mut Node {
        std::ptr::with_exposed_provenance_mut((self.0 & Self::ADDRESS) as usize)
    }

    /// Of a table: the table.
    ///
    /// # Safety
    /// The entry must be a table's. For all of `'a` the caller must be in the read-side section in which it loaded the entry,
    /// or be the writer and not free the table.
    #[inline]
    pub(super) unsafe fn node<'a>(self) -> &'a Node {
        // SAFETY: A table's entry holds the address of an allocated table, which is freed only when no such caller is
        // left.
        unsafe { &*self.address() }
    }

    /// Of a table: the table with its tags, if it has any.
    ///
    /// # Safety
    /// As for [`TableEntry::node`].
    #[inline]
    pub(super) unsafe fn tagged<'a>(self) -> Option<&'a Tagged> {
        // SAFETY: As above, and a TAGGED table was allocated as one.
        self.is_tagged().then(|| unsafe { &*self.address().cast::<Tagged>() })
    }

    /// Of a table: how many of its slots are not empty.
    #[inline]
    pub(super) fn live(self) -> u64 {
        self.0 >> Self::LIVE_SHIFT
    }

    /// Of a table: the entry with `more` more live slots.
    #[inline]
    pub(super) fn plus(self, more: u64) -> Self {
        TableEntry(self.0 + (more << Self::LIVE_SHIFT))
    }

    /// Of a table: the entry with `less` fewer live slots.
    #[inline]
    pub(super) fn minus(self, less: u64) -> Self {
        TableEntry(self.0 - (less << Self::LIVE_SHIFT))
    }

    /// Of a table: whether it is listed as having, or having had, no live slots.
    #[inline]
    pub(super) fn is_idle(self) -> bool {
        self.0 & Self::IDLE != 0
    }

    /// Of a table: the entry with that mark set or not.
    #[inline]
    pub(super) fn idle(self, idle: bool) -> Self {
        TableEntry(if idle { self.0 | Self::IDLE } else { self.0 & !Self::IDLE })
    }
}
