//! Sequences of requests, each compared with a naive model. At the end nothing may be left.
#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use viommu::iommu::grace::Reader;
use viommu::iommu::{EndpointSettings, Iommu, Limits, Outcome, Request, Reserved, Settings};
use viommu_fuzz::Input;
use viommu_trace::Tracer;
use viommu_trace::event::Access;
use viommu_wire::split::{Extent, Link, Range, request_type as split};
use viommu_wire::virtio_iommu::{
    ATTACH_F_BYPASS, Attach, Detach, Head, Map, MapFlags, ResvMemKind, Status, Unmap, request_type as base,
};
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;
/// The last of them has an MSI region, which the model does not know.
const ENDPOINTS: [u32; 3] = [0x20, 0x28, 0x30];
const MSI: std::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// A small budget, so that it is used up.
const TABLE_BYTES: u64 = 4 << 20;

fuzz_target!(|data: &[u8]| {
    let mut pair = Pair::new();
    let mut input = Input::new(data);
    while pair.step(&mut input).is_some() {}
    pair.end();
});

/// The page for a byte of the input. Pages are around borders of tables of several levels.
fn page(number: u8) -> u64 {
    const BASES: [u64; 6] =
        [0, 0x1f_f000, 0x3fff_f000, 0x7f_ffff_f000, 0xffff_ffff_f000, 0xffff_ffff_fff0_0000 - 0x10_0000];
    BASES[usize::from(number >> 5) % BASES.len()].wrapping_add(u64::from(number & 31) * PAGE)
}

/// The target of a mapping or of a linked page.
#[derive(Clone, Copy)]
struct Target {
    phys: u64,
    flags: u32,
}

#[derive(Default)]
struct Domain {
    bypass: bool,
    endpoints: usize,
    /// By their first address, each with its last.
    mappings: BTreeMap<u64, (u64, Target)>,
    reservations: BTreeMap<u64, u64>,
    links: BTreeMap<u64, Target>,
}

impl Domain {
    fn maps_any(&self, start: u64, end: u64) -> bool {
        self.mappings.iter().any(|(first, (last, _))| *first <= end && start <= *last)
    }

    fn reserves_any(&self, start: u64, end: u64) -> bool {
        self.reservations.iter().any(|(first, last)| *first <= end && start <= *last)
    }

    fn reserves_all(&self, start: u64, end: u64) -> bool {
        self.reservations.iter().any(|(first, last)| *first <= start && end <= *last)
    }

    /// Whether a mapping is partly inside a range.
    fn splits(&self, start: u64, end: u64) -> bool {
        self.mappings.iter().any(|(first, (last, _))| {
            let (meets, inside) = (*first <= end && start <= *last, start <= *first && *last <= end);
            meets && !inside
        })
    }

    fn find(&self, iova: u64) -> Option<Target> {
        let mapping = || {
            let (first, (last, target)) = self.mappings.range(..=iova).next_back()?;
            let phys = target.phys.wrapping_add(iova - first);
            (*last >= iova).then_some(Target { phys, flags: target.flags })
        };
        self.links.get(&iova).copied().or_else(mapping)
    }
}

/// The device and the model of it.
struct Pair {
    iommu: Arc<Iommu>,
    reader: Reader,
    domains: BTreeMap<u32, Domain>,
    attached: BTreeMap<u32, u32>,
}

impl Pair {
    fn new() -> Self {
        let msi = Reserved { kind: ResvMemKind::Msi, start: *MSI.start(), end: *MSI.end() };
        let [.., with_msi] = ENDPOINTS;
        let reserved = |id| if id == with_msi { vec![msi] } else { Vec::new() };
        let endpoints = ENDPOINTS.map(|id| EndpointSettings { id, reserved: reserved(id) }).into();
        let limits = Limits { table_bytes: TABLE_BYTES, ..Limits::default() };
        let iommu = Iommu::new(Settings { endpoints, limits, ..Settings::default() }, Tracer::default());
        iommu.set_features(u64::MAX);
        let reader = iommu.reader();
        Pair { iommu, reader, domains: BTreeMap::new(), attached: BTreeMap::new() }
    }

    fn step(&mut self, input: &mut Input) -> Option<()> {
        let [what, a, b, c] = input.array()?;
        let domain = u32::from(what >> 4 & 3);
        let endpoint = ENDPOINTS[usize::from(what >> 6) % ENDPOINTS.len()];
        let start = page(a);
        let len = if b & 0x80 == 0 { u64::from(b) * PAGE } else { PAGE << u64::from(b & 0x3f).min(51) };
        let end = start.wrapping_add(len).wrapping_sub(1);
        let (phys, flags) = (u64::from(c) * PAGE, u32::from(c) & 7);
        let target = Target { phys, flags };
        match what & 15 {
            0 => self.attach(domain, endpoint, c & 1 != 0),
            1 => self.detach(domain, endpoint),
            2..=4 => self.map(domain, start, end, target),
            5 | 6 => self.unmap(domain, start, end),
            7 | 8 => self.reserve(domain, start, end),
            9 | 10 => self.link(domain, start, b, target),
            11 | 12 => self.unlink(domain, start, end),
            13 => self.release(domain, start, end),
            14 => self.iommu.synchronize(),
            // Bytes that may be any request. Any request but PROBE would change the device without the model's
            // knowledge.
            _ => {
                let bytes = [&[c, a][..], input.bytes(usize::from(b).min(80))].concat();
                if let Ok(request @ Request::Probe(_)) = Request::parse(&bytes, self.iommu.features()) {
                    self.iommu.execute(&request, &mut [0; 600]);
                }
            }
        }
        for number in [a, a ^ 1, b, c, a.wrapping_add(b)] {
            self.compare(page(number));
        }
        Some(())
    }

    fn execute(&self, bytes: &[u8]) -> Outcome {
        let request = Request::parse(bytes, self.iommu.features()).unwrap();
        self.iommu.execute(&request, &mut [0; 512])
    }

    fn is_ok(&self, bytes: &[u8]) -> bool {
        self.execute(bytes).status == Status::Ok
    }

    /// The model's domain: a request that succeeded had one.
    fn domain(&mut self, id: u32) -> &mut Domain {
        self.domains.get_mut(&id).unwrap_or_else(|| panic!("a request in domain {id}, which is not there, succeeded"))
    }

    fn leave(&mut self, id: u32) {
        let domain = self.domain(id);
        domain.endpoints -= 1;
        if domain.endpoints == 0 {
            domain.mappings.clear();
        }
        self.end_unused();
    }

    fn end_unused(&mut self) {
        self.domains.retain(|_, domain| domain.endpoints > 0 || !domain.reservations.is_empty());
    }

    fn attach(&mut self, id: u32, endpoint: u32, bypass: bool) {
        let flags = if bypass { ATTACH_F_BYPASS } else { 0 };
        let (domain, of, flags) = (id.into(), endpoint.into(), flags.into());
        let request = Attach { head: head(base::ATTACH), domain, endpoint: of, flags, reserved: [0; 4] };
        let expected = self.domains.get(&id).is_none_or(|domain| domain.bypass == bypass);
        assert_eq!(self.is_ok(request.as_bytes()), expected, "ATTACH");
        if expected && self.attached.get(&endpoint) != Some(&id) {
            if let Some(before) = self.attached.insert(endpoint, id) {
                self.leave(before);
            }
            let domain = self.domains.entry(id).or_default();
            domain.bypass = bypass;
            domain.endpoints += 1;
        }
    }

    fn detach(&mut self, id: u32, endpoint: u32) {
        let request =
            Detach { head: head(base::DETACH), domain: id.into(), endpoint: endpoint.into(), reserved: [0; 8] };
        let expected = self.attached.get(&endpoint) == Some(&id);
        assert_eq!(self.is_ok(request.as_bytes()), expected, "DETACH");
        if expected {
            self.attached.remove(&endpoint);
            self.leave(id);
        }
    }

    fn map(&mut self, id: u32, start: u64, end: u64, target: Target) {
        let request = Map {
            head: head(base::MAP),
            domain: id.into(),
            virt_start: start.into(),
            virt_end: end.into(),
            phys_start: target.phys.into(),
            flags: target.flags.into(),
        };
        if self.is_ok(request.as_bytes()) {
            let domain = self.domain(id);
            assert!(!domain.bypass && domain.endpoints > 0 && start <= end, "MAP");
            assert!(!domain.maps_any(start, end) && !domain.reserves_any(start, end), "MAP of what is taken");
            domain.mappings.insert(start, (end, target));
        }
    }

    fn unmap(&mut self, id: u32, start: u64, end: u64) {
        let (domain, virt_start, virt_end) = (id.into(), start.into(), end.into());
        let request = Unmap { head: head(base::UNMAP), domain, virt_start, virt_end, reserved: [0; 4] };
        if self.is_ok(request.as_bytes()) {
            let domain = self.domain(id);
            assert!(domain.endpoints > 0 && start <= end && !domain.splits(start, end), "UNMAP of a part of a mapping");
            domain.mappings.retain(|first, (last, _)| *first < start || *last > end);
        } else if let Some(domain) = self.domains.get(&id)
            && !domain.bypass
            && domain.endpoints > 0
            && start <= end
            && !domain.reserves_any(start, end)
        {
            assert!(domain.splits(start, end), "UNMAP is refused without a reason");
        }
    }

    fn reserve(&mut self, id: u32, start: u64, end: u64) {
        if self.is_ok(range(split::RESERVE, id, start, end).as_bytes()) {
            let domain = self.domain(id);
            assert!(!domain.maps_any(start, end) && !domain.reserves_any(start, end), "RESERVE of what is taken");
            domain.reservations.insert(start, end);
        }
    }

    fn link(&mut self, id: u32, start: u64, shape: u8, target: Target) {
        let extents = [(target.phys, u64::from(shape & 15) + 1), (0x100_0000, 1 + u64::from(shape >> 4) * 273)];
        let extents = &extents[..1 + usize::from(shape & 0x10 != 0)];
        let request = Link {
            head: head(split::LINK),
            domain: id.into(),
            virt_start: start.into(),
            tag: 7.into(),
            flags: target.flags.into(),
            count: (extents.len() as u32).into(),
        };
        let wire: Vec<Extent> = extents.iter().map(|(phys, count)| Extent::new(*phys, *count).unwrap()).collect();
        if self.is_ok(&[request.as_bytes(), wire.as_bytes()].concat()) {
            let domain = self.domain(id);
            let mut iova = start;
            for (phys, count) in extents {
                for granule in 0..*count {
                    let linked = Target { phys: phys + granule * PAGE, flags: target.flags };
                    assert!(domain.links.insert(iova, linked).is_none(), "LINK of what is linked");
                    iova += PAGE;
                }
            }
            assert!(domain.reserves_all(start, iova - 1), "LINK outside of a reservation");
        }
    }

    fn unlink(&mut self, id: u32, start: u64, end: u64) {
        let outcome = self.execute(range(split::UNLINK, id, start, end).as_bytes());
        if outcome.status == Status::Ok {
            assert!(self.domain(id).reserves_all(start, end), "UNLINK outside of a reservation");
            assert_eq!(outcome.granules, self.unlinked(id, start, end), "UNLINK");
        }
    }

    fn release(&mut self, id: u32, start: u64, end: u64) {
        let outcome = self.execute(range(split::RELEASE, id, start, end).as_bytes());
        if outcome.status == Status::Ok {
            assert_eq!(self.domain(id).reservations.remove(&start), Some(end), "RELEASE of no reservation");
            assert_eq!(outcome.granules, self.unlinked(id, start, end), "RELEASE");
            self.end_unused();
        }
    }

    fn unlinked(&mut self, id: u32, start: u64, end: u64) -> u64 {
        let domain = self.domain(id);
        let before = domain.links.len();
        domain.links.retain(|iova, _| !(start..=end).contains(iova));
        (before - domain.links.len()) as u64
    }

    /// Checks that every endpoint reaches the targets of the model.
    fn compare(&mut self, iova: u64) {
        let guard = self.reader.enter();
        for endpoint in ENDPOINTS {
            if endpoint == ENDPOINTS[2] && MSI.contains(&iova) {
                continue;
            }
            let found = self.iommu.endpoint(endpoint).translate(&guard, iova, Access::Read);
            let domain = self.attached.get(&endpoint).map(|id| &self.domains[id]);
            let expected = match domain {
                Some(domain) if !domain.bypass => {
                    let readable = |target: &Target| target.flags & MapFlags::READ.bits() != 0;
                    domain.find(iova).filter(readable).map(|target| target.phys)
                }
                _ => Some(iova),
            };
            assert_eq!(found.ok().map(|found| found.gpa), expected, "endpoint {endpoint:#x} at {iova:#x}");
        }
    }

    /// Checks that the counters match the model, and that nothing is left after a reset.
    fn end(self) {
        let sum = |count: fn(&Domain) -> usize| self.domains.values().map(count).sum::<usize>() as u64;
        let stats = self.iommu.stats();
        assert_eq!(stats.mappings_live, sum(|domain| domain.mappings.len()));
        assert_eq!(stats.reservations_live, sum(|domain| domain.reservations.len()));
        assert_eq!(stats.linked_bytes, sum(|domain| domain.links.len()) * PAGE);
        self.iommu.device_reset();
        // Memory that waits for a grace period is freed after one.
        self.iommu.write_bypass(1);
        assert_eq!(self.iommu.stats().table_bytes, 0);
    }
}

fn head(kind: u8) -> Head {
    Head { kind, reserved: [0; 3] }
}

fn range(kind: u8, domain: u32, start: u64, end: u64) -> Range {
    let (virt_start, virt_end) = (start.into(), end.into());
    Range { head: head(kind), domain: domain.into(), virt_start, virt_end, tag: 5.into(), flags: 0.into() }
}
