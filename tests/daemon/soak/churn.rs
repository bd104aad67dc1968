//! Connections of all kinds, at all sockets.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::daemon::*;
use viommu_testkit::engine::Engine;
use viommu_testkit::frontend;
use viommu_testkit::memfd;
use viommu_testkit::nvme;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_trace::{Reader, Subscription};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const SOCKETS: [&str; 4] = ["viommu.sock", "nvme0.sock", "dma0.sock", "trace.sock"];

/// Makes a useless connection.
fn disturb(socket: &Path, kind: u64) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let sent = match kind % 5 {
        0 => Ok(()),
        1 => stream.write_all(&[0xff; 64]),
        // Half a header.
        2 => stream.write_all(&[1, 0, 9]),
        3 => stream.write_all(b"\n"),
        _ => {
            let file = memfd(4096);
            let sent = stream.send_with_fds(&[&[2u8, 0, 0, 0][..]], &[file.as_raw_fd(); 16]);
            sent.map(drop).map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
        }
    };
    if let Err(error) = sent {
        assert!([ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()), "{error}");
    }
}

#[test]
fn connections_without_use_leave_nothing_behind() {
    let daemon = Daemon::start();
    let disturb_all = |count| (0..count).for_each(|n| disturb(&daemon.socket(SOCKETS[n as usize % 4]), n / 4));
    // The first connection of each kind makes threads and buffers.
    disturb_all(40);
    all_are_served(&daemon);
    let mut before = 0;
    wait_until(PATIENCE, "an end of the first ones", || {
        let now = daemon.descriptors();
        std::mem::replace(&mut before, now) == now
    });
    let memory = daemon.resident();
    disturb_all(amount(200, 20_000));
    all_are_served(&daemon);
    wait_until(PATIENCE, "an end of all connections", || daemon.descriptors() <= before);
    let after = daemon.resident();
    // The growth includes the trace's history.
    assert!(after < memory + (24 << 20), "{memory} bytes before, {after} after");
    daemon.end();
}

/// Checks that useful clients are served, at each socket.
fn all_are_served(daemon: &Daemon) {
    let mut driver = frontend::Driver::connect(&daemon.socket("viommu.sock"));
    driver.negotiate(u64::MAX);
    driver.set_memory();
    driver.start_queue(frontend::REQUESTS, 0);
    assert_eq!(driver.attach(1, NVME[1]), frontend::OK);
    let ram = memfd(nvme::RAM);
    let mut controller = nvme::Driver::new(daemon.client("nvme0.sock"), ram.try_clone().unwrap(), nvme::PAGE);
    controller.enable();
    assert!(controller.identify(1, 0, 0).is_ok());
    let mut engine = Engine::new(daemon.client("dma0.sock"), &ram, (0x10_0000, 0x10_0000));
    assert_eq!(engine.copy(0x20_0000, 0x30_0000, 4096), Ok(()));
    assert!(Reader::connect(&daemon.socket("trace.sock"), &Subscription::default()).is_ok());
}

/// GET_FEATURES of the vhost-user protocol, and the length of its answer.
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
const ANSWER: usize = 20;

#[test]
fn a_second_frontend_waits_until_the_first_one_leaves() {
    let daemon = Daemon::start();
    for _ in 0..amount(2, 1000) {
        let mut first = frontend::Driver::connect(&daemon.socket("viommu.sock"));
        let mut second = UnixStream::connect(daemon.socket("viommu.sock")).unwrap();
        second.write_all(&GET_FEATURES).unwrap();
        first.negotiate(u64::MAX);
        first.set_memory();
        first.start_queue(frontend::REQUESTS, 0);
        assert_eq!(first.attach(1, NVME[0]), frontend::OK);
        // It sent its request before the first one had left.
        second.set_nonblocking(true).unwrap();
        let early = second.read(&mut [0; ANSWER]);
        assert_eq!(early.unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(first);
        second.set_nonblocking(false).unwrap();
        second.set_read_timeout(Some(PATIENCE)).unwrap();
        second.read_exact(&mut [0; ANSWER]).unwrap();
    }
    daemon.end();
}
