//! Whichever requests go on while the state is read: together with them it gives the state at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;

use proptest::prelude::*;
use viommu_trace::event::{Channel, ResetKind, StateItem};
use viommu_trace::{self as trace, Event, Format, Item, Stamped, Subscription, TraceFile, Tracer};
use viommu_wire::request::RequestType;
use viommu_wire::split::{Extent, F_SPLIT_MAP, Link, Range};
use viommu_wire::virtio_iommu::{Attach, Detach, Head, Map, MapFlags, Status, Unmap, feature};
use zerocopy::IntoBytes;

use super::*;
use crate::iommu::{EndpointSettings, Request, Settings};

const PAGE: u64 = 4096;
const ENDPOINTS: u32 = 3;

/// All requests that change anything.
const TYPES: [RequestType; 8] = [
    RequestType::Attach,
    RequestType::Detach,
    RequestType::Map,
    RequestType::Unmap,
    RequestType::Reserve,
    RequestType::Link,
    RequestType::Unlink,
    RequestType::Release,
];

/// Where a step has the type of a request: the driver resets the device, or the frontend leaves.
const RESET: usize = TYPES.len();
const DISCONNECT: usize = RESET + 1;

/// A request of the driver: its type, an endpoint, a domain, the first page and the number of pages.
type Step = (usize, u32, u32, u64, u64);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few pages, so that requests meet, on both sides of a table's border.
    let kind = prop_oneof![100 => 0..TYPES.len(), 1 => RESET..=DISCONNECT];
    prop::collection::vec((kind, 0..ENDPOINTS, 0..3u32, 500u64..530, 1u64..5), 1..400)
}

fn bytes((kind, endpoint, domain, page, pages): Step) -> Vec<u8> {
    let request = TYPES[kind];
    let head = Head { kind: request as u8, reserved: [0; 3] };
    let (start, end) = ((page * PAGE).into(), ((page + pages) * PAGE - 1).into());
    let (endpoint, domain, reserved) = (endpoint.into(), domain.into(), [0; 4]);
    let (tag, flags) = ((page + pages).into(), 3.into());
    match request {
        RequestType::Attach => Attach { head, domain, endpoint, flags: 0.into(), reserved }.as_bytes().to_vec(),
        RequestType::Detach => Detach { head, domain, endpoint, reserved: [0; 8] }.as_bytes().to_vec(),
        RequestType::Map => {
            let phys_start = ((page * 7) * PAGE).into();
            Map { head, domain, virt_start: start, virt_end: end, phys_start, flags }.as_bytes().to_vec()
        }
        RequestType::Unmap => Unmap { head, domain, virt_start: start, virt_end: end, reserved }.as_bytes().to_vec(),
        RequestType::Link => {
            let link = Link { head, domain, virt_start: start, tag, flags, count: 1.into() };
            [link.as_bytes(), Extent::new(page * 9 * PAGE, pages).unwrap().as_bytes()].concat()
        }
        _ => Range { head, domain, virt_start: start, virt_end: end, tag, flags: 0.into() }.as_bytes().to_vec(),
    }
}

/// The state as a reader of the trace has it. The trace does not say where a linked page leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    domains: BTreeMap<u32, Domain>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Domain {
    members: BTreeSet<u32>,
    reservations: BTreeMap<u64, u64>,
    /// For each page, where it leads, or the tag of its LINK.
    pages: BTreeMap<u64, Result<u64, u64>>,
}

impl State {
    fn item(&mut self, item: &LiveItem) {
        match *item {
            LiveItem::Domain { domain, bypass } => {
                assert!(!bypass);
                self.domains.insert(domain, Domain::default());
            }
            LiveItem::Attached { endpoint, domain } => {
                self.domains.entry(domain).or_default().members.insert(endpoint);
            }
            LiveItem::Reservation { domain, start, end } => {
                self.domains.entry(domain).or_default().reservations.insert(start, end);
            }
            LiveItem::Mapped { domain, mapped } => {
                let pages = self.pages(domain);
                for page in mapped.start / PAGE..=mapped.end / PAGE {
                    let leads = mapped.phys + page * PAGE - mapped.start;
                    pages.insert(page, mapped.tag.map_or(Ok(leads), Err));
                }
            }
        }
    }

    /// Applies an answered request to the state, by force.
    fn event(&mut self, event: &Event) {
        match *event {
            Event::Request { request, status: 0, endpoint, domain, virt_start, virt_end, phys_start, .. } => {
                let pages = virt_start / PAGE..=virt_end / PAGE;
                match RequestType::from_number(request).unwrap() {
                    RequestType::Attach => {
                        self.leave(endpoint.unwrap(), Some(domain));
                        self.domains.entry(domain).or_default().members.insert(endpoint.unwrap());
                    }
                    RequestType::Detach => self.leave(endpoint.unwrap(), None),
                    RequestType::Map => {
                        let phys = |page| Ok(phys_start + page * PAGE - virt_start);
                        self.pages(domain).extend(pages.map(|page| (page, phys(page))));
                    }
                    RequestType::Unmap => self.pages(domain).retain(|page, _| !pages.contains(page)),
                    _ => unreachable!(),
                }
            }
            Event::Split { request, status: 0, domain, virt_start, virt_end, tag, .. } => {
                let pages = virt_start / PAGE..=virt_end / PAGE;
                match RequestType::from_number(request).unwrap() {
                    RequestType::Reserve => {
                        let entry = self.domains.entry(domain).or_default();
                        entry.reservations.insert(virt_start, virt_end);
                    }
                    RequestType::Link => self.pages(domain).extend(pages.map(|page| (page, Err(tag)))),
                    request => {
                        self.pages(domain).retain(|page, _| !pages.contains(page));
                        if request == RequestType::Release {
                            self.domains.entry(domain).or_default().reservations.remove(&virt_start);
                            self.end_unused();
                        }
                    }
                }
            }
            Event::Reset { reset: ResetKind::Device | ResetKind::System, .. }
            | Event::Session { channel: Channel::VhostUser, connected: false, .. } => self.domains.clear(),
            _ => {}
        }
    }

    fn pages(&mut self, domain: u32) -> &mut BTreeMap<u64, Result<u64, u64>> {
        &mut self.domains.entry(domain).or_default().pages
    }

    /// Detaches an endpoint from its domain, unless that is `stays`. A domain that has no endpoint any more loses what MAP
    /// mapped.
    fn leave(&mut self, endpoint: u32, stays: Option<u32>) {
        for (id, domain) in &mut self.domains {
            if Some(*id) != stays && domain.members.remove(&endpoint) && domain.members.is_empty() {
                domain.pages.retain(|_, page| page.is_err());
            }
        }
        self.end_unused();
    }

    /// A domain ends when it has neither endpoints nor reservations.
    fn end_unused(&mut self) {
        self.domains.retain(|_, domain| !domain.members.is_empty() || !domain.reservations.is_empty());
    }
}

/// Executes requests in batches, as a virtqueue's server does, and keeps their events.
struct Device {
    iommu: Arc<Iommu>,
    events: Mutex<Vec<Event>>,
    tracer: Tracer,
}

impl Device {
    fn new() -> Device {
        let endpoints = (0..ENDPOINTS).map(|id| EndpointSettings { id, reserved: Vec::new() }).collect();
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
        iommu.set_features(feature::MAP_UNMAP | F_SPLIT_MAP);
        Device { iommu, events: Mutex::default(), tracer: Tracer::default() }
    }

    /// One with a trace that tells what is live.
    fn traced() -> (Device, trace::Bound) {
        let (tracer, mut bound) = trace::bind(trace::Options::default()).unwrap();
        let device = Device { tracer, ..Device::new() };
        let iommu = device.iommu.clone();
        bound.set_state(move || Box::new(Live::new(iommu.clone())));
        (device, bound)
    }

    fn batch(&self, steps: &[Step]) {
        let journal = self.iommu.journal();
        let done: Vec<Event> = steps
            .iter()
            .map(|&step| {
                if step.0 == RESET {
                    self.iommu.device_reset();
                    return Event::Reset { reset: ResetKind::Device, endpoint: None };
                }
                if step.0 == DISCONNECT {
                    self.iommu.system_reset();
                    return Event::Session { channel: Channel::VhostUser, endpoint: None, connected: false };
                }
                let bytes = bytes(step);
                let request = Request::parse(&bytes, u64::MAX).unwrap();
                let outcome = self.iommu.execute(&request, &mut []);
                // Lets a reader come in between.
                thread::yield_now();
                request.event(outcome, PAGE)
            })
            .collect();
        self.iommu.synchronize();
        done.iter().for_each(|event| self.tracer.emit(*event));
        self.events.lock().unwrap().extend(done);
        drop(journal);
    }

    fn now(&self) -> u64 {
        self.events.lock().unwrap().len() as u64
    }

    /// Reads the live state: each item with the number of events before it.
    fn read(&self, pause: impl Fn()) -> Vec<(u64, LiveItem)> {
        let mut items = Vec::new();
        let mut live = Live::new(self.iommu.clone());
        while live.step(|| self.now(), |at, item| items.push((at, item))) {
            pause();
        }
        items
    }
}

fn state(items: &[(u64, LiveItem)]) -> State {
    let mut state = State::default();
    items.iter().for_each(|(_, item)| state.item(item));
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 200 }))]

    #[test]
    fn what_is_read_under_a_writer_is_the_state_at_the_end_with_what_was_done_since(
        before in steps(),
        during in steps(),
        size in 1usize..12,
    ) {
        let device = Device::new();
        // Without attached endpoints most requests would fail.
        device.batch(&[(0, 0, 0, 0, 1), (0, 1, 1, 0, 1), (0, 2, 1, 0, 1)]);
        before.chunks(size).for_each(|steps| device.batch(steps));
        let readings = thread::scope(|scope| {
            scope.spawn(|| during.chunks(size).for_each(|steps| device.batch(steps)));
            [(); 3].map(|()| device.read(thread::yield_now))
        });
        let events = device.events.lock().unwrap().clone();
        let end = state(&device.read(|| {}));
        let mut all = State::default();
        events.iter().for_each(|event| all.event(event));
        prop_assert_eq!(&all, &end, "the events alone");
        for items in readings {
            // Without items the first instant is not known.
            let Some(&(begin, _)) = items.first() else { continue };
            prop_assert!(items.is_sorted_by_key(|item| item.0));
            // Apply the events since the first instant after all items, or each item at its place among the events.
            let mut after = state(&items);
            events[begin as usize..].iter().for_each(|event| after.event(event));
            prop_assert_eq!(&after, &end, "from event {} on", begin);
            let (mut among, mut items) = (State::default(), items.iter().peekable());
            for number in begin..=events.len() as u64 {
                while let Some((_, item)) = items.next_if(|item| item.0 <= number) {
                    among.item(item);
                }
                events.get(number as usize).into_iter().for_each(|event| among.event(event));
            }
            prop_assert_eq!(&among, &end, "among the events from {} on", begin);
        }
    }
}

/// What a client of the trace gets from the begin mark to the end mark, and what the end mark says is missing.
fn between_the_marks(mut stream: UnixStream) -> (Vec<Stamped>, u64) {
    let subscription = Subscription { format: Format::Binary, state: true, ..Subscription::default() };
    stream.write_all(subscription.line().as_bytes()).unwrap();
    let mut trace = TraceFile::new(stream).unwrap();
    let mut found = Vec::new();
    while let Some(entry) = trace.next_entry().unwrap() {
        let Item::Event(stamped) = entry.item else { continue };
        let Event::State { item, lost, .. } = stamped.event else {
            found.push(stamped);
            continue;
        };
        match item {
            StateItem::Begin => found.clear(),
            _ => found.push(stamped),
        }
        if item == StateItem::End {
            return (found, lost);
        }
    }
    panic!("The trace ended before the end mark: {found:?}");
}

fn item_of(event: &Event) -> Option<LiveItem> {
    let &Event::State { endpoint, item, domain, bypass, virt_start, virt_end, phys_start, flags, tag, .. } = event
    else {
        return None;
    };
    let (start, end) = (virt_start, virt_end);
    let mapped = |tag| Mapped { start, end, phys: phys_start, flags: MapFlags::from_bits_retain(flags), tag };
    Some(match item {
        StateItem::Domain => LiveItem::Domain { domain, bypass },
        StateItem::Endpoint => LiveItem::Attached { endpoint: endpoint?, domain },
        StateItem::Reservation => LiveItem::Reservation { domain, start, end },
        StateItem::Mapping => LiveItem::Mapped { domain, mapped: mapped(None) },
        StateItem::Linked => LiveItem::Mapped { domain, mapped: mapped(Some(tag)) },
        StateItem::Begin | StateItem::End => return None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    #[cfg(not(miri))]
    fn what_a_client_of_the_trace_gets_between_the_marks_is_the_state_at_the_end_mark(
        before in steps(),
        during in steps(),
        size in 1usize..12,
    ) {
        let (device, mut bound) = Device::traced();
        device.batch(&[(0, 0, 0, 0, 1), (0, 1, 1, 0, 1), (0, 2, 1, 0, 1)]);
        before.chunks(size).for_each(|steps| device.batch(steps));
        let clients = [(); 3].map(|()| bound.connect().unwrap());
        let handle = bound.start().unwrap();
        let read = thread::scope(|scope| {
            scope.spawn(|| during.chunks(size).for_each(|steps| device.batch(steps)));
            let readers = clients.map(|client| scope.spawn(|| between_the_marks(client)));
            readers.map(|reader| reader.join().unwrap())
        });
        handle.stop();
        let events = device.events.lock().unwrap().clone();
        for (mut found, lost) in read {
            prop_assert_eq!(lost, 0);
            let end = found.pop().unwrap().seq;
            // What is live comes before the event with the same number.
            found.sort_by_key(|stamped| (stamped.seq, item_of(&stamped.event).is_none()));
            let (mut among, mut after) = (State::default(), State::default());
            for stamped in &found {
                match item_of(&stamped.event) {
                    Some(item) => among.item(&item),
                    None => among.event(&stamped.event),
                }
            }
            found.iter().filter_map(|stamped| item_of(&stamped.event)).for_each(|item| after.item(&item));
            let of_events = found.iter().filter(|stamped| item_of(&stamped.event).is_none());
            of_events.for_each(|stamped| after.event(&stamped.event));
            let mut expected = State::default();
            events[..end as usize].iter().for_each(|event| expected.event(event));
            prop_assert_eq!(&among, &expected, "up to event {}", end);
            prop_assert_eq!(&after, &expected, "up to event {}", end);
        }
    }
}

/// Pages can be read as soon as they are mapped, and the event of the request comes only later.
#[test]
fn the_last_step_comes_after_the_events_of_all_that_was_read() {
    let device = Device::new();
    let map = (2, 0, 1, 500, 1);
    device.batch(&[(0, 0, 1, 0, 1)]);
    let mut live = Live::new(device.iommu.clone());
    let mut mapped = 0;
    let mut step =
        || live.step(|| device.now(), |_, item| mapped += u32::from(matches!(item, LiveItem::Mapped { .. })));
    assert!(step(), "the domains");
    let journal = device.iommu.journal();
    device.iommu.execute(&Request::parse(&bytes(map), u64::MAX).unwrap(), &mut []);
    assert!((0..1000).all(|_| step()), "the request's event is missing");
    drop(journal);
    assert!(!step());
    assert_eq!(mapped, 1);
}

#[test]
fn a_status_other_than_ok_changes_nothing() {
    let device = Device::new();
    device.batch(&[(2, 0, 9, 0, 1), (1, 0, 9, 0, 1)]);
    assert!(
        device
            .events
            .lock()
            .unwrap()
            .iter()
            .all(|event| { matches!(event, Event::Request { status, .. } if *status != Status::Ok as u8) })
    );
    assert_eq!(device.read(|| {}), []);
}
