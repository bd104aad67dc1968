//! The byte budget that the address spaces of a device share.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::node::{NODE_BYTES, Node};

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
    fn take(&self, bytes: u64) -> bool {
        let sum = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Relaxed, Relaxed, sum).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
    }

    /// A table, charged; `None` if the budget or the memory is used up.
    pub(super) fn allocate(&self) -> Option<NonNull<Node>> {
        if !self.take(NODE_BYTES) {
            return None;
        }
        let node = Node::allocate();
        if node.is_none() {
            self.give_back(NODE_BYTES);
        }
        node
    }
}

/// Tables that are in the tree no more; freed, and given back to the budget, when it is dropped.
pub(super) struct Retired {
    budget: Arc<Budget>,
    nodes: Vec<NonNull<Node>>,
}

// SAFETY: Whoever drops it frees tables that nobody else uses (see `Retired::new`); which thread does, does not matter.
unsafe impl Send for Retired {}

impl Retired {
    /// Takes over tables.
    ///
    /// # Safety
    /// They come from [`Budget::allocate`] of this budget, nobody else frees them, they cannot be reached from the tree any
    /// more, and the result is not dropped before every reader that may have reached them has left its section.
    pub(super) unsafe fn new(budget: Arc<Budget>, nodes: Vec<NonNull<Node>>) -> Self {
        Retired { budget, nodes }
    }
}

impl Drop for Retired {
    fn drop(&mut self) {
        for node in &self.nodes {
            // SAFETY: As `new` demands.
            unsafe { Node::free(*node) };
        }
        self.budget.give_back(NODE_BYTES * self.nodes.len() as u64);
    }
}
