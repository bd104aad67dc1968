//! Controllers that are plugged and unplugged while the guest runs.

use std::os::unix::net::UnixStream;

use serde_json::{Value, json};
use viommu_testkit::guest::{Guest, Outcome, Running};
use viommu_testkit::process::viommu;
use viommu_trace::Kind;
use viommu_trace::{Event, Reader, Subscription};

/// The second controller is not there at first.
const TOPOLOGY: &str = "[[root-port]]\nname = \"rp1\"\naddress = \"06.0\"\n\
                        [[root-port]]\nname = \"rp2\"\naddress = \"07.0\"\n\
                        [[nvme]]\naddress = \"00.0\"\nbehind = \"rp1\"\nimage = \"nvme0.img\"\n\
                        [[nvme]]\naddress = \"00.0\"\nbehind = \"rp2\"\nimage = \"nvme1.img\"\nhotplug = true\n";

/// Waits for one of the guest's markers.
fn wait_for(guest: &Running, name: &str, round: u64) {
    guest.wait_for_result(name, |result| result["name"] == name && result["round"] == round);
}

/// The arguments for QMP's device_add, from `viommu args`.
fn arguments(guest: &Running) -> Value {
    let arguments = viommu()
        .current_dir(guest.path("."))
        .args(["args", "--topology", "topology.toml", "--hotplug", "nvme1", "--socket-path"])
        .arg(guest.path("viommu.sock").canonicalize().unwrap())
        .output()
        .unwrap();
    assert!(arguments.status.success(), "{}", String::from_utf8_lossy(&arguments.stderr));
    serde_json::from_slice(&arguments.stdout).unwrap()
}

/// The ends of connections, in their order. QEMU says that a device is gone (DEVICE_DELETED) a moment before it closes
/// the connection. It does not close it while a `device_add` waits for the server, which serves one client at a time.
struct Disconnects(Reader<UnixStream>);

impl Disconnects {
    fn of(guest: &Running) -> Disconnects {
        let subscription = Subscription { kinds: vec![Kind::Session], ..Subscription::default() };
        Disconnects(Reader::connect(&guest.path("trace.sock"), &subscription).unwrap())
    }

    /// Waits for the end of the second controller's connection.
    fn wait(&mut self) {
        loop {
            // This cannot hang: the run has a time limit, and the trace ends with it.
            let record = self.0.next_record().unwrap().expect("the trace ended");
            if let Event::Session { endpoint: Some(0x200), connected: false, .. } = Event::decode(&record).unwrap() {
                return;
            }
        }
    }
}

fn assert_second_was_translated(outcome: &Outcome) {
    outcome.assert_translated();
    assert!(outcome.events("dma").any(|dma| dma["endpoint"] == 0x200 && dma["route"] == "mapped"));
}

#[test]
fn hot_add() {
    let guest = Guest::new(TOPOLOGY, "hotplug-wait").start();
    wait_for(&guest, "hotplug-ready", 0);
    guest.qmp().execute("device_add", arguments(&guest));
    assert_second_was_translated(&guest.wait());
}

/// The host unplugs and then the guest. QEMU, which would abort if the function had MSI-X, and the guest go on.
#[test]
fn hot_unplug_and_plug_again() {
    let guest = Guest::new(TOPOLOGY, "hotplug-wait --unplug host --unplug guest").start();
    let mut qmp = guest.qmp();
    let arguments = arguments(&guest);
    wait_for(&guest, "hotplug-ready", 0);
    let mut disconnects = Disconnects::of(&guest);
    qmp.execute("device_add", arguments.clone());
    wait_for(&guest, "hotplug-unplug", 1);
    qmp.execute("device_del", json!({ "id": "nvme1" }));
    for round in 1..=2 {
        wait_for(&guest, "hotplug-ready", round);
        disconnects.wait();
        qmp.execute("device_add", arguments.clone());
    }
    let outcome = guest.wait();
    assert_second_was_translated(&outcome);
    let sessions =
        outcome.events("session").filter(|session| session["endpoint"] == 0x200 && session["connected"] == true);
    assert_eq!(sessions.count(), 3);
    assert_eq!(outcome.warnings(), Vec::<&str>::new());
}
