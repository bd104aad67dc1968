//! The five requests of the specification: what each does and which status it gets (section 5.13.6).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Iommu;
use super::address_space::MapError;
use viommu_wire::request::RequestType;
use viommu_wire::split::{EXTENTS_MAX, Extent, F_SPLIT_MAP, Link, Range};
use viommu_wire::virtio_iommu::{
    ATTACH_F_BYPASS, Attach, Detach, Map, MapFlags, PROBE_T_RESV_MEM, Probe, ProbeResvMem, Status, Tail, Unmap, feature,
};

/// The device-readable part of a request.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Attach an endpoint to a domain.
    Attach(&'a Attach),
    /// Detach an endpoint from its domain.
    Detach(&'a Detach),
    /// Map a range of a domain.
    Map(&'a Map),
    /// Remove the mappings in a range of a domain.
    Unmap(&'a Unmap),
    /// Ask for an endpoint's properties.
    Probe(&'a Probe),
    /// Reserve a range of a domain.
    Reserve(&'a Range),
    /// Link granules of a reservation, with the extents that follow: as many as are there, at most as many as it says.
    Link(&'a Link, &'a [Extent]),
    /// Unlink whatever is linked in a range.
    Unlink(&'a Range),
    /// End a reservation.
    Release(&'a Range),
}

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status that the driver gets.
    pub status: Status,
    /// Granules that LINK linked, or that UNLINK and RELEASE unlinked.
    pub granules: u64,
}

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotARequest {
    /// There are fewer bytes than the type needs, or too few to have a type.
    TooShort,
    /// The type does not exist with the negotiated features.
    UnknownType(u8),
}

impl<'a> Request<'a> {
    /// The most bytes that [`Request::parse`] reads.
    pub const MAX_LEN: usize = size_of::<Link>() + EXTENTS_MAX * size_of::<Extent>();

    /// Reads a request whose type exists with the negotiated `features`. Bytes behind the request are ignored.
    pub fn parse(bytes: &'a [u8], features: u64) -> Result<Request<'a>, NotARequest> {
        fn read<T: FromBytes + KnownLayout + Immutable + zerocopy::Unaligned>(bytes: &[u8]) -> Result<&T, NotARequest> {
            T::ref_from_prefix(bytes).map(|(request, _)| request).map_err(|_| NotARequest::TooShort)
        }
        if bytes.len() < size_of::<Tail>() {
            return Err(NotARequest::TooShort);
        }
        let number = bytes[0];
        let request = RequestType::from_number(number).ok_or(NotARequest::UnknownType(number))?;
        if request.is_split() && features & F_SPLIT_MAP == 0 {
            return Err(NotARequest::UnknownType(number));
        }
        match request {
            RequestType::Attach => read(bytes).map(Request::Attach),
            RequestType::Detach => read(bytes).map(Request::Detach),
            RequestType::Map => read(bytes).map(Request::Map),
            RequestType::Unmap => read(bytes).map(Request::Unmap),
            RequestType::Probe => read(bytes).map(Request::Probe),
            RequestType::Reserve => read(bytes).map(Request::Reserve),
            RequestType::Link => Self::parse_link(bytes),
            RequestType::Unlink => read(bytes).map(Request::Unlink),
            RequestType::Release => read(bytes).map(Request::Release),
        }
    }

    fn parse_link(bytes: &'a [u8]) -> Result<Request<'a>, NotARequest> {
        let (link, rest) = Link::ref_from_prefix(bytes).map_err(|_| NotARequest::TooShort)?;
        let count = (rest.len() / size_of::<Extent>()).min(link.count.get() as usize);
        let extents = <[Extent]>::ref_from_prefix_with_elems(rest, count);
        extents.map(|(extents, _)| Request::Link(link, extents)).map_err(|_| NotARequest::TooShort)
    }

    /// The request's type.
    pub fn request_type(&self) -> RequestType {
        match self {
            Request::Attach(_) => RequestType::Attach,
            Request::Detach(_) => RequestType::Detach,
            Request::Map(_) => RequestType::Map,
            Request::Unmap(_) => RequestType::Unmap,
            Request::Probe(_) => RequestType::Probe,
            Request::Reserve(_) => RequestType::Reserve,
            Request::Link(..) => RequestType::Link,
            Request::Unlink(_) => RequestType::Unlink,
            Request::Release(_) => RequestType::Release,
        }
    }
}

/// `Ok` if a request was done; otherwise the status that says why not.
type Done = Result<(), Status>;

pub(super) fn require(condition: bool, status: Status) -> Done {
    condition.then_some(()).ok_or(status)
}

impl From<MapError> for Status {
    fn from(error: MapError) -> Self {
        match error {
            MapError::Overlap => Status::Inval,
            MapError::NoMemory => Status::NoMem,
        }
    }
}

impl Iommu {
    /// Executes a request. `properties` is the device-writable part before the tail. PROBE writes all of it, other requests
    /// leave it alone. If the request removed something, the caller must call [`Iommu::synchronize`] before it answers the
    /// driver.
    pub fn execute(&self, request: &Request<'_>, properties: &mut [u8]) -> Outcome {
        let done = match request {
            Request::Attach(attach) => self.attach(attach).map(|()| 0),
            Request::Detach(detach) => self.detach(detach).map(|()| 0),
            Request::Map(map) => self.map(map).map(|()| 0),
            Request::Unmap(unmap) => self.unmap(unmap).map(|()| 0),
            Request::Probe(probe) => self.probe(probe, properties).map(|()| 0),
            Request::Reserve(range) => self.reserve(range),
            Request::Link(link, extents) => self.link(link, extents),
            Request::Unlink(range) => self.unlink(range),
            Request::Release(range) => self.release(range),
        };
        let status = done.err().unwrap_or(Status::Ok);
        self.counters.request(request.request_type(), status);
        Outcome { status, granules: done.unwrap_or(0) }
    }

    /// Answers a request with a status and does not execute it.
    pub fn refuse(&self, request: &Request<'_>, status: Status) -> Outcome {
        self.counters.request(request.request_type(), status);
        Outcome { status, granules: 0 }
    }

    /// Section 5.13.6.3.2. Everything is checked before anything changes.
    fn attach(&self, request: &Attach) -> Done {
        let (id, flags) = (request.domain.get(), request.flags.get());
        let bypass = flags & ATTACH_F_BYPASS != 0;
        require(flags & !ATTACH_F_BYPASS == 0 && request.reserved == [0; 4], Status::Inval)?;
        require(!bypass || self.accepted(feature::BYPASS_CONFIG), Status::Inval)?;
        self.check_domain_range(id)?;
        let endpoint = self.endpoints.get(&request.endpoint.get()).ok_or(Status::NoEnt)?;

        let mut domains = self.domains();
        match domains.get(id) {
            Some(entry) if bypass && entry.members.is_empty() => return Err(self.reserved_status(entry)),
            Some(entry) => require(bypass == entry.domain.space.is_none(), Status::Inval)?,
            None => {
                let others = domains.count_without(endpoint.id());
                require(others < self.settings.limits.domains as usize, Status::NoMem)?;
            }
        }
        // Attaching to the same domain again changes nothing. In particular it does not end the domain.
        if domains.of(endpoint.id()) != Some(id) {
            let lost = domains.attach(endpoint, id, || self.new_domain(id, bypass));
            self.counters.unmapped(lost);
        }
        Ok(())
    }

    /// Section 5.13.6.4.2. `reserved` is ignored, as the specification demands.
    fn detach(&self, request: &Detach) -> Done {
        let endpoint = self.endpoints.get(&request.endpoint.get()).ok_or(Status::NoEnt)?;
        let lost = self.domains().detach(endpoint, request.domain.get())?;
        self.counters.unmapped(lost);
        Ok(())
    }

    /// Section 5.13.6.5.2, and rule S10 of the split protocol.
    fn map(&self, request: &Map) -> Done {
        let flags = self.map_flags(request.flags.get())?;
        self.check_domain_range(request.domain.get())?;
        let (start, end, phys) = (request.virt_start.get(), request.virt_end.get(), request.phys_start.get());

        let mut domains = self.domains();
        let entry = domains.get_attached(request.domain.get()).ok_or(Status::NoEnt)?;
        let space = entry.domain.space.as_ref().ok_or(Status::Inval)?;
        self.check_map_range(start, end, phys)?;
        require(!entry.is_reserved(start, end), Status::Inval)?;
        if entry.reservations.touch(start, end) {
            return Err(self.reserved_status(entry));
        }
        space.map(start, end, phys, flags)?;
        self.counters.mapped();
        Ok(())
    }

    /// Section 5.13.6.6.2. The specification leaves open what a `reserved` that is not zero does: here the request is refused
    /// and removes nothing. By rule S10 of the split protocol, so is one whose range touches a reservation.
    fn unmap(&self, request: &Unmap) -> Done {
        require(request.reserved == [0; 4], Status::Inval)?;
        self.check_domain_range(request.domain.get())?;
        let (start, end) = (request.virt_start.get(), request.virt_end.get());

        let mut domains = self.domains();
        let entry = domains.get_attached(request.domain.get()).ok_or(Status::NoEnt)?;
        let space = entry.domain.space.as_ref().ok_or(Status::Inval)?;
        require(start <= end, Status::Range)?;
        if entry.reservations.touch(start, end) {
            return Err(self.reserved_status(entry));
        }
        let removed = space.unmap(start, end).map_err(|_| Status::Range)?;
        self.counters.unmapped(removed.mappings);
        if removed.mappings > 0 {
            domains.note_removal();
        }
        Ok(())
    }

    /// Section 5.13.6.7.2.
    fn probe(&self, request: &Probe, properties: &mut [u8]) -> Done {
        properties.fill(0);
        let endpoint = self.endpoints.get(&request.endpoint.get()).ok_or(Status::NoEnt)?;
        require(properties.len() >= self.probe_size(), Status::Inval)?;
        let slots = properties.chunks_exact_mut(size_of::<ProbeResvMem>());
        for (region, slot) in endpoint.reserved().iter().zip(slots) {
            let property = ProbeResvMem {
                kind: PROBE_T_RESV_MEM.into(),
                length: ((size_of::<ProbeResvMem>() - 4) as u16).into(),
                subtype: region.kind as u8,
                reserved: [0; 3],
                start: region.start.into(),
                end: region.end.into(),
            };
            slot.copy_from_slice(property.as_bytes());
        }
        Ok(())
    }

    /// The flags of a MAP or a LINK.
    pub(super) fn map_flags(&self, bits: u32) -> Result<MapFlags, Status> {
        let flags = MapFlags::from_bits(bits).ok_or(Status::Inval)?;
        require(!flags.contains(MapFlags::MMIO) || self.accepted(feature::MMIO), Status::Inval)?;
        Ok(flags)
    }

    pub(super) fn check_domain_range(&self, id: u32) -> Done {
        let (first, last) = self.settings.domain_range;
        require((first..=last).contains(&id), Status::Range)
    }

    pub(super) fn check_map_range(&self, start: u64, end: u64, phys: u64) -> Done {
        let offset = self.settings.granule() - 1;
        require(start <= end, Status::Range)?;
        require((start | phys | end.wrapping_add(1)) & offset == 0, Status::Range)?;
        let (first, last) = self.settings.input_range;
        require(first <= start && end <= last, Status::Range)?;
        require(phys.checked_add(end - start).is_some(), Status::Range)
    }

    fn accepted(&self, feature: u64) -> bool {
        self.features() & feature != 0
    }
}
