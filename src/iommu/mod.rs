//! The vIOMMU itself: endpoints, domains and address spaces. It knows no socket, no queue and no thread.
//!
//! One side changes it, under one lock: [`Iommu::execute`] and the resets. The other side reads without a lock:
//! [`Endpoint::translate`] inside a guard of a [`grace::Reader`]. A reader may use what a request removed until
//! [`Iommu::synchronize`] returns, so the driver must not learn of a removal before that.

pub mod address_space;
pub mod counters;
mod domain;
pub mod endpoint;
mod event;
pub mod fault;
pub mod grace;
mod limits;
mod live;
mod request;
mod reservation;
mod split;
mod sync;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, TryLockError};

use address_space::{AddressSpace, Budget};
use counters::Counters;
pub use counters::Stats;
use domain::{Domain, DomainEntry, Domains};
use endpoint::Common;
pub use endpoint::{Endpoint, Refused, Translation};
pub use fault::Fault;
use fault::{FaultListener, FaultQueue};
pub use limits::{EndpointSettings, Limits, Reserved, Settings};
pub use live::{Live, LiveItem};
pub use request::{NotARequest, Outcome, Request};
use reservation::Reservations;

use crate::sync::lock;
use viommu_trace::{Event, Tracer};
use viommu_wire::split::F_SPLIT_MAP;
use viommu_wire::virtio_iommu::{Config, FaultRecord, feature};

/// The device, without its transport.
pub struct Iommu {
    settings: Settings,
    grace: Arc<grace::Grace>,
    budget: Arc<Budget>,
    tracer: Tracer,
    /// Fixed at the start, so that no request can add endpoints.
    endpoints: HashMap<u32, Arc<Endpoint>>,
    domains: Mutex<Domains>,
    /// Held from a request's first change until the trace has its event.
    journal: Mutex<()>,
    /// State that every endpoint reads.
    common: Arc<Common>,
    /// The features that the driver accepted.
    features: AtomicU64,
    faults: FaultQueue,
    counters: Counters,
    /// That reservations outlive a domain's endpoints was said.
    explained_survivor: Once,
}

impl Iommu {
    /// The device type's features that are always offered (section 5.13.3).
    const FEATURES: u64 = feature::INPUT_RANGE
        | feature::DOMAIN_RANGE
        | feature::MAP_UNMAP
        | feature::PROBE
        | feature::MMIO
        | feature::BYPASS_CONFIG;

    /// A device in its power-on state.
    pub fn new(settings: Settings, tracer: Tracer) -> Arc<Iommu> {
        let grace = grace::Grace::new();
        let common = Arc::new(Common { bypass: settings.boot_bypass.into(), driver: false.into() });
        let endpoints = settings.endpoints.iter().map(|endpoint| {
            let id = endpoint.id;
            (id, Arc::new(Endpoint::new(id, endpoint.reserved.clone(), common.clone(), grace.clone())))
        });
        Arc::new(Iommu {
            endpoints: endpoints.collect(),
            grace,
            budget: Budget::new(settings.limits.table_bytes),
            tracer,
            domains: Mutex::default(),
            journal: Mutex::default(),
            common,
            features: AtomicU64::new(0),
            faults: FaultQueue::new(settings.limits.pending_faults),
            counters: Counters::default(),
            explained_survivor: Once::new(),
            settings,
        })
    }

    /// A translator for the accesses of the endpoint `id`. An id that the device does not manage gets one too: all its
    /// accesses fault with reason UNKNOWN.
    pub fn endpoint(&self, id: u32) -> Arc<Endpoint> {
        self.endpoints.get(&id).cloned().unwrap_or_else(|| Arc::new(Endpoint::unknown(id, self.grace.clone())))
    }

    /// A new reader: one for each thread that translates.
    pub fn reader(&self) -> grace::Reader {
        self.grace.reader()
    }

    /// Traces a fault and queues it for the driver's event queue. Never waits for the driver: if the queue is full, the
    /// fault is dropped and counted.
    pub fn report(&self, fault: Fault) {
        self.faults.push(&fault, |queued| {
            self.counters.fault(queued);
            self.tracer.emit(Event::Fault {
                endpoint: fault.endpoint,
                reason: fault.reason as u8,
                access: fault.access,
                address: fault.address,
                domain: fault.domain,
                dropped: !queued,
            });
        });
    }

    /// Sets, or removes, the listener that is called when a fault was queued.
    pub fn on_fault(&self, listener: Option<FaultListener>) {
        self.faults.listen(listener);
    }

    /// Whether a fault waits for the driver.
    pub fn has_fault(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Takes the oldest fault that was not yet delivered to the driver.
    pub fn next_fault(&self) -> Option<FaultRecord> {
        self.faults.pop()
    }

    /// The device configuration (section 5.13.4).
    pub fn config(&self) -> Config {
        let Settings { input_range, domain_range, page_size_mask, .. } = self.settings;
        Config {
            page_size_mask: page_size_mask.into(),
            input_range: [input_range.0.into(), input_range.1.into()],
            domain_range: [domain_range.0.into(), domain_range.1.into()],
            probe_size: (self.probe_size() as u32).into(),
            bypass: u8::from(self.common.bypass.load(Ordering::Acquire)),
            reserved: [0; 3],
        }
    }

    /// Bytes of the smallest mapping: a power of two.
    pub fn granule(&self) -> u64 {
        self.settings.granule()
    }

    /// Bytes of properties in a PROBE request, without the tail.
    pub fn probe_size(&self) -> usize {
        self.settings.probe_size()
    }

    /// The device type's features that are offered.
    pub fn offered(&self) -> u64 {
        Self::FEATURES | if self.settings.split { F_SPLIT_MAP } else { 0 }
    }

    /// Sets the features of [`Iommu::offered`] that the driver accepted. The split protocol needs MAP_UNMAP and is
    /// dropped without it.
    pub fn set_features(&self, accepted: u64) {
        let useless = if accepted & feature::MAP_UNMAP == 0 { F_SPLIT_MAP } else { 0 };
        self.features.store(accepted & self.offered() & !useless, Ordering::Release);
        self.common.driver.store(accepted & self.offered() != 0, Ordering::Release);
    }

    /// The device type's features that the driver accepted.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// Takes the driver's write of `bypass`. Returns false and changes nothing if the value is neither 0 nor 1, or if
    /// BYPASS_CONFIG was not negotiated (section 5.13.4.1). When this returns, no access uses the old value.
    pub fn write_bypass(&self, value: u8) -> bool {
        if value > 1 || self.features() & feature::BYPASS_CONFIG == 0 {
            return false;
        }
        self.common.bypass.store(value == 1, Ordering::Release);
        self.grace.synchronize();
        true
    }

    /// To be held while requests are executed or the device is reset, and until their events are traced. Whenever
    /// nobody holds it, the trace has exactly what was done, except for requests whose answer could not be written, and for
    /// the batch in which the device panicked. See [`Live`].
    pub fn journal(&self) -> MutexGuard<'_, ()> {
        lock(&self.journal)
    }

    /// The same, if nobody holds it.
    fn try_journal(&self) -> Option<MutexGuard<'_, ()>> {
        match self.journal.try_lock() {
            Ok(journal) => Some(journal),
            Err(TryLockError::Poisoned(journal)) => Some(journal.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Waits until no access can use anything that requests removed so far. Costs nothing if nothing was removed. The
    /// caller must hold no guard.
    pub fn synchronize(&self) {
        let removed = self.domains().take_removed();
        if let Some(retired) = removed {
            self.grace.synchronize();
            drop(retired);
        }
    }

    /// The driver reset the device: all endpoints are detached, all domains and pending faults are dropped, and
    /// `bypass` stays. The accepted features stay too, since over vhost-user the next driver's are known before the
    /// reset is. When this returns, no access uses what was removed.
    pub fn device_reset(&self) {
        let reservations = self.domains().clear();
        drop(reservations);
        self.counters.all_ended();
        self.faults.clear(|count| {
            self.counters.undelivered(count as u64);
            self.tracer.emit(Event::Undelivered { count: count as u64 });
        });
        self.synchronize();
    }

    /// The machine was reset. Does what [`Iommu::device_reset`] does, and gives `bypass` its boot value again. A
    /// function that is not reset yet would go on using I/O virtual addresses that nothing translates any more, and in
    /// bypass it could reach any memory with them. So all attached functions lose bus mastering first, as their own
    /// reset takes it anyway.
    pub fn system_reset(&self) {
        self.common.driver.store(false, Ordering::Release);
        self.domains().silence();
        self.grace.synchronize();
        self.endpoints.values().for_each(|endpoint| endpoint.set_settled(false));
        self.common.bypass.store(self.settings.boot_bypass, Ordering::Release);
        self.device_reset();
    }

    /// The statistics of the device so far.
    pub fn stats(&self) -> Stats {
        self.counters.read(self.budget.used())
    }

    fn domains(&self) -> MutexGuard<'_, Domains> {
        lock(&self.domains)
    }

    fn new_domain(&self, id: u32, bypass: bool) -> DomainEntry {
        let space = (!bypass).then(|| AddressSpace::new(self.grace.clone(), self.budget.clone()));
        DomainEntry {
            domain: Arc::new(Domain { id, space }),
            members: Vec::new(),
            reservations: Reservations::new(self.budget.clone()),
            survived: false,
        }
    }
}

impl Drop for Iommu {
    fn drop(&mut self) {
        // Endpoints and readers may outlive the device, and retired domains must not be freed under them.
        self.synchronize();
    }
}
