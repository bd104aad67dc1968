//! Reboots, pauses and ends of guests and of the daemon.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use viommu_testkit::guest::{Folder, Guest, Outcome, Serve};

use crate::{BUSY, NVME, nvme_in};

#[test]
fn reboot() {
    let outcome = Guest::new(NVME, "reboot").run();
    assert_eq!(outcome.summary["verified"], true);
    assert_eq!(outcome.count("faults"), 0);
    let resets: Vec<_> = outcome.events("reset").map(|reset| reset["reset"].clone()).collect();
    assert!(resets.contains(&json!("system")), "{resets:?}");
    // Nothing of the first boot is left in the second: the same domain ids are used again, and no MAP failed.
    assert_eq!(outcome.count("requests_failed"), 0);
}

#[test]
fn stop_and_cont_under_io() {
    let guest = Guest::new(NVME, &format!("{BUSY} + nvme-io --op verify --bs 64k --total 4M")).start();
    let mut qmp = guest.qmp();
    guest.wait_for_result("the beginning of the I/O", |result| result["event"] == "begin");
    for _ in 0..3 {
        guest.wait_for_events();
        qmp.execute("stop", json!({}));
        // I/O that is in flight ends, or waits.
        std::thread::sleep(Duration::from_millis(300));
        qmp.execute("cont", json!({}));
    }
    guest.wait_for_events();
    guest.mark_disk();
    let outcome = guest.wait();
    outcome.assert_translated();
    let resets: Vec<_> = outcome.events("reset").filter_map(|reset| reset["reset"].as_str()).collect();
    assert!(resets.iter().filter(|reset| **reset == "resume").count() >= 3, "{resets:?}");
}

#[test]
fn unbind_and_rebind_the_driver() {
    let outcome = Guest::new(NVME, "rebind nvme 0000:00:04.0 --times 5").run();
    outcome.assert_translated();
}

#[test]
fn the_kernels_driver_of_the_dma_engine_passes_its_self_test() {
    let topology = format!("{NVME}[[dma-engine]]\naddress = \"05.0\"\n");
    let outcome = Guest::new(&topology, "ioat-selftest").run();
    assert_eq!(outcome.count("faults"), 0);
    assert!(outcome.events("dma").any(|dma| dma["endpoint"] == 0x28 && dma["route"] == "mapped"));
}

/// The faults of an endpoint in their order: reason, access and address of each.
fn faults_of(outcome: &Outcome, endpoint: u32) -> Vec<Value> {
    let faults = outcome.events("fault").filter(|fault| fault["endpoint"] == endpoint);
    let told =
        |fault: &Value| json!({ "reason": fault["reason"], "access": fault["access"], "address": fault["address"] });
    faults.map(told).collect()
}

#[test]
fn rogue_dma_faults() {
    let topology = format!("{NVME}[[dma-engine]]\naddress = \"05.0\"\n");
    let outcome = Guest::new(&topology, "vfio-dma").run();
    let result = outcome.results_of("vfio-dma").next().expect("a result");
    // The accesses that must be refused: to an unmapped source, destination, descriptor or completion, past a mapping's
    // end, a write and a read without permission.
    let cases = result["cases"].as_array().unwrap().iter().filter(|case| !case["fault_iova"].is_null());
    let expected: Vec<_> = cases
        .map(|case| {
            let address = format!("{:#x}", case["fault_iova"].as_u64().unwrap());
            json!({ "reason": "MAPPING", "access": case["fault_access"], "address": address })
        })
        .collect();
    assert_eq!(expected.len(), 8);
    assert_eq!(faults_of(&outcome, 0x28), expected);
    // The driver in the guest has reported them.
    assert!(outcome.console.contains("page fault"), "the guest's virtio-iommu driver reports faults");
}

#[test]
fn the_smallest_device_writes_where_it_may() {
    let outcome = Guest::new(&format!("{NVME}[[null]]\naddress = \"05.0\"\n"), "null").run();
    let result = outcome.results_of("null").next().expect("a result");
    let address = format!("{:#x}", result["fault_iova"].as_u64().unwrap());
    let expected = json!({ "reason": "MAPPING", "access": result["fault_access"], "address": address });
    assert_eq!(faults_of(&outcome, 0x28), [expected]);
    let written = outcome.events("dma").filter(|dma| dma["endpoint"] == 0x28 && dma["route"] == "mapped");
    assert_eq!(written.count(), 1);
}

/// A function without a driver is attached to no domain, so with `bypass` off all its DMA is refused.
///
/// No guest can cause the third reason, UNKNOWN: it is for endpoints that the device does not manage, and the topology
/// has every function that is served. `row_44_why_an_access_faults` tests it over the socket.
#[test]
fn rogue_dma_without_a_domain_faults() {
    let topology = "[iommu]\nbypass = false\n[[dma-engine]]\naddress = \"05.0\"\n";
    let outcome = Guest::new(topology, "unattached-dma").run();
    let result = outcome.results_of("unattached-dma").next().expect("a result");
    assert_eq!(result["chanerr"], result["expected_chanerr"]);
    let address = format!("{:#x}", result["fault_iova"].as_u64().unwrap());
    assert_eq!(
        faults_of(&outcome, 0x28),
        [json!({ "reason": "DOMAIN", "access": result["fault_access"], "address": address })]
    );
    assert_eq!(outcome.requests("attach"), 0, "the engine was attached");
    assert_eq!(outcome.events("dma").count(), 0, "an access went through");
}

/// `viommu serve` of a controller, and its folder.
fn serve() -> (Folder, Serve) {
    let folder = Folder::new();
    let arguments = ["--trace-socket", "trace.sock", "--create-images", "256M"];
    let daemon = Serve::start(&folder, &nvme_in("memory = \"512M\""), &arguments);
    (folder, daemon)
}

#[test]
fn a_killed_qemu_leaves_a_daemon_that_serves_the_next() {
    let (_folder, daemon) = serve();
    let first = daemon.guest(BUSY).start();
    first.wait_for_result("the beginning of the I/O", |result| result["event"] == "begin");
    std::thread::sleep(Duration::from_secs(2));
    first.kill();
    let second = daemon.guest("nvme-io --op verify --bs 64k --depth 4 --total 4M").run();
    assert!(second.results_of("nvme-io").all(|result| result["verified"] == true));
}

#[test]
fn sigterm_ends_the_daemon_and_its_sockets() {
    const SOCKETS: [&str; 3] = ["viommu.sock", "nvme0.sock", "trace.sock"];
    let (folder, daemon) = serve();
    let guest = daemon.guest(BUSY).start();
    guest.wait_for_result("the boot report", |result| result["event"] == "boot");
    assert!(SOCKETS.iter().all(|name| folder.join(name).exists()));
    let (status, _) = daemon.end();
    assert!(status.success(), "{status}");
    for name in SOCKETS {
        assert!(!folder.join(name).exists(), "{name} is left");
    }
}

#[test]
fn sigterm_ends_run_and_its_qemu() {
    let guest = Guest::new(NVME, BUSY).start();
    guest.wait_for_result("the boot report", |result| result["event"] == "boot");
    guest.signal(Signal::SIGTERM);
    let outcome = guest.end();
    assert!(outcome.status.success(), "{}", outcome.status);
    assert!(outcome.count("events") > 0, "a summary is left");
}
