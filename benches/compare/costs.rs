//! The cost of mapping in the guest: its workload map-cost, once timed by the clock, and once in a guest whose clock
//! counts instructions.

use serde_json::{Value, json};
use viommu_testkit::guest::{Folder, Guest, Serve};

use super::common::Cores;
use super::{SIZES, Setup};

/// One tick of the time stamp counter is one instruction of the guest, so that a time is the same in each run. That
/// does not hold while the guest waits for the device, which does not follow the guest's clock.
fn count_instructions(guest: Guest) -> Guest {
    guest.accel("tcg,thread=single").qemu(&["-icount", "shift=0"])
}

/// Boots two guests, and adds their results to each size in `all`.
pub fn measure(setup: Setup, cores: &Cores, all: &mut Value) {
    let boot = |ios, change: fn(Guest) -> Guest| {
        let folder = Folder::new();
        let sizes = SIZES.iter().map(|size| format!("map-cost --ios {ios} {}", size.options()));
        let workload = sizes.collect::<Vec<_>>().join(" + ");
        let daemon = Serve::start(&folder, &setup.topology(true), &["--create-images", "256M"]);
        let guest = daemon.guest(&workload).kernel(&setup.variant.kernel()).append(setup.mode.append);
        let outcome = cores.start(change(guest)).wait();
        daemon.end();
        setup.check(&outcome.results);
        outcome.results_of("map-cost").cloned().collect::<Vec<_>>()
    };
    let timed = boot(512, |guest| guest);
    // All I/Os take the same number of instructions, so a few suffice.
    let counted = boot(64, count_instructions);
    for (size, (timed, counted)) in SIZES.iter().zip(timed.iter().zip(&counted)) {
        let of = &mut all[size.name];
        let ticks_per_us = timed["ticks"]["ticks_per_us"].as_f64().unwrap();
        let sum = |result: &Value, what: &str| -> f64 {
            ["map", "unmap", "flush"].iter().map(|part| result["ticks"][part][what].as_f64().unwrap()).sum()
        };
        of["mapping_cpu_us_per_io"] = json!((sum(timed, "own") + sum(timed, "waiting")) / ticks_per_us);
        of["of_it_waiting_us_per_io"] = json!(sum(timed, "waiting") / ticks_per_us);
        of["mapping_instructions_per_io"] = json!(sum(counted, "own"));
        // How many calls the median lacks.
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
