//! Kick descriptors that the frontend replaces or breaks. The test counts what its process waits for, so it has a
//! process of its own.

use std::fs;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use viommu_testkit::frontend::*;
use viommu_testkit::process::alone;
use viommu_testkit::{PATIENCE, wait_until};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How many descriptors the device's epoll waits for as the kick of the request queue, open or closed by now. There may be
/// several descriptors of that epoll.
fn registered() -> usize {
    let is_kick = |line: &&str| line.starts_with("tfd:") && line.contains(&format!("data: {REQUESTS:16x} "));
    let infos = fs::read_dir("/proc/self/fdinfo").unwrap();
    let infos = infos.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap_or_default());
    infos.map(|info| info.lines().filter(is_kick).count()).max().unwrap_or(0)
}

#[test]
fn a_kick_that_was_replaced_or_is_broken_is_not_waited_for() {
    alone("kick_descriptors::a_kick_that_was_replaced_or_is_broken_is_not_waited_for", kicks_are_replaced);
}

fn kicks_are_replaced() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!((driver.attach(1, EP), registered()), (OK, 1));

    // While the queue runs. The frontend keeps the old descriptor, so that its file stays open.
    let new = EventFd::new(EFD_NONBLOCK).unwrap();
    driver.frontend.set_vring_kick(REQUESTS, &new).unwrap();
    let old = std::mem::replace(&mut driver.queues[REQUESTS].kick, new);
    old.write(1).unwrap();
    assert_eq!((driver.attach(1, EP), registered()), (OK, 1));
    driver.frontend.set_vring_enable(REQUESTS, true).unwrap();
    assert_eq!((driver.attach(1, EP), registered()), (OK, 1));

    // While it is disabled.
    driver.frontend.set_vring_enable(REQUESTS, false).unwrap();
    assert_eq!(registered(), 0);
    let new = EventFd::new(EFD_NONBLOCK).unwrap();
    driver.frontend.set_vring_kick(REQUESTS, &new).unwrap();
    driver.queues[REQUESTS].kick = new;
    assert_eq!(registered(), 0);
    driver.frontend.set_vring_enable(REQUESTS, true).unwrap();
    assert_eq!((driver.attach(1, EP), registered()), (OK, 1));

    // A descriptor from which no kick can be read is closed, and no longer waited for.
    let (ours, theirs) = UnixStream::pair().unwrap();
    // SAFETY: the descriptor is taken from its owner, and only ever sent to the device.
    let broken = unsafe { EventFd::from_raw_fd(theirs.into_raw_fd()) };
    driver.frontend.set_vring_kick(REQUESTS, &broken).unwrap();
    assert_eq!(registered(), 1);
    drop(ours);
    wait_until(PATIENCE, "the end of the descriptor", || registered() == 0);

    // After a stop and a start everything works.
    driver.reset();
    assert_eq!((driver.attach(1, EP), registered()), (OK, 1));
    drop((old, broken));
}
