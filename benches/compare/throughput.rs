//! Throughput: the variants in interleaved time slices, in rounds of boots.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use viommu_testkit::guest::{Folder, Serve};

use super::common::interleaved::{self, Contender, Io, Measured};
use super::common::{self, Cores, median};
use super::{MODES, Mode, Setup, VARIANTS, Variant};

/// Name, workload, and the I/O that it does.
pub const CASES: [(&str, &str, Io); 3] = [
    ("4 KiB read, depth 1", "--bs 4k --depth 1", Io { write: false, bytes: 4 << 10 }),
    ("4 KiB read, depth 32", "--bs 4k --depth 32", Io { write: false, bytes: 4 << 10 }),
    (
        "128 KiB read of 32 scattered pages, depth 8",
        "--bs 128k --depth 8 --scatter",
        Io { write: false, bytes: 128 << 10 },
    ),
];

/// Adds `throughput` to each setup in `all`: I/Os per second of each round, and the ratios to `unpatched`.
pub fn measure(rounds: usize, cores: &Cores, all: &mut Value) {
    let mut measured: BTreeMap<(Mode, usize), BTreeMap<Variant, Measured>> = BTreeMap::new();
    for round in 0..rounds {
        for mode in MODES {
            for (case, (name, workload, io)) in CASES.iter().enumerate() {
                eprintln!("throughput, round {} of {rounds}: {}, {name}", round + 1, mode.name);
                let start = |variant, folder: &Folder| {
                    boot(Setup { variant, mode }, cores, folder, &format!("--op randread {workload}"))
                };
                interleaved::round(&VARIANTS, *io, round, measured.entry((mode, case)).or_default(), start);
            }
        }
    }
    for mode in MODES {
        for variant in VARIANTS {
            let cases = CASES.iter().enumerate().filter(|_| rounds > 0).map(|(case, (name, ..))| {
                let of = &measured[&(mode, case)][&variant];
                let ratio = of.ratio();
                let value = json!({
                    "iops": median(&of.iops), "iops_of_rounds": of.iops, "ratios_of_rounds": of.ratios,
                    "ratio_to_unpatched": { "median": ratio.median, "low": ratio.low, "high": ratio.high },
                });
                ((*name).to_string(), value)
            });
            all[variant.name][mode.name]["throughput"] = cases.collect::<serde_json::Map<_, _>>().into();
        }
    }
}

/// Boots a guest whose reads never end.
fn boot(setup: Setup, cores: &Cores, folder: &Folder, options: &str) -> Contender {
    common::write_image(folder);
    let daemon = Serve::start(folder, &setup.topology(true), &[]);
    let workload = format!("nvme-io {options} --seconds {}", interleaved::ENDLESS_SECONDS);
    let guest = daemon.guest(&workload).kernel(&setup.variant.kernel()).append(setup.mode.append);
    let check = move |results: &[Value]| drop(setup.check(results));
    Contender { guest: cores.start(guest), daemon: Some(daemon), check: Box::new(check) }
}
