//! The byte budget that the address spaces of a device share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::node::{TableEntry, node_bytes};

/// Bytes that all address spaces of a device may take together.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Budget { limit, used: AtomicU64::new(0) })
    }

    /// Bytes that may be taken.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes taken now: by tables that are in use, and by removed ones that a reader may still hold.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Takes `bytes`, or nothing if that were too many.
    pub(in crate::iommu) fn take(&self, bytes: u64) -> bool {
        let sum = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Relaxed, Relaxed, sum).is_ok()
    }

    /// Gives back what was taken.
    pub(in crate::iommu) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
    }

    /// A table, charged; `None` if the budget or the memory is used up.
    pub(super) fn allocate(&self, tagged: bool) -> Option<TableEntry> {
        if !self.take(node_bytes(tagged)) {
            return None;
        }
        let table = TableEntry::new_table(tagged);
        if table.is_none() {
            self.give_back(node_bytes(tagged));
        }
        table
    }
}

/// Tables that are in the tree no more; freed, and given back to the budget, when it is dropped.
pub(super) struct Retired {
    budget: Arc<Budget>,
    tables: Vec<TableEntry>,
}

impl Retired {
    /// Takes over tables.
    ///
    /// # Safety
    /// They come from [`Budget::allocate`] of this budget, nobody else frees them, they cannot be reached from the tree any
    /// more, and the result is not dropped before every reader that may have reached them has left its section.
    pub(super) unsafe fn new(budget: Arc<Budget>, tables: Vec<TableEntry>) -> Self {
        Retired { budget, tables }
    }
}

impl Drop for Retired {
    fn drop(&mut self) {
        for table in &self.tables {
            self.budget.give_back(table.bytes());
            // SAFETY: As `new` demands.
            unsafe { table.free() };
        }
    }
}
