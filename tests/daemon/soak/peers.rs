//! Peers that are killed while they work.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::daemon::*;
use viommu_testkit::engine::{Descriptor, Engine};
use viommu_testkit::memfd;
use viommu_testkit::nvme::{self, io};

/// Where the peer finds the sockets.
const FOLDER: &str = "VIOMMU_SOAK_FOLDER";
const AT_WORK: &str = "the peer is at work";

/// Starts copies that take seconds: one descriptor that names itself as next.
fn keep_busy(engine: &mut Engine) {
    let (at, next) = engine.descriptor;
    let descriptor =
        Descriptor { size: 64 << 10, source: 0x20_0000, destination: 0x30_0000, next, ..Descriptor::default() };
    engine.put(at, &descriptor);
    engine.start(next, u16::MAX);
}

/// An engine and a controller at work.
fn busy_devices(socket: impl Fn(&str) -> vfio_user::Client) -> (Engine, nvme::Driver) {
    let ram = memfd(nvme::RAM);
    let mut engine = Engine::new(socket("dma0.sock"), &ram, (0x10_0000, 0x10_0000));
    keep_busy(&mut engine);
    let mut driver = nvme::Driver::new(socket("nvme0.sock"), ram, 0x40_0000);
    driver.enable();
    driver.create_pair(1, 64, 64);
    let data = driver.pages(512);
    let list = driver.pages(1);
    driver.write_words(list, &(1..512).map(|page| data + page * nvme::PAGE).collect::<Vec<u64>>());
    // 2 MiB each.
    (0..60).for_each(|_| _ = driver.put(1, io(2, 0, 4096, [data, list])));
    driver.ring(1);
    (engine, driver)
}

/// No test: the process that the test below kills.
#[test]
#[ignore = "it is the peer of another test"]
fn peer() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let folder = std::path::PathBuf::from(folder);
    let _devices = busy_devices(|name| vfio_user::Client::new(&folder.join(name)).unwrap());
    println!("\n{AT_WORK}");
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn the_next_peer_is_served_after_one_is_killed() {
    let daemon = Daemon::start();
    let mut longest = Duration::ZERO;
    for _ in 0..amount(3, 30) {
        let mut peer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "soak::peers::peer", "--ignored", "--nocapture"])
            .env(FOLDER, daemon.socket("").as_os_str())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(peer.stdout.take().unwrap());
        assert!(said.lines().any(|line| line.unwrap() == AT_WORK), "the peer does not begin");
        peer.kill().unwrap();
        let begun = Instant::now();
        peer.wait().unwrap();
        let ram = memfd(nvme::RAM);
        let mut engine = Engine::new(daemon.client("dma0.sock"), &ram, (0x10_0000, 0x10_0000));
        assert_eq!(engine.copy(0x20_0000, 0x30_0000, 4096), Ok(()));
        let mut driver = nvme::Driver::new(daemon.client("nvme0.sock"), ram, 0x40_0000);
        driver.enable();
        longest = longest.max(begun.elapsed());
    }
    println!("served after {longest:?} at most");
    daemon.end();
}

#[test]
fn a_daemon_ends_in_the_middle_of_work() {
    for _ in 0..amount(2, 15) {
        let daemon = Daemon::start();
        let _devices = busy_devices(|name| daemon.client(name));
        let begun = Instant::now();
        daemon.end();
        println!("ended after {:?}", begun.elapsed());
    }
}
