//! SET_IRQS.

use std::os::fd::{AsRawFd, RawFd};

use crate::vfio_user::memo::{MASKABLE, PLAIN, Session};
use viommu_testkit::vfio::*;
use vmm_sys_util::eventfd::EventFd;

const NONE: u32 = 1 << 0;
const BOOL: u32 = 1 << 1;
const EVENTFD: u32 = 1 << 2;
const MASK: u32 = 1 << 3;
const UNMASK: u32 = 1 << 4;
const TRIGGER: u32 = 1 << 5;

#[test]
fn valid_requests_reach_the_device() {
    let event = EventFd::new(0).unwrap();
    let fds: Vec<RawFd> = vec![event.as_raw_fd(); 4];
    let (session, mut client) = Session::start();
    let good: [([u32; 4], &[u8], usize, &str); 10] = [
        ([MASKABLE, NONE | TRIGGER, 0, 0], &[], 0, "irqs 0 0 + 0 Trigger None"),
        ([PLAIN, NONE | TRIGGER, 0, 0], &[], 0, "irqs 1 0 + 0 Trigger None"),
        ([MASKABLE, NONE | TRIGGER, 1, 3], &[], 0, "irqs 0 1 + 3 Trigger None"),
        ([MASKABLE, NONE | MASK, 3, 1], &[], 0, "irqs 0 3 + 1 Mask None"),
        ([MASKABLE, NONE | UNMASK, 0, 4], &[9; 4], 0, "irqs 0 0 + 4 Unmask None"),
        ([MASKABLE, BOOL | TRIGGER, 0, 2], &[0, 7], 0, "irqs 0 0 + 2 Trigger Bool"),
        ([MASKABLE, EVENTFD | TRIGGER, 0, 4], &[], 4, "irqs 0 0 + 4 Trigger EventFd"),
        ([MASKABLE, EVENTFD | TRIGGER, 0, 4], &[], 0, "irqs 0 0 + 4 Trigger EventFd"),
        ([MASKABLE, EVENTFD | UNMASK, 0, 1], &[], 1, "irqs 0 0 + 1 Unmask EventFd"),
        ([PLAIN, EVENTFD | TRIGGER, 0, 1], &[], 1, "irqs 1 0 + 1 Trigger EventFd"),
    ];
    for (request, data, count, _) in good {
        client.set_irqs(request, data, &fds[..count]).unwrap_or_else(|errno| panic!("{request:?}: {errno}"));
    }
    let memo = session.end(client);
    assert_eq!(memo.calls, good.map(|(_, _, _, call)| call));
}

#[test]
fn invalid_requests_are_refused() {
    let event = EventFd::new(0).unwrap();
    let fds: Vec<RawFd> = vec![event.as_raw_fd(); 5];
    let (session, mut client) = Session::start();
    let wrong: [([u32; 4], &[u8], usize); 25] = [
        // No such interrupts.
        ([2, NONE | TRIGGER, 0, 0], &[], 0),
        ([u32::MAX, NONE | TRIGGER, 0, 1], &[], 0),
        ([MASKABLE, NONE | TRIGGER, 0, 5], &[], 0),
        ([MASKABLE, NONE | TRIGGER, 4, 1], &[], 0),
        ([MASKABLE, EVENTFD | TRIGGER, 3, u32::MAX], &[], 0),
        ([MASKABLE, EVENTFD | TRIGGER, u32::MAX, 1], &[], 1),
        ([PLAIN, NONE | TRIGGER, 0, 2], &[], 0),
        // No interrupts at all, but not in the form that disables all.
        ([MASKABLE, NONE | TRIGGER, 1, 0], &[], 0),
        ([MASKABLE, NONE | MASK, 0, 0], &[], 0),
        ([MASKABLE, BOOL | TRIGGER, 0, 0], &[], 0),
        ([MASKABLE, EVENTFD | TRIGGER, 0, 0], &[], 0),
        ([MASKABLE, NONE | TRIGGER, 0, 0], &[], 1),
        // Flags that exclude each other, or are missing.
        ([MASKABLE, NONE | MASK | UNMASK, 0, 1], &[], 0),
        ([MASKABLE, NONE | BOOL | MASK, 0, 1], &[1], 0),
        ([MASKABLE, TRIGGER, 0, 1], &[], 0),
        ([MASKABLE, NONE, 0, 1], &[], 0),
        ([MASKABLE, NONE | TRIGGER | 1 << 6, 0, 1], &[], 0),
        ([PLAIN, NONE | MASK, 0, 1], &[], 0),
        // Data that does not match the request.
        ([MASKABLE, BOOL | TRIGGER, 0, 2], &[1], 0),
        ([MASKABLE, BOOL | TRIGGER, 0, 2], &[1; 3], 0),
        ([MASKABLE, BOOL | TRIGGER, 0, 1], &[1], 1),
        ([MASKABLE, NONE | TRIGGER, 0, 1], &[], 1),
        ([MASKABLE, EVENTFD | TRIGGER, 0, 2], &[], 1),
        ([MASKABLE, EVENTFD | TRIGGER, 0, 1], &[], 2),
        ([MASKABLE, EVENTFD | TRIGGER, 0, 4], &[], 5),
    ];
    for (request, data, count) in wrong {
        assert_eq!(
            client.set_irqs(request, data, &fds[..count]),
            Err(libc::EINVAL),
            "{request:?}, {count} descriptors"
        );
    }
    let short = words(&[19, NONE | TRIGGER, MASKABLE, 0, 1]);
    assert_eq!(client.call(command::SET_IRQS, &short, &[]), Err(libc::EINVAL));
    assert!(session.end(client).calls.is_empty());
}
