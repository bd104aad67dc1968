//! What happens to a guest and to the daemon in the course of their lives.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Guest, LIMIT, Outcome, Process, guest_files};
use crate::{BUSY, NVME, nvme_in};

#[test]
fn reboot() {
    let outcome = Guest::new(NVME, "reboot").run();
    assert_eq!(outcome.summary["verified"], true);
    assert_eq!(outcome.count("faults"), 0);
    let resets: Vec<_> = outcome.events("reset").map(|reset| reset["reset"].clone()).collect();
    assert!(resets.contains(&json!("system")), "{resets:?}");
    // Nothing of the first life is in the second: the same domain ids are created anew, and no MAP failed.
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
        // I/O that is under way ends, or waits.
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

/// The faults of an endpoint in their order, each as its reason, access and address.
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
    // What each case must be refused: an access to an unmapped source, destination, descriptor or completion, past a
    // mapping's end, a write without permission, a read without.
    let cases = result["cases"].as_array().unwrap().iter().filter(|case| !case["fault_iova"].is_null());
    let expected: Vec<_> = cases
        .map(|case| {
            let address = format!("{:#x}", case["fault_iova"].as_u64().unwrap());
            json!({ "reason": "MAPPING", "access": case["fault_access"], "address": address })
        })
        .collect();
    assert_eq!(expected.len(), 8);
    assert_eq!(faults_of(&outcome, 0x28), expected);
    // The driver in the guest was told of them.
    assert!(outcome.console.contains("page fault"), "the guest's virtio-iommu driver reports faults");
}

/// A function without a driver is attached to nothing, so with `bypass` off all its DMA is refused.
///
/// The third reason, UNKNOWN, no guest can bring about: it is that of an endpoint which the device does not manage, and
/// every function that is served is in the topology. `row_44_why_an_access_faults` has it, over the socket.
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

/// `serve` for a QEMU that the test starts itself.
struct Daemon {
    folder: tempfile::TempDir,
    child: Process,
}

impl Daemon {
    fn start() -> Daemon {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("topology.toml"), nvme_in("memory = \"512M\"")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_viommu"))
            .current_dir(folder.path())
            .args([
                "serve",
                "--topology",
                "topology.toml",
                "--socket-path",
                "viommu.sock",
                "--trace-socket",
                "trace.sock",
            ])
            .args(["--create-images", "64M"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Daemon { folder, child: Process(child) };
        for name in ["viommu.sock", "nvme0.sock", "trace.sock", "viot.bin"] {
            let begun = Instant::now();
            while !daemon.folder.path().join(name).exists() {
                assert!(begun.elapsed() < LIMIT, "{name} did not appear");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        daemon
    }

    /// A QEMU by the line that `viommu args` prints, as a user would start it.
    fn qemu(&self, workload: &str, results: &str) -> Process {
        let files = guest_files("stock");
        let args = Command::new(env!("CARGO_BIN_EXE_viommu"))
            .current_dir(self.folder.path())
            .args(["args", "--machine", "--topology", "topology.toml", "--socket-path", "viommu.sock"])
            .output()
            .unwrap();
        let args = String::from_utf8(args.stdout).unwrap();
        let line = format!(
            "exec {qemu} -accel tcg,thread=multi -cpu max -nodefaults -display none -no-reboot \
             -serial file:console.log -serial file:{results} -qmp unix:test-qmp.sock,server=on,wait=off \
             -kernel {kernel} -initrd {initrd} -append 'console=ttyS0 panic=-1 -- {workload}' {args}",
            qemu = files.join("qemu").display(),
            kernel = files.join("vmlinuz").display(),
            initrd = files.join("initramfs").display(),
            args = args.trim(),
        );
        let mut command = Command::new("sh");
        command.arg("-c").arg(line).current_dir(self.folder.path()).stdin(Stdio::null());
        Process(command.spawn().unwrap())
    }

    fn wait_for(&self, results: &str, wanted: &str) {
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            if std::fs::read_to_string(self.folder.path().join(results)).unwrap_or_default().contains(wanted) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{wanted} did not come; the console: {}", self.console());
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("console.log")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("==== the guest's console ====\n{}", self.console());
        }
    }
}

#[test]
fn a_killed_qemu_leaves_a_daemon_that_serves_the_next() {
    let daemon = Daemon::start();
    let mut first = daemon.qemu(BUSY, "first.jsonl");
    daemon.wait_for("first.jsonl", "\"event\":\"begin\"");
    std::thread::sleep(Duration::from_secs(2));
    first.kill();
    let mut second = daemon.qemu("nvme-io --op verify --bs 64k --depth 4 --total 4M", "second.jsonl");
    daemon.wait_for("second.jsonl", "\"event\":\"end\"");
    second.end();
    daemon.wait_for("second.jsonl", "\"verified\":true");
}

#[test]
fn sigterm_ends_the_daemon_and_its_sockets() {
    let mut daemon = Daemon::start();
    let qemu = daemon.qemu(BUSY, "results.jsonl");
    daemon.wait_for("results.jsonl", "\"event\":\"boot\"");
    kill(Pid::from_raw(daemon.child.0.id() as i32), Signal::SIGTERM).unwrap();
    daemon.child.end();
    for name in ["viommu.sock", "nvme0.sock", "trace.sock"] {
        assert!(!daemon.folder.path().join(name).exists(), "{name} is left");
    }
    drop(qemu);
}

#[test]
fn sigterm_ends_run_and_its_qemu() {
    let guest = Guest::new(NVME, BUSY).start();
    guest.wait_for_result("the boot report", |result| result["event"] == "boot");
    kill(Pid::from_raw(guest.pid() as i32), Signal::SIGTERM).unwrap();
    let outcome = guest.end();
    assert!(outcome.status.success(), "{}", outcome.status);
    assert!(outcome.count("events") > 0, "a summary is left");
}
