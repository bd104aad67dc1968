//! Functions as the guest finds them: several in a slot, without MSI, behind another IOMMU.

use std::collections::BTreeSet;

use viommu_testkit::guest::{Guest, Outcome};

use crate::NVME;

/// The functions that a boot report names, and their drivers.
fn drivers(outcome: &Outcome) -> Vec<(String, String)> {
    let boot = outcome.results.boot();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    boot["pci"].as_array().unwrap().iter().map(|found| (text(&found["bdf"]), text(&found["driver"]))).collect()
}

fn verify(bdf: &str) -> String {
    format!("nvme-io --dev {bdf} --op verify --bs 64k --total 1M")
}

#[test]
fn several_functions_share_a_slot() {
    let nvme = |address: &str, image: &str, more: &str| {
        format!("[[nvme]]\naddress = \"{address}\"\nimage = \"{image}.img\"\n{more}")
    };
    let port = |name: &str, address: &str| format!("[[root-port]]\nname = \"{name}\"\naddress = \"{address}\"\n");
    let topology = [
        port("rp1", "05.0"),
        port("rp2", "05.1"),
        nvme("04.0", "a", ""),
        nvme("04.1", "b", ""),
        // Beside the IOMMU.
        nvme("03.1", "c", ""),
        nvme("00.0", "d", "behind = \"rp1\"\n"),
        nvme("00.0", "e", "behind = \"rp2\"\n"),
        nvme("00.3", "f", "behind = \"rp2\"\n"),
    ];
    let functions = ["0000:00:03.1", "0000:00:04.0", "0000:00:04.1", "0000:01:00.0", "0000:02:00.0", "0000:02:00.3"];
    let workload = functions.map(verify).join(" + ");
    let outcome = Guest::new(&topology.concat(), &workload).run();
    outcome.assert_translated();
    let drivers = drivers(&outcome);
    for bdf in functions {
        assert!(drivers.contains(&(bdf.into(), "nvme".into())), "{bdf} is not in {drivers:?}");
    }
    let translated: BTreeSet<_> = outcome
        .events("dma")
        .filter(|dma| dma["route"] == "mapped")
        .filter_map(|dma| dma["endpoint"].as_u64())
        .collect();
    assert_eq!(translated, BTreeSet::from([0x19, 0x20, 0x21, 0x100, 0x200, 0x203]));
    assert_eq!(outcome.warnings(), Vec::<&str>::new());
}

#[test]
fn without_msi() {
    let topology = format!("{NVME}[[dma-engine]]\naddress = \"05.0\"\n");
    let io = "nvme-io --op verify --bs 4k --depth 16 --total 4M + nvme-io --op verify --bs 128k --depth 4 --total 8M --scatter";
    let outcome = Guest::new(&topology, &format!("ioat-selftest + {io}")).append("pci=nomsi").run();
    outcome.assert_translated();
    assert!(outcome.events("dma").any(|dma| dma["endpoint"] == 0x28 && dma["route"] == "mapped"));
    for endpoint in [0x20, 0x28] {
        let vectors: BTreeSet<_> = outcome
            .events("interrupt")
            .filter(|interrupt| interrupt["endpoint"] == endpoint)
            .filter_map(|interrupt| interrupt["vector"].as_u64())
            .collect();
        assert_eq!(vectors, BTreeSet::from([0]), "endpoint {endpoint:#x}");
    }
    let interrupts = outcome.events("interrupt").filter(|interrupt| interrupt["endpoint"] == 0x20).count();
    let commands = outcome.events("command").filter(|command| command["endpoint"] == 0x20).count();
    assert!(interrupts <= 2 * commands, "{interrupts} interrupts for {commands} commands");
    assert!(!outcome.console.contains("nobody cared"));
    assert_eq!(outcome.warnings(), Vec::<&str>::new());
}

/// Its driver takes the functions of the root bus before ours is asked.
#[test]
fn an_iommu_beside_ours_causes_a_warning() {
    let outcome = Guest::new(NVME, &verify("0000:00:04.0"))
        .append("intel_iommu=on")
        .qemu(&["-device", "intel-iommu,caching-mode=on"])
        .run();
    assert_eq!(outcome.requests("attach"), 0);
    let mut warnings = outcome.warnings();
    warnings.retain(|line| line.contains("accesses memory untranslated"));
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("Endpoint 0x20") && warnings[0].contains("-device intel-iommu"), "{warnings:?}");
}
