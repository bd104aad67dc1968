//! What mapping costs the guest: its workload map-cost, once timed by the clock, and once in a guest whose clock counts
//! instructions.

use std::fs;

use serde_json::{Value, json};

use super::common::{self, Cores, Daemon, Guest};
use super::{SIZES, Setup};

/// One tick of the time stamp counter is one instruction of the guest, so that a time is the same in each run. It is not
/// while the guest waits for the device, which does not care about the guest's clock.
const COUNT_INSTRUCTIONS: &str = "tcg,thread=single -icount shift=0";

/// Boots two guests, and adds to each size in `all` what they say.
pub fn measure(setup: Setup, cores: &Cores, all: &mut Value) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("topology.toml"), setup.topology(true)).unwrap();
    fs::File::create(folder.path().join("disk.img")).unwrap().set_len(256 << 20).unwrap();
    let devices = common::devices(folder.path());
    let boot = |accel, ios| {
        let sizes = SIZES.iter().map(|size| format!("map-cost --ios {ios} {}", size.options()));
        let workload = sizes.collect::<Vec<_>>().join(" + ");
        let daemon = Daemon::start(folder.path(), &[]);
        let append = setup.mode.append;
        let guest = Guest {
            cores,
            folder: folder.path(),
            flavour: setup.variant.kernel,
            accel,
            devices: &devices,
            append,
            workload: &workload,
        };
        let results = guest.run();
        daemon.end();
        setup.check(&results);
        results.into_iter().filter(|value| value["workload"] == "map-cost").collect::<Vec<_>>()
    };
    let timed = boot(super::ACCEL, 512);
    // All are the same, so a few do.
    let counted = boot(COUNT_INSTRUCTIONS, 64);
    for (size, (timed, counted)) in SIZES.iter().zip(timed.iter().zip(&counted)) {
        let of = &mut all[size.name];
        let ticks_per_us = timed["ticks"]["ticks_per_us"].as_f64().unwrap();
        let sum = |result: &Value, what: &str| -> f64 {
            ["map", "unmap", "flush"].iter().map(|part| result["ticks"][part][what].as_f64().unwrap()).sum()
        };
        of["mapping_cpu_us_per_io"] = json!((sum(timed, "own") + sum(timed, "waiting")) / ticks_per_us);
        of["of_it_waiting_us_per_io"] = json!(sum(timed, "waiting") / ticks_per_us);
        of["mapping_instructions_per_io"] = json!(sum(counted, "own"));
        // Of the calls whose time is in the median, how many are not.
        let missed = timed["ticks"]["missed_calls"].as_u64().unwrap();
        if missed > 0 {
            eprintln!("{setup}, {}: {missed} calls went unseen by the guest's probes, and are left out", size.name);
        }
        of["missed_calls"] = missed.into();
        of["probe_us"] = json!(timed["probe_ticks"].as_f64().unwrap() / ticks_per_us);
        let allocations = &timed["allocations"];
        let ios = timed["traced_ios"].as_f64().unwrap();
        of["atomic_allocations_per_io"] = json!(allocations["atomic"].as_f64().unwrap() / ios);
        of["atomic_allocations_by_caller"] = allocations["atomic_by_caller"].clone();
        of["held_bytes_per_mapping"] = allocations["held_bytes"].clone();
    }
}
