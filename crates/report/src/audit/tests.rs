//! Traces of a few events, and what is found in them.

use serde_json::Value;
use viommu_trace::event::{Access, Route, StateItem};
use viommu_trace::{Event, Item, Stamped};
use viommu_wire::model::{Model, Part};
use viommu_wire::nvme::{self, DataPointer};
use viommu_wire::request::RequestType;

use super::{Audit, Settings, to_json};

const PAGE: u64 = 4096;
const ENDPOINT: u32 = 32;

/// A trace that is being made; each event comes a microsecond after the one before.
struct Trace {
    audit: Audit,
    seq: u64,
}

impl Trace {
    fn new() -> Trace {
        let mut trace = Trace { audit: Audit::new(Settings::default()), seq: 0 };
        trace.base(RequestType::Attach, 0, 0);
        trace
    }

    fn put(&mut self, event: Event) -> u64 {
        self.seq += 1;
        self.put_as(self.seq, event);
        self.seq
    }

    fn put_as(&mut self, seq: u64, event: Event) {
        self.audit.read(&Item::Event(Stamped { time_ns: seq * 1000, seq, event }));
    }

    fn base(&mut self, request: RequestType, start: u64, pages: u64) -> u64 {
        self.put(base(request, start, pages))
    }

    fn split(&mut self, request: RequestType, start: u64, pages: u64) -> u64 {
        self.put(Event::Split {
            request: request as u8,
            status: 0,
            domain: 1,
            virt_start: start,
            virt_end: start + (pages * PAGE - 1),
            tag: 0,
            count: 1,
            flags: 3,
            duration: 100,
        })
    }

    fn dma(&mut self, iova: u64, len: u32) {
        self.put(Event::Dma {
            endpoint: ENDPOINT,
            access: Access::Read,
            route: Route::Mapped,
            failed: false,
            iova,
            gpa: iova,
            len,
            domain: 1,
            tag: 0,
        });
    }

    fn command(&mut self, data: u64, len: u32) {
        let part: Part = nvme::Command { slba: 0, pointer: DataPointer::Prp, data }.into();
        self.put(Event::Command {
            endpoint: ENDPOINT,
            model: Model::Nvme,
            queue: 1,
            opcode: 1,
            id: 7,
            status: 0,
            len,
            duration: 500,
            part,
        });
    }

    fn report(self) -> Value {
        to_json(&self.audit.finish())
    }

    fn findings(self) -> Vec<String> {
        let report = self.report();
        let findings = report["findings"].as_array().unwrap().iter();
        findings.map(|finding| finding["id"].as_str().unwrap().to_owned()).collect()
    }
}

fn base(request: RequestType, start: u64, pages: u64) -> Event {
    Event::Request {
        endpoint: matches!(request, RequestType::Attach | RequestType::Detach).then_some(ENDPOINT),
        request: request as u8,
        status: 0,
        domain: 1,
        virt_start: start,
        virt_end: start + (pages * PAGE).saturating_sub(1),
        phys_start: start,
        flags: 3,
        duration: 100,
    }
}

fn state(item: StateItem, start: u64, pages: u64) -> Event {
    Event::State {
        endpoint: (item == StateItem::Endpoint).then_some(ENDPOINT),
        item,
        domain: 1,
        bypass: false,
        virt_start: start,
        virt_end: start + (pages * PAGE).saturating_sub(1),
        phys_start: start,
        flags: 3,
        tag: 0,
        lost: 0,
    }
}

#[test]
fn an_access_goes_over_the_end_of_a_mapping_into_the_next() {
    let mut trace = Trace::new();
    trace.base(RequestType::Map, 0x10000, 1);
    trace.base(RequestType::Map, 0x11000, 1);
    trace.dma(0x10000, 8192);
    trace.command(0x10000, 8192);
    trace.base(RequestType::Unmap, 0x10000, 2);
    let report = trace.report();
    assert_eq!(report["findings"], serde_json::json!([]), "{report:#}");
    assert_eq!(report["all"]["granules"], serde_json::json!({ "ended": 2, "accessed": 2 }));
}

#[test]
fn what_lives_is_counted_after_parts_are_unlinked() {
    let mut trace = Trace::new();
    trace.split(RequestType::Reserve, 0, 64);
    for link in 0..4 {
        trace.split(RequestType::Link, link * 4 * PAGE, 4);
    }
    // The middle of one, and from the middle of the first to the end of the last.
    trace.split(RequestType::Unlink, 4 * PAGE + PAGE, 1);
    trace.split(RequestType::Unlink, 2 * PAGE, 14);
    let report = trace.report();
    let links = &report["all"]["links"];
    assert_eq!((&links["live"], &links["live_bytes"], &links["peak"]), (&1.into(), &(2 * PAGE).into(), &5.into()));
}

#[test]
fn events_are_put_in_order_with_the_live_state() {
    let mut trace = Trace { audit: Audit::new(Settings::default()), seq: 10 };
    trace.put_as(10, state(StateItem::Begin, 0, 0));
    trace.put_as(11, base(RequestType::Unmap, 0x10000, 1));
    trace.put_as(12, base(RequestType::Map, 0x20000, 1));
    // Read before the UNMAP, and after the MAP.
    trace.put_as(10, state(StateItem::Endpoint, 0, 0));
    trace.put_as(11, state(StateItem::Mapping, 0x10000, 1));
    trace.put_as(13, state(StateItem::Mapping, 0x20000, 1));
    trace.put_as(14, state(StateItem::End, 0, 0));
    let report = trace.report();
    let mappings = &report["all"]["mappings"];
    assert_eq!((&mappings["made"], &mappings["live"]), (&2.into(), &1.into()), "{report:#}");
}

#[test]
fn what_happened_before_the_trace_is_not_held_against_it() {
    let mut trace = Trace { audit: Audit::new(Settings::default()), seq: 0 };
    trace.put_as(1, state(StateItem::Begin, 0, 0));
    trace.put_as(1, state(StateItem::Endpoint, 0, 0));
    trace.put_as(1, state(StateItem::Reservation, 0x10000, 1));
    trace.put_as(1, state(StateItem::Linked, 0x10000, 1));
    trace.put_as(1, state(StateItem::End, 0, 0));
    trace.seq = 1;
    trace.command(0x10000, 4096);
    trace.split(RequestType::Release, 0x10000, 1);
    trace.dma(0x90000, 16);
    assert_eq!(trace.findings(), [""; 0]);
}

#[test]
fn without_accesses_in_the_trace_nothing_is_called_unused() {
    for lost in [0, 1] {
        let mut trace = Trace::new();
        trace.base(RequestType::Map, 0x10000, 1);
        trace.command(0x10000, 4096);
        trace.base(RequestType::Unmap, 0x10000, 1);
        if lost == 1 {
            trace.dma(0x90000, 16);
            trace.put(Event::Lost { place: viommu_trace::event::LossPlace::Ring, count: u64::MAX, since: 0 });
        }
        assert_eq!(trace.findings(), [""; 0], "{lost}");
    }
}

/// As a reset of a function with ATS does: what is linked stays, and what is mapped is mapped anew.
#[test]
fn a_domain_without_endpoints_for_a_while_leaks_nothing() {
    let mut trace = Trace::new();
    trace.split(RequestType::Reserve, 0x10000, 1);
    trace.split(RequestType::Link, 0x10000, 1);
    trace.dma(0x10000, 4096);
    trace.command(0x10000, 4096);
    trace.seq += 2_000_000;
    trace.base(RequestType::Detach, 0, 0);
    trace.base(RequestType::Attach, 0, 0);
    trace.split(RequestType::Release, 0x10000, 1);
    let report = trace.report();
    let found: Vec<_> = report["findings"].as_array().unwrap().iter().map(|finding| &finding["id"]).collect();
    assert_eq!(found, ["unlinked-late"]);
    assert_eq!((&report["all"]["reservations"]["live"], &report["all"]["links"]["live"]), (&0.into(), &0.into()));
}

#[test]
fn two_kicks_for_a_mapping_and_its_end_are_as_few_as_can_be() {
    let mut trace = Trace::new();
    for _ in 0..200 {
        trace.put(Event::Kick { queue: 0, requests: 1 });
        trace.base(RequestType::Map, 0x10000, 1);
        trace.put(Event::Kick { queue: 0, requests: 1 });
        trace.base(RequestType::Unmap, 0x10000, 1);
    }
    assert_eq!(trace.findings(), [""; 0]);
}

/// Numbers that no device sends, but a file may have.
#[test]
fn no_number_is_too_large() {
    let mut trace = Trace::new();
    for request in [RequestType::Map, RequestType::Unmap, RequestType::Map] {
        let Event::Request { endpoint, request, status, domain, phys_start, flags, duration, .. } = base(request, 0, 0)
        else {
            unreachable!()
        };
        let (virt_start, virt_end) = (0, u64::MAX);
        trace.put(Event::Request {
            endpoint,
            request,
            status,
            domain,
            virt_start,
            virt_end,
            phys_start,
            flags,
            duration,
        });
    }
    trace.dma(u64::MAX - 1, u32::MAX);
    trace.command(u64::MAX - 5, u32::MAX);
    trace.split(RequestType::Unlink, u64::MAX - 4095, 1);
    trace.split(RequestType::Unlink, 0, 1);
    trace.report();
}
