//! Answers that are wrong on purpose, for tests of drivers.

use std::time::{Duration, Instant};

use crate::split::traced::record;
use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_trace::Event;
use viommu_trace::event::Answer;
use viommu_wire::request::RequestType;
use viommu_wire::split::request_type;

const END: u64 = 16 * PAGE - 1;
const IOERR: u8 = 1;

fn inject(device: &Device, injections: &[&str]) {
    let injections: Vec<_> = injections.iter().map(|text| text.parse().unwrap()).collect();
    device.control.inject(&injections);
}

fn link_page(driver: &mut Driver, page: u64) -> u8 {
    driver.link(page * PAGE, &[(0x20_0000 + page * PAGE, 1)], READ)
}

#[test]
fn each_chosen_request_gets_the_status_and_is_not_done() {
    let events = record(|device, _| {
        inject(device, &["link=nomem:after=1:every=2:until=5", "unlink=ioerr"]);
        let mut driver = Driver::new(device);
        driver.attach(1, EP);
        driver.reserve(0, END);
        let statuses: Vec<_> = (0..7).map(|page| link_page(&mut driver, page)).collect();
        assert_eq!(statuses, [OK, OK, NOMEM, OK, NOMEM, OK, OK]);
        assert_eq!(driver.unlink(0, PAGE - 1), IOERR);
        let stats = device.iommu.stats();
        assert_eq!(
            (stats.requests[RequestType::Link].total, stats.requests[RequestType::Link].failed, stats.linked_bytes),
            (7, 2, 5 * PAGE)
        );
        let mut dma = driver.dma(device, EP);
        dma.read(0, &mut [0]).unwrap();
        dma.read(2 * PAGE, &mut [0]).unwrap_err();
        // The page is not linked, so it can be linked now.
        assert_eq!(link_page(&mut driver, 2), OK);
        dma.read(2 * PAGE, &mut [0]).unwrap();
    });
    // An event says that each is wrong, just before the event of the request.
    let injected: Vec<_> = events
        .windows(2)
        .filter_map(|pair| match *pair {
            [Event::Injected { request, answer, number }, Event::Split { request: next, status, .. }] => {
                assert_eq!((request, answer), (next, Answer::Refused));
                Some((request, number, status))
            }
            _ => None,
        })
        .collect();
    assert_eq!(
        injected,
        [(request_type::LINK, 3, NOMEM), (request_type::LINK, 5, NOMEM), (request_type::UNLINK, 1, IOERR)]
    );
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Injected { .. })).count(), injected.len());
}

#[test]
fn a_request_that_is_never_answered_keeps_those_behind_it_until_a_reset() {
    let events = record(|device, _| {
        inject(device, &["link=silent:after=1:until=2"]);
        let mut driver = Driver::new(device);
        driver.attach(1, EP);
        driver.reserve(0, END);
        assert_eq!(link_page(&mut driver, 0), OK);
        let link = [Part::R(link_bytes(1, PAGE, &[(0x20_0000, 1)], READ, 0)), Part::W(4)];
        let release = [Part::R(range(request_type::RELEASE, 1, 0, END, 0).bytes()), Part::W(4)];
        for request in [&link, &release] {
            driver.add(REQUESTS, request);
            driver.kick(REQUESTS);
        }
        driver.wait_until_idle(EVENTS);
        assert!(driver.used_is_empty(REQUESTS));
        assert_eq!(device.iommu.stats().reservations_live, 1);
        driver.reset();
        driver.attach(1, EP);
        driver.reserve(0, END);
        assert_eq!(link_page(&mut driver, 1), OK);
    });
    let injected: Vec<_> = events
        .iter()
        .filter_map(|event| match *event {
            Event::Injected { request, answer, number } => Some((request, answer, number)),
            _ => None,
        })
        .collect();
    assert_eq!(injected, [(request_type::LINK, Answer::Never, 2)]);
}

#[test]
fn a_request_that_is_answered_late_is_done() {
    let device = Device::new();
    inject(&device, &["reserve=late:ms=60:until=1"]);
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    let begin = Instant::now();
    assert_eq!(driver.reserve(0, END), OK);
    assert!(begin.elapsed() >= Duration::from_millis(60));
    assert_eq!(link_page(&mut driver, 0), OK);
}
