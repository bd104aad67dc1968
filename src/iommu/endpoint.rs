//! An endpoint as the code sees it that accesses memory in its name.

use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use super::domain::Domain;
use super::grace::{self, Grace};
use super::limits::Reserved;
use viommu_trace::event::{Access, Route};
use viommu_wire::virtio_iommu::{FaultReason, MapFlags, ResvMemKind};

/// Where an I/O virtual address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address.
    pub gpa: u64,
    /// The number of bytes, from this address on, for which address and permission hold; at least 1. A run of 2^64
    /// bytes is given as `u64::MAX`.
    pub len: u64,
    /// How the address was translated.
    pub route: Route,
    /// The domain, or 0 where there is none.
    pub domain: u32,
    /// The tag of the LINK that made the mapping, or 0.
    pub tag: u64,
}

/// An access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub reason: FaultReason,
    /// The domain that the endpoint was attached to.
    pub domain: Option<u32>,
}

/// An endpoint as the code sees it that accesses memory in its name.
pub struct Endpoint {
    id: u32,
    /// The device's settings for the endpoint; `None` for an id that the device does not manage.
    managed: Option<Managed>,
    pub(super) domain: Slot<Domain>,
    grace: Arc<Grace>,
    bus_master: Arc<AtomicBool>,
    /// It was attached since the machine was reset, or a warning said that it was not.
    settled: AtomicBool,
}

/// Settings of an endpoint that do not depend on its domain.
struct Managed {
    /// In the order of their addresses.
    reserved: Box<[Reserved]>,
    /// State of the device that all endpoints share.
    common: Arc<Common>,
}

/// State that all endpoints share.
pub(super) struct Common {
    /// `bypass` of the device's configuration.
    pub bypass: AtomicBool,
    /// Whether the guest has a driver for the device.
    pub driver: AtomicBool,
}

impl Endpoint {
    /// An endpoint that the device manages, attached to nothing.
    pub(super) fn new(id: u32, mut reserved: Vec<Reserved>, common: Arc<Common>, grace: Arc<Grace>) -> Self {
        reserved.sort_by_key(|region| region.start);
        let managed = Managed { reserved: reserved.into_boxed_slice(), common };
        Endpoint { managed: Some(managed), ..Endpoint::unknown(id, grace) }
    }

    /// An endpoint that the device does not manage: all its accesses fault.
    pub(super) fn unknown(id: u32, grace: Arc<Grace>) -> Self {
        let (bus_master, settled) = Default::default();
        Endpoint { id, managed: None, domain: Slot::empty(), grace, bus_master, settled }
    }

    /// The endpoint id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether its function may access memory at all: the function stores Bus Master Enable of its PCI command register
    /// here. A reset of the machine clears it for an attached endpoint, before the endpoint's I/O virtual addresses get
    /// another meaning. A reader must hold a [`grace::Guard`].
    pub fn bus_master(&self) -> &Arc<AtomicBool> {
        &self.bus_master
    }

    /// Notes that the endpoint was attached (true), or that the machine was reset (false).
    pub(super) fn set_settled(&self, settled: bool) {
        self.settled.store(settled, Ordering::Relaxed);
    }

    /// Warns, once, that the endpoint is in bypass because it has no domain. Without a driver that is normal.
    fn unattached(&self, common: &Common) {
        if common.driver.load(Ordering::Relaxed) && !self.settled.swap(true, Ordering::Relaxed) {
            log::warn!(
                "Endpoint {:#x} accesses memory untranslated: the guest has a driver for this IOMMU, but the driver did not \
                 attach the endpoint. Another IOMMU of the machine (-device intel-iommu) may have taken the endpoint, its own \
                 driver may have started before the IOMMU's, or its bus number may differ from the topology's",
                self.id
            );
        }
    }

    /// The reserved regions, in the order of their addresses.
    pub(super) fn reserved(&self) -> &[Reserved] {
        self.managed.as_ref().map_or(&[], |managed| &managed.reserved)
    }

    /// Translates one address. The result may be used until `guard` is dropped: no request that invalidates it is
    /// answered before that.
    ///
    /// # Panics
    /// If `guard` belongs to another device's reader, as it would keep nothing alive.
    pub fn translate(&self, guard: &grace::Guard<'_>, iova: u64, access: Access) -> Result<Translation, Refused> {
        assert!(guard.is_of(&self.grace));
        let Some(managed) = &self.managed else {
            return Err(Refused { reason: FaultReason::Unknown, domain: None });
        };
        // This one read decides: all that follows uses this domain, whatever is attached meanwhile.
        // SAFETY: the assertion above shows that the guard belongs to the device's own grace periods.
        let domain = unsafe { self.domain.get(guard) };
        let id = domain.map(|domain| domain.id);
        let refused = |reason| Err(Refused { reason, domain: id });

        // One answer holds up to the next reserved region.
        let mut limit = u64::MAX - iova;
        let after = managed.reserved.iter().find(|region| region.end >= iova);
        if let Some(region) = after {
            if region.start <= iova {
                return match region.kind {
                    ResvMemKind::Reserved => refused(FaultReason::Mapping),
                    ResvMemKind::Msi => Ok(Translation {
                        gpa: iova,
                        len: (region.end - iova).saturating_add(1),
                        route: Route::Msi,
                        domain: id.unwrap_or(0),
                        tag: 0,
                    }),
                };
            }
            limit = region.start - iova - 1;
        }
        let limit = limit.saturating_add(1);

        let bypass = Translation { gpa: iova, len: limit, route: Route::Bypass, domain: id.unwrap_or(0), tag: 0 };
        let Some(domain) = domain else {
            if !managed.common.bypass.load(Ordering::Acquire) {
                return refused(FaultReason::Domain);
            }
            self.unattached(&managed.common);
            return Ok(bypass);
        };
        let Some(space) = &domain.space else { return Ok(bypass) };
        let needed = match access {
            Access::Read => MapFlags::READ,
            Access::Write => MapFlags::WRITE,
        };
        match space.lookup(guard, iova) {
            Some(found) if found.flags.contains(needed) => Ok(Translation {
                gpa: found.phys,
                len: found.len.min(limit),
                route: Route::Mapped,
                domain: domain.id,
                tag: found.tag,
            }),
            _ => refused(FaultReason::Mapping),
        }
    }
}

/// A place for an `Arc`. Readers borrow its value without counting, for as long as their guard lives.
pub(super) struct Slot<T> {
    pointer: AtomicPtr<T>,
    /// The slot owns one count.
    owner: PhantomData<Arc<T>>,
}

impl<T> Slot<T> {
    fn empty() -> Self {
        Slot { pointer: AtomicPtr::new(ptr::null_mut()), owner: PhantomData }
    }

    /// The value in the slot.
    ///
    /// # Safety
    /// The guard must belong to the grace periods for which the callers of [`Slot::replace`] wait.
    unsafe fn get<'g>(&self, _guard: &'g grace::Guard<'_>) -> Option<&'g T> {
        // SAFETY: a pointer that is not null came from `Arc::into_raw` in `replace`. The slot owns a count until
        // another `replace` takes the pointer out, and that call's caller keeps the count until a grace period that
        // began after the call has ended. That grace period waits for `_guard` if the guard could have loaded the
        // pointer.
        unsafe { self.pointer.load(Ordering::Acquire).as_ref() }
    }

    /// Puts `new` into the slot and returns the old value. The caller must keep the old value until a grace period that
    /// begins after this call has ended.
    #[must_use]
    pub(super) fn replace(&self, new: Option<Arc<T>>) -> Option<Arc<T>> {
        let new = new.map_or(ptr::null_mut(), |new| Arc::into_raw(new).cast_mut());
        let old = self.pointer.swap(new, Ordering::AcqRel);
        // SAFETY: a pointer that is not null came from `Arc::into_raw` above, and the swap made this call its only
        // owner.
        (!old.is_null()).then(|| unsafe { Arc::from_raw(old) })
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        // Nobody reads a slot that is being dropped. A reader of the same value through another slot relies on that
        // slot's count.
        drop(self.replace(None));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::address_space::AddressSpace;

    const MSI: Reserved = Reserved { kind: ResvMemKind::Msi, start: 0xfee0_0000, end: 0xfeef_ffff };
    const HOLE: Reserved = Reserved { kind: ResvMemKind::Reserved, start: 0x8000, end: 0x8fff };

    fn endpoint(bypass: bool, grace: &Arc<Grace>) -> Endpoint {
        Endpoint::new(8, vec![MSI, HOLE], common(bypass), grace.clone())
    }

    fn common(bypass: bool) -> Arc<Common> {
        Arc::new(Common { bypass: bypass.into(), driver: false.into() })
    }

    #[test]
    fn bypass_stops_short_of_a_reserved_region_and_goes_on_behind_it() {
        let grace = Grace::new();
        let mut reader = grace.reader();
        let guard = reader.enter();
        let endpoint = endpoint(true, &grace);
        let at = |iova| endpoint.translate(&guard, iova, Access::Read).map(|found| (found.route, found.gpa, found.len));
        assert_eq!(at(0x1000), Ok((Route::Bypass, 0x1000, 0x7000)));
        assert_eq!(at(0x7fff), Ok((Route::Bypass, 0x7fff, 1)));
        assert_eq!(at(0x8000).unwrap_err().reason, FaultReason::Mapping);
        assert_eq!(at(0x9000), Ok((Route::Bypass, 0x9000, MSI.start - 0x9000)));
        assert_eq!(at(MSI.start), Ok((Route::Msi, MSI.start, 0x10_0000)));
        assert_eq!(at(MSI.end), Ok((Route::Msi, MSI.end, 1)));
        assert_eq!(at(u64::MAX), Ok((Route::Bypass, u64::MAX, 1)));
    }

    #[test]
    fn a_run_of_2_to_the_64_does_not_overflow() {
        let grace = Grace::new();
        let mut reader = grace.reader();
        let guard = reader.enter();
        let endpoint = Endpoint::new(8, Vec::new(), common(true), grace.clone());
        assert_eq!(endpoint.translate(&guard, 0, Access::Read).map(|found| found.len), Ok(u64::MAX));
    }

    #[test]
    fn who_is_not_attached_though_there_is_a_driver_is_told_of_once() {
        let grace = Grace::new();
        let mut reader = grace.reader();
        let guard = reader.enter();
        let common = common(true);
        let endpoint = Endpoint::new(8, Vec::new(), common.clone(), grace.clone());
        let access = || endpoint.translate(&guard, 0, Access::Read).map(drop).unwrap();
        let is_told = || endpoint.settled.load(Ordering::Relaxed);
        access();
        assert!(!is_told(), "firmware may do that");
        common.driver.store(true, Ordering::Relaxed);
        access();
        assert!(is_told());
    }

    #[test]
    fn a_slot_frees_what_it_holds() {
        let slot = Slot::empty();
        let value = Arc::new(5);
        assert!(slot.replace(Some(value.clone())).is_none());
        assert_eq!(Arc::strong_count(&value), 2);
        drop(slot);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn a_domain_outlives_the_device_for_the_endpoint_that_is_attached() {
        let grace = Grace::new();
        let mut reader = grace.reader();
        let endpoint = endpoint(false, &grace);
        let domain = Arc::new(Domain { id: 3, space: None::<AddressSpace> });
        assert!(endpoint.domain.replace(Some(domain)).is_none());
        let guard = reader.enter();
        assert_eq!(endpoint.translate(&guard, 0, Access::Write).map(|found| found.domain), Ok(3));
    }
}
