//! Statistics of the device, readable at any time.

use std::ops::Index;
use std::sync::atomic::{AtomicU64, Ordering};

use viommu_wire::request::RequestType;
use viommu_wire::virtio_iommu::Status;

/// Requests of one type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCount {
    /// Answered, with any status.
    pub total: u64,
    /// Of these, with a status other than OK.
    pub failed: u64,
}

/// Requests by type. Indexing with a [`RequestType`] gives that type's count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts([RequestCount; RequestType::COUNT]);

impl RequestCounts {
    /// Each type with its count, in the order of the types' numbers.
    pub fn iter(&self) -> impl Iterator<Item = (RequestType, RequestCount)> {
        RequestType::ALL.iter().map(|&request| (request, self[request]))
    }
}

impl Index<RequestType> for RequestCounts {
    type Output = RequestCount;

    fn index(&self, request: RequestType) -> &RequestCount {
        &self.0[request.index()]
    }
}

/// Statistics of the device since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that were answered.
    pub requests: RequestCounts,
    /// Reservations that exist.
    pub reservations_live: u64,
    /// Bytes of I/O virtual addresses that are linked.
    pub linked_bytes: u64,
    /// Mappings that exist, without linked pages.
    pub mappings_live: u64,
    /// The most mappings that existed at once.
    pub mappings_peak: u64,
    /// Bytes of all page tables and reservations.
    pub table_bytes: u64,
    /// Accesses that were refused.
    pub faults: u64,
    /// Of these, those that the driver never gets: its event queue and the device's were full, or the fault was still
    /// pending when the driver reset the device or went away.
    pub faults_dropped: u64,
}

/// The live form of [`RequestCount`].
#[derive(Default)]
struct RequestCounter {
    total: AtomicU64,
    failed: AtomicU64,
}

impl RequestCounter {
    fn add(&self, status: Status) {
        self.total.fetch_add(1, Ordering::Relaxed);
        if status != Status::Ok {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> RequestCount {
        RequestCount { total: self.total.load(Ordering::Relaxed), failed: self.failed.load(Ordering::Relaxed) }
    }
}

/// The live form of [`Stats`].
#[derive(Default)]
pub(super) struct Counters {
    requests: [RequestCounter; RequestType::COUNT],
    reservations_live: AtomicU64,
    linked_bytes: AtomicU64,
    mappings_live: AtomicU64,
    mappings_peak: AtomicU64,
    faults: AtomicU64,
    faults_dropped: AtomicU64,
}

impl Counters {
    pub(super) fn request(&self, request: RequestType, status: Status) {
        self.requests[request.index()].add(status);
    }

    pub(super) fn mapped(&self) {
        let live = self.mappings_live.fetch_add(1, Ordering::Relaxed) + 1;
        self.mappings_peak.fetch_max(live, Ordering::Relaxed);
    }

    pub(super) fn unmapped(&self, mappings: u64) {
        self.mappings_live.fetch_sub(mappings, Ordering::Relaxed);
    }

    pub(super) fn reserved(&self) {
        self.reservations_live.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn released(&self) {
        self.reservations_live.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn linked(&self, bytes: u64) {
        self.linked_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn unlinked(&self, bytes: u64) {
        self.linked_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn all_ended(&self) {
        for live in [&self.mappings_live, &self.linked_bytes, &self.reservations_live] {
            live.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn fault(&self, queued: bool) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        if !queued {
            self.faults_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts pending faults that were dropped.
    pub(super) fn undelivered(&self, count: u64) {
        self.faults_dropped.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn read(&self, table_bytes: u64) -> Stats {
        Stats {
            requests: RequestCounts(std::array::from_fn(|index| self.requests[index].read())),
            reservations_live: self.reservations_live.load(Ordering::Relaxed),
            linked_bytes: self.linked_bytes.load(Ordering::Relaxed),
            mappings_live: self.mappings_live.load(Ordering::Relaxed),
            mappings_peak: self.mappings_peak.load(Ordering::Relaxed),
            table_bytes,
            faults: self.faults.load(Ordering::Relaxed),
            faults_dropped: self.faults_dropped.load(Ordering::Relaxed),
        }
    }
}
