//! Both kinds of server when the process is out of descriptors. The limit is the process's, so this is the only test
//! of its binary.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use ::vhost::VhostBackend;
use ::vhost::vhost_user::Frontend;
use viommu::iommu::{EndpointSettings, Iommu, Settings};
use viommu::pci::{self, Function, Identity, Slot};
use viommu::vhost;
use viommu_trace::Tracer;
use vmm_sys_util::eventfd::EventFd;

const ENDPOINT: u32 = 0x20;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Passes on what is logged.
struct Log(Mutex<Sender<String>>);

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // When the test has seen enough, nobody listens.
        let _ = self.0.lock().unwrap().send(record.args().to_string());
    }

    fn flush(&self) {}
}

struct Idle;

impl Function for Idle {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1b36,
            device: 0x1234,
            subsystem_vendor: 0,
            subsystem: 0,
            class: 0x088000,
            revision: 1,
            bars: &[],
            vectors: 1,
            integrated: false,
        }
    }

    fn bar_read(&mut self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {}
}

/// Sets the soft limit of open descriptors and returns the one before.
fn limit_descriptors(limit: libc::rlim_t) -> libc::rlim_t {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls take a pointer to a structure that outlives them.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limits), 0);
        let before = std::mem::replace(&mut limits.rlim_cur, limit);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limits), 0);
        before
    }
}

#[test]
fn who_connects_while_there_are_no_descriptors_is_served_when_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let endpoints = vec![EndpointSettings { id: ENDPOINT, reserved: Vec::new() }];
    let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
    let (toy, iommu_socket) = (dir.path().join("toy.sock"), dir.path().join("viommu.sock"));
    let function = pci::Server::bind(&toy).unwrap();
    let slot = Slot::new(&iommu, ENDPOINT, Tracer::default());
    let stop = EventFd::new(0).unwrap();
    let stopped = stop.try_clone().unwrap();
    let mut device = vhost::Server::bind(&iommu_socket, iommu, Tracer::default()).unwrap();
    let shutdown = device.shutdown();
    let mut client = UnixStream::connect(&toy).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let frontend = UnixStream::connect(&iommu_socket).unwrap();
    frontend.set_read_timeout(Some(PATIENCE)).unwrap();
    let (log, logged) = mpsc::channel();
    log::set_boxed_logger(Box::new(Log(Mutex::new(log)))).unwrap();
    log::set_max_level(log::LevelFilter::Warn);

    // Descriptors 0 to 2 are in use, and poll(2) takes no more than the limit.
    let before = limit_descriptors(3);
    let function = thread::spawn(move || function.serve(&slot, &stopped, |_| Box::new(Idle), || ()));
    let device = thread::spawn(move || device.run());
    // Each tries, and tries again.
    let (mut connections, mut frontends) = (0, 0);
    let begun = Instant::now();
    while connections < 3 || frontends < 3 {
        assert!(begun.elapsed() < PATIENCE, "{connections} and {frontends} of 3 tries were told");
        let said = logged.recv_timeout(PATIENCE).unwrap();
        connections += u32::from(said.contains("The connection on"));
        frontends += u32::from(said.contains("The vhost-user connection ended"));
    }
    let ended = (function.is_finished(), device.is_finished());
    limit_descriptors(before);
    assert_eq!(ended, (false, false));

    // REGION_READ of the vendor and device number.
    let body = [&0u64.to_le_bytes()[..], &7u32.to_le_bytes(), &4u32.to_le_bytes()].concat();
    client.write_all(&[&[1, 0, 9, 0, 32, 0, 0, 0][..], &[0; 8], &body].concat()).unwrap();
    let mut answer = [0; 36];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer[32..], [0x36, 0x1b, 0x34, 0x12]);
    let frontend = Frontend::from_stream(frontend, 2);
    assert_ne!(frontend.get_features().unwrap(), 0);

    drop((client, frontend));
    stop.write(1).unwrap();
    shutdown.trigger();
    function.join().unwrap().unwrap();
    device.join().unwrap().unwrap();
}
