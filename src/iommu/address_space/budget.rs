//! The byte budget that the address spaces of a device share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::node::{TableEntry, node_bytes};

/// The bytes that all address spaces of a device may use together.
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

    /// The most bytes that may be in use.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes in use now: those of tables in the trees, and of removed tables that a reader may still use.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Takes `bytes`, or nothing if that would exceed the limit.
    pub(in crate::iommu) fn take(&self, bytes: u64) -> bool {
        let sum = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Relaxed, Relaxed, sum).is_ok()
    }

    /// Returns bytes that were taken.
    pub(in crate::iommu) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
    }

    /// Allocates and charges a table; `None` if the budget or the memory is used up.
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

/// Tables that are no longer in the tree. Dropping this frees them and returns their bytes to the budget.
pub(super) struct Retired {
    budget: Arc<Budget>,
    tables: Vec<TableEntry>,
}

impl Retired {
    /// Takes over tables.
    ///
    /// # Safety
    /// The tables must come from [`Budget::allocate`] of this budget, must not be freed by anybody else, and must no longer
    /// be reachable from the tree. The result must not be dropped before every reader that may have reached them has left
    /// its section.
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
