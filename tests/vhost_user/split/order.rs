//! Which rule comes first if several are broken, and in which order requests are answered.

use crate::split::rules::{END, KINDS, START};
use viommu::iommu::Limits;
use viommu_testkit::frontend::split::*;
use viommu_testkit::frontend::*;
use viommu_wire::split::*;

#[test]
fn the_first_rule_that_is_broken_gives_the_status() {
    let limits = Limits { table_bytes: 100_000, ..Limits::default() };
    let (_device, mut driver) = attached_to(Device::with(|settings| settings.limits = limits));
    assert_eq!(driver.reserve(START, END), OK);
    assert_eq!(driver.link(END + 1 - PAGE, &[(0x5000, 1)], READ), OK);
    for kind in KINDS {
        let with_flag = |domain, start, end| Range { flags: 1.into(), ..range(kind, domain, start, end, 0) };
        assert_eq!(driver.request(&with_flag(2, START + 1, END)), NOENT, "{kind:#x}: S1 before S2 and S3");
        assert_eq!(driver.request(&with_flag(1, START + 1, END)), INVAL, "{kind:#x}: S2 before S3");
        // Overlapping for a RESERVE, not inside a reservation for UNLINK, none for RELEASE.
        let status = driver.request(&range(kind, 1, START + 1, END + PAGE, 0));
        assert_eq!(status, RANGE, "{kind:#x}: S3 before S4, S8 and S9");
    }
    let mut link = |domain, start, count: u32, extents: &[(u64, u64)]| {
        let mut bytes = link_bytes(domain, start, extents, READ, 0);
        bytes[28..32].copy_from_slice(&count.to_le_bytes());
        driver.transact(&[Part::R(bytes), Part::W(4)]).status()
    };
    assert_eq!(link(2, START + 1, 2, &[(0x5000, 1)]), NOENT, "S1 before S6 and S3");
    assert_eq!(link(1, START + 1, 2, &[(0x5000, 1)]), INVAL, "the count of S6 before S3");
    assert_eq!(link(1, 0x80_0000, 2, &[(0x5000, 1)]), INVAL, "the count of S6 before S5");
    assert_eq!(link(1, END + 1 - PAGE, 1, &[(0x5000, 2)]), RANGE, "S5 before S6");
    // There is no memory left, and still the other rules come first.
    let page = |count: u64| (8 << 30) + 2 * count * PAGE;
    assert!((0..10_000).any(|count| driver.reserve(page(count), page(count) + PAGE - 1) == NOMEM));
    assert_eq!(driver.reserve(START, END), INVAL, "S4 before S11");
    assert_eq!(driver.link(END + 1 - PAGE, &[(0x5000, 1)], READ), INVAL, "S6 before S11");
    assert_eq!(driver.link(0x80_0000, &[(0x5000, 1)], READ), RANGE, "S5 before S11");
}

/// A driver need not wait between requests that build on each other, of this extension and of the base device.
#[test]
fn requests_are_done_and_returned_in_their_order() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    let link = || link_bytes(1, START, &[(0x5000, 1)], READ, 0);
    let requests = [
        (range(request_type::RESERVE, 1, START, END, 0).bytes(), NOENT),
        (attach(1, EP, 0).bytes(), OK),
        (link(), RANGE),
        (range(request_type::RESERVE, 1, START, END, 0).bytes(), OK),
        (map(1, START, END, 0, READ).bytes(), INVAL),
        (link(), OK),
        (link(), INVAL),
        (range(request_type::UNLINK, 1, START, END, 0).bytes(), OK),
        (link(), OK),
        (range(request_type::RELEASE, 1, START, END, 0).bytes(), OK),
        (range(request_type::RELEASE, 1, START, END, 0).bytes(), NOENT),
        (map(1, START, END, 0, READ).bytes(), OK),
        (range(request_type::RESERVE, 1, START, END, 0).bytes(), INVAL),
        (unmap(1, START, END).bytes(), OK),
        (range(request_type::RESERVE, 1, START, END, 0).bytes(), OK),
        (detach(1, EP).bytes(), OK),
        (link(), OK),
        (map(1, END + 1, END + PAGE, 0, READ).bytes(), NOENT),
        (range(request_type::RELEASE, 1, START, END, 0).bytes(), OK),
        (link(), NOENT),
    ];
    let chains: Vec<_> =
        requests.iter().map(|(bytes, _)| driver.add(REQUESTS, &[Part::R(bytes.clone()), Part::W(4)])).collect();
    driver.kick(REQUESTS);
    for (number, ((head, writable), (_, status))) in chains.iter().zip(&requests).enumerate() {
        let (used, len) = driver.wait_used(REQUESTS);
        assert_eq!(used, *head, "request {number}");
        assert_eq!(driver.collect(len, writable).status(), *status, "request {number}");
    }
}
