//! Configurations in which a guest must come up and do its I/O.

use viommu_testkit::guest::{Guest, Outcome};

use crate::{NVME, nvme_in};

/// Small and large I/O, with physically scattered pages.
const IO: &str =
    "nvme-io --op verify --bs 4k --depth 8 --total 2M + nvme-io --op verify --bs 128k --depth 4 --total 8M --scatter";

fn endpoint<'a>(outcome: &'a Outcome, bdf: &str) -> &'a serde_json::Value {
    outcome.results.function(bdf)
}

#[test]
fn stock_kernel() {
    let outcome = Guest::new(NVME, IO).run();
    outcome.assert_translated();
    // Debian's default is the lazy flush queue.
    assert_eq!(endpoint(&outcome, "0000:00:04.0")["iommu_type"], "DMA-FQ");
    // 10 MiB are written, and read back once.
    assert!(outcome.count("dma_read_bytes") >= 10 << 20 && outcome.count("dma_write_bytes") >= 10 << 20);
    assert!(
        outcome.count("kicks") > 0
            && outcome.count("kicks") <= outcome.requests("map") + outcome.requests("unmap") + 16
    );
    assert!(outcome.count("mappings_peak") >= 32);
    // The summary's counts are those of the trace.
    let traced = |name: &str| outcome.events("request").filter(|request| request["type"] == name).count() as u64;
    for (name, traced_name) in [("map", "MAP"), ("unmap", "UNMAP"), ("attach", "ATTACH"), ("probe", "PROBE")] {
        assert_eq!(traced(traced_name), outcome.requests(name), "{name}");
    }
    let kicks = outcome.events("kick").count() as u64;
    assert_eq!(kicks, outcome.count("kicks"));
    assert_eq!(outcome.warnings(), Vec::<&str>::new());
}

#[test]
fn backports_kernel() {
    Guest::new(NVME, IO).kernel("backports").run().assert_translated();
}

#[test]
fn strict() {
    let outcome = Guest::new(NVME, IO).append("iommu.strict=1").run();
    outcome.assert_translated();
    assert_eq!(endpoint(&outcome, "0000:00:04.0")["iommu_type"], "DMA");
}

#[test]
fn passthrough() {
    let outcome = Guest::new(NVME, IO).append("iommu.passthrough=1").run();
    assert_eq!(outcome.summary["verified"], true);
    assert_eq!(endpoint(&outcome, "0000:00:04.0")["iommu_type"], "identity");
    assert_eq!((outcome.count("faults"), outcome.requests("map")), (0, 0));
    assert!(outcome.events("dma").all(|dma| dma["route"] == "bypass"));
    assert_eq!(outcome.warnings(), Vec::<&str>::new(), "what is in bypass was attached");
}

#[test]
fn two_processors() {
    let io = "nvme-io --op verify --bs 4k --depth 32 --total 4M --cpu";
    let workload = format!("{io} 0 + {io} 1");
    let outcome = Guest::new(&nvme_in("vcpus = 2"), &workload).run();
    outcome.assert_translated();
    let queues: std::collections::BTreeSet<_> =
        outcome.events("command").filter_map(|command| command["queue"].as_u64()).collect();
    assert!(queues.contains(&1) && queues.contains(&2), "each processor has a queue: {queues:?}");
}

#[test]
fn three_gibibytes() {
    let outcome = Guest::new(&nvme_in("memory = \"3G\""), IO).run();
    outcome.assert_translated();
    assert!(outcome.events("dma").any(|dma| hex(&dma["gpa"]) >= 1 << 32), "no access reached memory above 4 GiB");
}

#[test]
fn four_controllers_have_four_domains() {
    let topology: String =
        (4..8).map(|slot| format!("[[nvme]]\naddress = \"{slot:02x}.0\"\nimage = \"nvme{slot}.img\"\n")).collect();
    let workload: Vec<_> =
        (4..8).map(|slot| format!("nvme-io --dev 0000:00:{slot:02x}.0 --op verify --bs 64k --total 1M")).collect();
    let outcome = Guest::new(&topology, &workload.join(" + ")).run();
    outcome.assert_translated();
    let domains: std::collections::BTreeSet<_> =
        outcome.events("dma").filter(|dma| dma["route"] == "mapped").filter_map(|dma| dma["domain"].as_u64()).collect();
    assert_eq!(domains.len(), 4);
}

#[test]
fn behind_a_root_port() {
    let topology = "[[root-port]]\nname = \"rp1\"\naddress = \"06.0\"\n\
                    [[nvme]]\naddress = \"00.0\"\nbehind = \"rp1\"\nimage = \"nvme0.img\"\n";
    let outcome = Guest::new(topology, IO).run();
    outcome.assert_translated();
    assert_eq!(endpoint(&outcome, "0000:01:00.0")["driver"], "nvme");
    assert!(outcome.events("dma").all(|dma| dma["endpoint"] == 0x100));
}

#[test]
fn nvme_cli() {
    let outcome = Guest::new(NVME, "nvme-cli").run();
    let commands = outcome.results_of("nvme-cli").next().expect("a result");
    assert_eq!(commands["wrong"].as_array().map(Vec::len), Some(0), "{commands:#}");
}

#[test]
fn firmware_boots_from_the_controller() {
    // A boot sector that writes its mark to the second serial port, where results go, and halts.
    let mark = b"{\"event\":\"boot-sector\"}\n";
    let mut code = vec![0xba, 0xf8, 0x02, 0xbe, 0x00, 0x00, 0xb9, mark.len() as u8, 0x00];
    code.extend([0x31, 0xc0, 0x8e, 0xd8, 0xac, 0xee, 0xe2, 0xfc, 0xf4, 0xeb, 0xfd]);
    let text = 0x7c00 + code.len() as u16;
    code[4..6].copy_from_slice(&text.to_le_bytes());
    code.extend(mark);
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    let guest = Guest::new(NVME, "").boot_from_disk(&code).start();
    guest.wait_for_result("the boot sector's mark", |result| result["event"] == "boot-sector");
    guest.qmp().execute("quit", serde_json::json!({}));
    let outcome = guest.end();
    assert!(outcome.events("dma").any(|dma| dma["route"] == "bypass"), "firmware read the disk untranslated");
    assert_eq!(outcome.count("faults"), 0);
    assert_eq!(outcome.warnings(), Vec::<&str>::new());
}

/// A hexadecimal string of the trace as a number.
fn hex(value: &serde_json::Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}
