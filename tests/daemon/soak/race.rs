//! Devices that write without a pause while the mappings that they use are removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::daemon::*;
use viommu_testkit::engine::Engine;
use viommu_testkit::frontend::split::{link_bytes, range};
use viommu_testkit::frontend::{Driver, OK, Part, RAM, READ, WRITE};
use viommu_testkit::nvme::{self, io};
use viommu_wire::split::request_type::*;

const PAGE: u64 = 4096;
const DOMAIN: u32 = 1;
const ELSEWHERE: u32 = 2;
/// The address that the devices write to, which is outside of memory if it is not translated, and the memory that it
/// leads to.
const DATA: u64 = 1 << 32;
const TARGET: u64 = 48 << 20;
const PAGES: u64 = 2;
const LEN: u64 = PAGES * PAGE;
/// The data that the engine copies, and its descriptor.
const SOURCE: u64 = 50 << 20;
const DESCRIPTOR: u64 = 51 << 20;

/// A device's thread: how often it has written, and how often it was refused.
type Writer = JoinHandle<[u64; 2]>;

fn repeat(stop: &Arc<AtomicBool>, mut write: impl FnMut() -> bool + Send + 'static) -> Writer {
    let stop = stop.clone();
    thread::spawn(move || {
        let mut done = [0; 2];
        while !stop.load(Ordering::Relaxed) {
            done[usize::from(!write())] += 1;
        }
        done
    })
}

/// A controller reads the image into the pages, with many commands at a time.
fn reader(mut driver: nvme::Driver, stop: &Arc<AtomicBool>) -> Writer {
    driver.enable();
    driver.create_pair(1, 64, 64);
    let page = driver.pages(1);
    driver.write_ram(page, &[0xff; PAGE as usize]);
    for at in 0..PAGES {
        assert_eq!(driver.command(1, io(1, at * 8, 8, [page, 0])).status, 0);
    }
    repeat(stop, move || {
        (0..16).for_each(|_| _ = driver.put(1, io(2, 0, 8 * PAGES as u32, [DATA, DATA + PAGE])));
        driver.ring(1);
        (0..16).fold(true, |good, _| driver.wait(1).status == 0 && good)
    })
}

/// The ways to map the pages for the devices and to remove them.
const WAYS: u64 = 6;

fn give(driver: &mut Driver, way: u64) {
    if (1..4).contains(&way) {
        let request = range(RESERVE, DOMAIN, DATA, DATA + LEN - 1, 0);
        assert_eq!(driver.request(&request), OK);
        let link = link_bytes(DOMAIN, DATA, &[(TARGET, PAGES)], READ | WRITE, 0);
        assert_eq!(driver.transact(&[Part::R(link), Part::W(4)]).status(), OK);
    } else {
        assert_eq!(driver.map(DOMAIN, DATA, DATA + LEN - 1, TARGET, READ | WRITE), OK);
    }
}

/// Returns when the last answer has come.
fn take_away(driver: &mut Driver, way: u64) {
    let all = |kind| range(kind, DOMAIN, DATA, DATA + LEN - 1, 0);
    match way {
        0 => assert_eq!(driver.unmap(DOMAIN, DATA, DATA + LEN - 1), OK),
        1 => assert_eq!(driver.request(&all(UNLINK)), OK),
        2 => {
            for at in (DATA..DATA + LEN).step_by(PAGE as usize) {
                assert_eq!(driver.request(&range(UNLINK, DOMAIN, at, at + PAGE - 1, 0)), OK);
            }
        }
        3 => assert_eq!(driver.request(&all(RELEASE)), OK),
        4 => NVME.into_iter().chain([ENGINE]).for_each(|endpoint| assert_eq!(driver.detach(DOMAIN, endpoint), OK)),
        _ => NVME.into_iter().chain([ENGINE]).for_each(|endpoint| assert_eq!(driver.attach(ELSEWHERE, endpoint), OK)),
    }
}

/// Restores the state before.
fn put_back(driver: &mut Driver, way: u64) {
    match way {
        1 | 2 => assert_eq!(driver.request(&range(RELEASE, DOMAIN, DATA, DATA + LEN - 1, 0)), OK),
        4 | 5 => {
            assert_eq!(driver.unmap(DOMAIN, DATA, DATA + LEN - 1), OK);
            attach_all(driver);
        }
        _ => {}
    }
}

fn attach_all(driver: &mut Driver) {
    NVME.into_iter().chain([ENGINE]).for_each(|endpoint| assert_eq!(driver.attach(DOMAIN, endpoint), OK));
}

#[test]
fn nothing_is_written_after_a_removal_is_answered() {
    let daemon = Daemon::start();
    let mut driver = Driver::started(&daemon.socket("viommu.sock"), u64::MAX);
    let ram = driver.file();
    let mut engine = Engine::new(daemon.client("dma0.sock"), &ram, (DESCRIPTOR, DESCRIPTOR));
    let controllers = [("nvme0.sock", 34 << 20), ("nvme1.sock", 40 << 20)]
        .map(|(socket, free)| nvme::Driver::new(daemon.client(socket), driver.file(), free));
    // The devices' queues are mapped in both domains. A domain keeps its mappings as long as it has an endpoint.
    for (domain, endpoint) in [DOMAIN, ELSEWHERE].into_iter().zip(IDLE) {
        assert_eq!(driver.attach(domain, endpoint), OK);
        assert_eq!(driver.map(domain, 0, RAM - 1, 0, READ | WRITE), OK);
    }
    attach_all(&mut driver);
    driver.write(SOURCE, &[0xee; LEN as usize]);

    let stop = Arc::new(AtomicBool::new(false));
    let mut writers: Vec<Writer> = controllers.map(|controller| reader(controller, &stop)).into();
    writers.push(repeat(&stop, move || engine.copy(SOURCE, DATA, LEN as u32).is_ok()));

    let end = Instant::now() + Duration::from_secs(amount(3, 60));
    let (mut laps, mut seen, mut longest) = (0, 0, Duration::ZERO);
    // Each way must hit devices at work, even if that takes long.
    while Instant::now() < end || laps < 20 * WAYS || seen < laps / 4 {
        let way = laps % WAYS;
        laps += 1;
        driver.write(TARGET, &[0; LEN as usize]);
        give(&mut driver, way);
        let given = Instant::now();
        while driver.read(TARGET, 8) == [0; 8] && given.elapsed() < Duration::from_millis(20) {
            thread::yield_now();
        }
        seen += u64::from(driver.read(TARGET, 8) != [0; 8]);
        let asked = Instant::now();
        take_away(&mut driver, way);
        longest = longest.max(asked.elapsed());
        driver.write(TARGET, &[0; LEN as usize]);
        thread::sleep(Duration::from_micros(200));
        let written = driver.read(TARGET, LEN as usize).iter().any(|byte| *byte != 0);
        assert!(!written, "written after the removal was answered, lap {laps}, way {way}");
        put_back(&mut driver, way);
    }
    stop.store(true, Ordering::Relaxed);
    let done: Vec<[u64; 2]> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
    println!("{laps} laps, {seen} with data seen; written and refused {done:?}; removals took {longest:?} at most");
    assert!(done.iter().all(|[written, refused]| *written > 0 && *refused > 0), "a device was never at work: {done:?}");
    drop(driver);
    daemon.end();
}
