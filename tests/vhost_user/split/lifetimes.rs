//! Rule S12: how long domains and reservations live.

use viommu::iommu::Limits;
use viommu_testkit::accesses::*;
use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_wire::split::*;

use super::rules::{END, START, reserved};

#[test]
fn rule_s12_reservations_outlive_the_last_endpoint_and_mappings_do_not() {
    let (device, mut driver) = reserved();
    let live = || {
        let stats = device.iommu.stats();
        (stats.reservations_live, stats.linked_bytes, stats.mappings_live)
    };
    assert_eq!(driver.map(1, 0, 0xfff, 0x5000, READ), OK);
    assert_eq!(driver.map(1, END + 1, END + PAGE, 0x5000, READ), OK);
    assert_eq!(driver.link(START, &[(0x5000, 2)], READ), OK);
    assert_eq!(driver.attach(1, EP2), OK);
    assert_eq!(driver.detach(1, EP), OK);
    assert_eq!(live(), (1, 2 * PAGE, 2), "one is left in the domain");
    assert_eq!(driver.attach(2, EP2), OK);
    assert_eq!(live(), (1, 2 * PAGE, 0), "it moved on");
    assert_eq!(read_at(&driver, &device, START), None, "nobody is attached");
    // All requests for reservations go on, and no others.
    assert_eq!(driver.map(1, 0, 0xfff, 0x5000, READ), NOENT);
    assert_eq!(driver.unmap(1, 0, 0xfff), NOENT);
    assert_eq!(driver.attach_bypass(1, EP), INVAL);
    assert_eq!(driver.detach(1, EP), INVAL);
    assert_eq!(driver.reserve(START, END), INVAL);
    assert_eq!(driver.reserve(END + 1, END + 2 * PAGE), OK);
    assert_eq!(driver.release(END + 1, END + 2 * PAGE), OK);
    assert_eq!(driver.unlink(START, START + PAGE - 1), OK);
    assert_eq!(driver.link(START + 2 * PAGE, &[(0x7000, 1)], READ), OK);
    // An endpoint that is attached again finds it all.
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(live(), (1, 2 * PAGE, 0));
    assert_eq!(read_at(&driver, &device, START), None);
    assert!(read_at(&driver, &device, START + PAGE).is_some());
    assert!(read_at(&driver, &device, START + 2 * PAGE).is_some());
    assert_eq!(driver.map(1, 0, 0xfff, 0x5000, READ), OK, "its mappings are to be made again");
}

#[test]
fn rule_s12_a_domain_ends_with_its_last_endpoint_or_its_last_reservation() {
    let (device, mut driver) = reserved();
    assert_eq!(driver.link(START, &[(0x5000, 2)], READ), OK);
    assert_eq!(driver.detach(1, EP), OK);
    assert_eq!(driver.release(START, END), OK);
    assert_eq!(driver.reserve(START, END), NOENT);
    device.iommu.synchronize();
    assert_eq!(device.iommu.stats().table_bytes, 0);
    // While an endpoint is attached, the last RELEASE ends nothing.
    assert_eq!(driver.attach(1, EP), OK);
    assert_eq!(driver.reserve(START, END), OK);
    assert_eq!(driver.release(START, END), OK);
    assert_eq!(driver.reserve(START, END), OK);
    assert_eq!(driver.release(START, END), OK);
    assert_eq!(driver.detach(1, EP), OK);
    assert_eq!(driver.reserve(START, END), NOENT);
}

#[test]
fn rule_s12_a_reset_ends_what_survived() {
    let (device, mut driver) = reserved();
    for machine in [false, true] {
        for attached in [false, true] {
            assert_eq!(driver.link(START, &[(0x5000, 2)], READ), OK);
            if !attached {
                assert_eq!(driver.detach(1, EP), OK);
            }
            if machine {
                driver.stop_queues();
                device.control.machine_reset();
                driver.start_over();
            } else {
                driver.reset();
            }
            // The device has seen the reset when it answers.
            assert_eq!(driver.detach(1, EP), INVAL);
            let stats = device.iommu.stats();
            assert_eq!((stats.reservations_live, stats.linked_bytes, stats.table_bytes), (0, 0, 0));
            assert_eq!(driver.attach(1, EP), OK);
            assert_eq!(read_at(&driver, &device, START), None);
            assert_eq!(driver.reserve(START, END), OK);
        }
    }
}

#[test]
fn rule_s12_domains_that_survive_are_charged_and_counted() {
    let limits = Limits { table_bytes: 100_000, ..Limits::default() };
    let (device, mut driver) = attached_to(Device::with(|settings| settings.limits = limits));
    let reserve = |domain| range(request_type::RESERVE, domain, START, END, 0);
    let mut domain = 1;
    let refused = loop {
        match driver.request(&reserve(domain)) {
            OK => domain += 1,
            status => break status,
        }
        assert_eq!(driver.attach(domain, EP), OK);
    };
    assert_eq!(refused, NOMEM);
    assert!((20..=50).contains(&domain), "{domain} domains in 100,000 bytes");
    assert_eq!(device.iommu.stats().reservations_live, u64::from(domain) - 1);
    // The last RELEASE of a domain without endpoints makes room for another.
    assert_eq!(driver.release(START, END), OK);
    assert_eq!(driver.request(&reserve(domain)), OK);
}
