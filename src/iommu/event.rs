//! Requests as events of the trace.

use super::request::{Outcome, Request};
use viommu_trace::Event;
use viommu_wire::split::{Extent, Link, Range};

impl Request<'_> {
    /// The trace event of this request with its outcome. Its duration is not known yet. `granule` is the device's.
    pub fn event(&self, outcome: Outcome, granule: u64) -> Event {
        let (mut endpoint, mut domain, mut flags) = (None, 0, 0);
        let (mut virt_start, mut virt_end, mut phys_start) = (0, 0, 0);
        match self {
            Request::Attach(attach) => {
                (endpoint, domain, flags) = (Some(attach.endpoint.get()), attach.domain.get(), attach.flags.get());
            }
            Request::Detach(detach) => (endpoint, domain) = (Some(detach.endpoint.get()), detach.domain.get()),
            Request::Map(map) => {
                (domain, flags) = (map.domain.get(), map.flags.get());
                (virt_start, virt_end, phys_start) = (map.virt_start.get(), map.virt_end.get(), map.phys_start.get());
            }
            Request::Unmap(unmap) => {
                (domain, virt_start, virt_end) = (unmap.domain.get(), unmap.virt_start.get(), unmap.virt_end.get());
            }
            Request::Probe(probe) => endpoint = Some(probe.endpoint.get()),
            Request::Link(link, extents) => return link_event(link, extents, outcome, granule),
            Request::Reserve(range) | Request::Unlink(range) | Request::Release(range) => {
                return range_event(range, outcome);
            }
        }
        Event::Request {
            request: self.request_type() as u8,
            status: outcome.status as u8,
            endpoint,
            domain,
            flags,
            virt_start,
            virt_end,
            phys_start,
            duration: 0,
        }
    }
}

/// The trace event of a RESERVE, UNLINK or RELEASE.
fn range_event(range: &Range, outcome: Outcome) -> Event {
    Event::Split {
        request: range.head.kind,
        status: outcome.status as u8,
        domain: range.domain.get(),
        flags: range.flags.get(),
        virt_start: range.virt_start.get(),
        virt_end: range.virt_end.get(),
        tag: range.tag.get(),
        count: u32::try_from(outcome.granules).unwrap_or(u32::MAX),
        duration: 0,
    }
}

/// The trace event of a LINK. Its range is that of the extents that the request had.
fn link_event(link: &Link, extents: &[Extent], outcome: Outcome, granule: u64) -> Event {
    let granules: u64 = extents.iter().map(|extent| extent.granules()).sum();
    let start = link.virt_start.get();
    Event::Split {
        request: link.head.kind,
        status: outcome.status as u8,
        domain: link.domain.get(),
        flags: link.flags.get(),
        virt_start: start,
        virt_end: start.saturating_add(granules.saturating_mul(granule)).saturating_sub(1),
        tag: link.tag.get(),
        count: link.count.get(),
        duration: 0,
    }
}
