//! The trace of a reservation, from RESERVE to RELEASE, and the cost of the requests.

use viommu::dma::DmaContext;
use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_testkit::trace::Recorder;
use viommu_trace::event::{Access, Route};
use viommu_trace::{Event, Tracer};
use viommu_wire::request::RequestType;
use viommu_wire::split::*;

/// All events while `act` uses a device.
pub fn record(act: impl FnOnce(&Device, Tracer)) -> Vec<Event> {
    let (recorder, tracer) = Recorder::start(&[]);
    let device = Device::traced(|_| {}, tracer.clone());
    act(&device, tracer);
    drop(device);
    recorder.end()
}

/// Requests of the protocol: type, status, first and last address, tag, count, and 0 for the duration.
fn split_requests(events: &[Event]) -> Vec<(u8, u8, u64, u64, u64, u32)> {
    let request = |event: &Event| match *event {
        Event::Split { request, status, domain, virt_start, virt_end, tag, count, duration, .. } => {
            assert_eq!(domain, 1);
            assert!((1..10_000_000_000).contains(&duration), "{duration} ns");
            Some((request, status, virt_start, virt_end, tag, count))
        }
        _ => None,
    };
    events.iter().filter_map(request).collect()
}

const ALLOCATION: u64 = 1 << 56 | 1;
const FIRST: u64 = 1 << 56 | 2;
const SECOND: u64 = 1 << 56 | 3;
const START: u64 = 0x10_0000;

#[test]
fn a_reservation_from_its_first_step_to_its_last() {
    let end = START + 64 * PAGE - 1;
    let page = |page: u64| START + page * PAGE;
    let events = record(|device, tracer| {
        let mut driver = Driver::new(device);
        driver.attach(1, EP);
        driver.request(&range(request_type::RESERVE, 1, START, end, ALLOCATION));
        let link = |start, extents: &[(u64, u64)], tag| [Part::R(link_bytes(1, start, extents, READ, tag)), Part::W(4)];
        driver.transact(&link(START, &[(0x20_0000, 2)], FIRST));
        // Its memory continues where the first ends, but it is another operation.
        driver.transact(&link(page(2), &[(0x20_2000, 1), (0x30_0000, 1)], SECOND));
        driver.map(1, 0, 0xfff, 0x20_0000, READ);
        let dma = DmaContext::new(&device.iommu, EP, driver.memory.clone(), tracer);
        dma.set_bus_master(true);
        let mut dma = dma.open();
        dma.read(START, &mut [0; 4 * PAGE as usize]).unwrap();
        dma.read(0, &mut [0; 8]).unwrap();
        driver.request(&range(request_type::UNLINK, 1, page(1), page(3) - 1, FIRST));
        dma.read(page(1) + 8, &mut [0; 8]).unwrap_err();
        // The single page that takes its place has the tag of its own link.
        driver.transact(&link(page(1), &[(0x40_0000, 1)], SECOND));
        dma.read(page(1), &mut [0; 8]).unwrap();
        driver.request(&range(request_type::RELEASE, 1, START, end, ALLOCATION));
        driver.request(&range(request_type::RELEASE, 1, START, end, ALLOCATION));
        // One of two extents is missing.
        let mut short = link_bytes(1, START, &[(0x20_0000, 4)], READ, FIRST);
        short[28] = 2;
        driver.transact(&[Part::R(short), Part::W(4)]);
    });
    let expected = [
        (request_type::RESERVE, OK, START, end, ALLOCATION, 0),
        (request_type::LINK, OK, START, page(2) - 1, FIRST, 1),
        (request_type::LINK, OK, page(2), page(4) - 1, SECOND, 2),
        (request_type::UNLINK, OK, page(1), page(3) - 1, FIRST, 2),
        (request_type::LINK, OK, page(1), page(2) - 1, SECOND, 1),
        (request_type::RELEASE, OK, START, end, ALLOCATION, 3),
        (request_type::RELEASE, NOENT, START, end, ALLOCATION, 0),
        (request_type::LINK, INVAL, START, page(4) - 1, FIRST, 2),
    ];
    assert_eq!(split_requests(&events), expected);
    let accesses: Vec<_> = events
        .iter()
        .filter_map(|event| match *event {
            Event::Dma { endpoint, access, route, failed, iova, gpa, len, domain, tag } => {
                assert_eq!((endpoint, access, route, failed, domain), (EP, Access::Read, Route::Mapped, false, 1));
                Some((iova, gpa, len, tag))
            }
            _ => None,
        })
        .collect();
    let expected = [
        (START, 0x20_0000, 0x2000, FIRST),
        (page(2), 0x20_2000, 0x1000, SECOND),
        (page(3), 0x30_0000, 0x1000, SECOND),
        (0, 0x20_0000, 8, 0),
        (page(1), 0x40_0000, 8, SECOND),
    ];
    assert_eq!(accesses, expected);
    let faults: Vec<_> = events.iter().filter(|event| matches!(event, Event::Fault { .. })).collect();
    assert!(matches!(faults[..], [Event::Fault { address, .. }] if *address == page(1) + 8), "{faults:?}");
}

/// 512 scattered pages in one reservation: RESERVE and LINK, with one kick for both; a page in the middle is unlinked
/// alone; RELEASE.
#[test]
fn what_512_pages_cost() {
    let end = START + 512 * PAGE - 1;
    let middle = START + 256 * PAGE;
    let events = record(|device, _| {
        let (device, mut driver) = (device, Driver::new(device));
        driver.attach(1, EP);
        wait_for_kicks(device, &driver, 1);
        let pages: Vec<(u64, u64)> = (0..512).map(|page| (0x200_0000 + (page * 7 % 512) * 2 * PAGE, 1)).collect();
        let reserve = range(request_type::RESERVE, 1, START, end, ALLOCATION).bytes();
        let link = link_bytes(1, START, &pages, READ | WRITE, FIRST);
        assert_eq!(link.len(), 32 + 4096);
        let chains: Vec<_> =
            [reserve, link].map(|bytes| driver.add(REQUESTS, &[Part::R(bytes), Part::W(4)])).into_iter().collect();
        driver.kick(REQUESTS);
        for (head, writable) in chains {
            let (used, len) = driver.wait_used(REQUESTS);
            assert_eq!(used, head, "in order");
            assert_eq!(driver.collect(len, &writable).status(), OK);
        }
        wait_for_kicks(device, &driver, 2);
        assert_eq!(device.iommu.stats().linked_bytes, 512 * PAGE);
        let mut dma = driver.dma(device, EP);
        dma.write(START, &vec![7; 512 * PAGE as usize]).unwrap();
        for &(phys, _) in &pages {
            assert_eq!(driver.read(phys, PAGE as usize), [7; PAGE as usize]);
        }
        assert_eq!(driver.unlink(middle, middle + PAGE - 1), OK);
        dma.read(middle, &mut [0]).unwrap_err();
        dma.read(middle - 1, &mut [0]).unwrap();
        dma.read(middle + PAGE, &mut [0]).unwrap();
        assert_eq!(device.iommu.stats().linked_bytes, 511 * PAGE);
        assert_eq!(driver.release(START, end), OK);
        let stats = device.iommu.stats();
        let split = [
            stats.requests[RequestType::Reserve],
            stats.requests[RequestType::Link],
            stats.requests[RequestType::Unlink],
            stats.requests[RequestType::Release],
        ];
        assert_eq!(split.map(|count| (count.total, count.failed)), [(1, 0); 4]);
        assert_eq!((stats.requests[RequestType::Map].total, stats.requests[RequestType::Unmap].total), (0, 0));
    });
    let expected = [
        (request_type::RESERVE, OK, START, end, ALLOCATION, 0),
        (request_type::LINK, OK, START, end, FIRST, 512),
        (request_type::UNLINK, OK, middle, middle + PAGE - 1, 0, 1),
        (request_type::RELEASE, OK, START, end, 0, 511),
    ];
    assert_eq!(split_requests(&events), expected);
}
