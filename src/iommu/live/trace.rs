//! What is live, as the trace tells it.

use viommu_trace::event::StateItem;
use viommu_trace::{Event, StateSource};
use viommu_wire::virtio_iommu::MapFlags;

use super::{Live, LiveItem};
use crate::iommu::address_space::Mapped;

impl StateSource for Live {
    fn step(&mut self, now: &dyn Fn() -> u64, take: &mut dyn FnMut(u64, Event)) -> bool {
        Live::step(self, now, |at, item| take(at, event(&item)))
    }
}

fn event(item: &LiveItem) -> Event {
    let (mut endpoint, mut bypass) = (None, false);
    let mut range = Mapped { start: 0, end: 0, phys: 0, flags: MapFlags::empty(), tag: None };
    let (item, domain) = match *item {
        LiveItem::Domain { domain, bypass: is_bypass } => {
            bypass = is_bypass;
            (StateItem::Domain, domain)
        }
        LiveItem::Attached { endpoint: id, domain } => {
            endpoint = Some(id);
            (StateItem::Endpoint, domain)
        }
        LiveItem::Reservation { domain, start, end } => {
            (range.start, range.end) = (start, end);
            (StateItem::Reservation, domain)
        }
        LiveItem::Mapped { domain, mapped } => {
            range = mapped;
            (if mapped.tag.is_some() { StateItem::Linked } else { StateItem::Mapping }, domain)
        }
    };
    Event::State {
        endpoint,
        item,
        domain,
        bypass,
        virt_start: range.start,
        virt_end: range.end,
        phys_start: range.phys,
        flags: range.flags.bits(),
        tag: range.tag.unwrap_or(0),
        lost: 0,
    }
}
