//! Both kinds of server when the process is out of descriptors, and how many descriptors a client's memory costs. The
//! limit and the count belong to the process, so each of these tests has a process of its own.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Instant;

use ::vhost::VhostBackend;
use ::vhost::vhost_user::Frontend;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use viommu::iommu::{EndpointSettings, Iommu, Settings};
use viommu::pci::{self, Function, Identity, Slot};
use viommu::vhost;
use viommu_testkit::PATIENCE;
use viommu_testkit::function::Served;
use viommu_testkit::memfd;
use viommu_testkit::process::{alone, descriptors};
use viommu_testkit::toy::*;
use viommu_testkit::vfio::*;
use viommu_trace::Tracer;
use vmm_sys_util::eventfd::EventFd;

const ENDPOINT: u32 = 0x20;
const PAGE: u64 = 4096;
const CONFIG: u32 = 7;

/// Passes on what is logged.
struct Log(Mutex<Sender<String>>);

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // When the test has seen enough, nobody receives.
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
            capabilities: &[],
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
    let (before, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    before
}

#[test]
fn a_connection_without_free_descriptors_is_served_when_there_are_some() {
    alone(
        "descriptors::a_connection_without_free_descriptors_is_served_when_there_are_some",
        connects_without_descriptors,
    );
}

fn connects_without_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let endpoints = vec![EndpointSettings { id: ENDPOINT, reserved: Vec::new() }];
    let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
    let (toy, iommu_socket) = (dir.path().join("toy.sock"), dir.path().join("viommu.sock"));
    let function = pci::FunctionServer::bind(&toy).unwrap();
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
    // Each server tries repeatedly.
    let (mut connections, mut frontends) = (0, 0);
    let begun = Instant::now();
    while connections < 3 || frontends < 3 {
        assert!(begun.elapsed() < PATIENCE, "{connections} and {frontends} of 3 failed tries were logged");
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

/// A client of a function that is a bus master.
fn client(served: &Served) -> RawClient {
    let mut client = RawClient::connect(&served.path());
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    client
}

#[test]
fn regions_cost_descriptors_by_the_file_and_give_them_back() {
    alone("descriptors::regions_cost_descriptors_by_the_file_and_give_them_back", regions_cost_descriptors);
}

fn regions_cost_descriptors() {
    let served = Served::new(ENDPOINT, Tracer::default(), Toy::make, || ());
    let files = [memfd(4 * PAGE), memfd(4 * PAGE)];
    drop(client(&served));
    // The session before has ended when the next one is answered.
    let mut first = client(&served);
    let before = descriptors();
    let mut number = 0;
    let mut map = |client: &mut RawClient, how: u32, count: u64, file: RawFd| {
        for _ in 0..count {
            client.dma_map(how, number % 4 * PAGE, number * PAGE, PAGE, &[file]).unwrap();
            number += 1;
        }
    };
    map(&mut first, READ | WRITE, 100, files[0].as_raw_fd());
    map(&mut first, READ, 100, files[0].as_raw_fd());
    assert_eq!(descriptors(), before, "a mapping keeps none");
    map(&mut first, READ | WRITE | FILE_IO, 100, files[0].as_raw_fd());
    map(&mut first, READ | FILE_IO, 100, files[0].as_raw_fd());
    assert_eq!(descriptors(), before + 1);
    map(&mut first, READ | WRITE | FILE_IO, 100, files[1].as_raw_fd());
    assert_eq!(descriptors(), before + 2);
    for (region, writable) in [(0, true), (100, false), (200, true), (300, false), (400, true)] {
        assert_eq!(writes(&mut first, region * PAGE, region), writable);
        assert_eq!(reads(&mut first, region * PAGE), if region == 400 { 400 } else { region / 200 * 200 });
    }
    first.dma_unmap(0, 400 * PAGE, 99 * PAGE).unwrap();
    assert_eq!(descriptors(), before + 2, "there is one region left");
    first.dma_unmap(0, 499 * PAGE, PAGE).unwrap();
    assert_eq!(descriptors(), before + 1);
    // The descriptors of both ends are those of the next client.
    drop(first);
    let _next = client(&served);
    assert_eq!(descriptors(), before);
}

#[test]
fn a_client_gets_an_error_if_its_descriptors_do_not_arrive_and_loses_nothing() {
    alone(
        "descriptors::a_client_gets_an_error_if_its_descriptors_do_not_arrive_and_loses_nothing",
        descriptors_do_not_come,
    );
}

fn descriptors_do_not_come() {
    const UNMASK_BY: u32 = 1 << 2 | 1 << 4;
    let served = Served::new(ENDPOINT, Tracer::default(), Toy::make, || ());
    let mut client = client(&served);
    let ram = memfd(4 * PAGE);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let fd = [ram.as_raw_fd()];
    client.dma_map(READ | WRITE, 0, 0, PAGE, &fd).unwrap();
    client.dma_map(READ | WRITE | FILE_IO, PAGE, PAGE, PAGE, &fd).unwrap();
    // The next descriptor that is opened is the lowest free one.
    let next = ram.try_clone().unwrap().as_raw_fd() as libc::rlim_t;
    let before = limit_descriptors(next);
    let refused = [
        client.dma_map(READ | WRITE, 0, 2 * PAGE, PAGE, &fd),
        client.dma_map(READ | WRITE | FILE_IO, 0, 2 * PAGE, PAGE, &fd),
        client.set_irqs([0, UNMASK_BY, 0, 1], &[], &[event.as_raw_fd()]),
    ];
    // The descriptor comes, but the epoll to wait for it cannot be made.
    limit_descriptors(next + 1);
    let one = client.set_irqs([0, UNMASK_BY, 0, 1], &[], &[event.as_raw_fd()]);
    let accesses = [0, PAGE].map(|at| writes(&mut client, at, at + 1) && reads(&mut client, at) == at + 1);
    let none_wanted = client.dma_map(READ | WRITE, 0, 3 * PAGE, PAGE, &[]);
    let mapped = client.dma_map(READ | WRITE, 0, 2 * PAGE, PAGE, &fd);
    limit_descriptors(before);
    assert_eq!((refused, one), ([Err(libc::EMFILE); 3], Err(libc::EMFILE)));
    assert_eq!((accesses, none_wanted, mapped), ([true; 2], Ok(()), Ok(())));
    client.set_irqs([0, UNMASK_BY, 0, 1], &[], &[event.as_raw_fd()]).unwrap();
    // A descriptor that cannot be waited for is the client's fault.
    assert_eq!(client.set_irqs([0, UNMASK_BY, 0, 1], &[], &fd), Err(libc::EINVAL));
    client.dma_map(READ | WRITE | FILE_IO, 0, 4 * PAGE, PAGE, &fd).unwrap();
    assert_eq!(reads(&mut client, 4 * PAGE), 1);
}
