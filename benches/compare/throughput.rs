//! Throughput: rounds of boots, each of all variants in both modes.

use std::fs;

use serde_json::{Value, json};

use super::common::{self, Cores, Daemon, Guest, Median, median};
use super::{MODES, Setup, VARIANTS};

/// Name, workload.
pub const CASES: [(&str, &str); 3] = [
    ("4 KiB read, depth 1", "--bs 4k --depth 1"),
    ("4 KiB read, depth 32", "--bs 4k --depth 32"),
    ("128 KiB read of 32 scattered pages, depth 8", "--bs 128k --depth 8 --scatter"),
];

/// Seconds of each case in each boot.
pub const SECONDS: f64 = 1.0;

/// Adds `throughput` to each setup in `all`: I/Os per second of each round, and the ratios to `unpatched` of the same
/// round.
pub fn measure(rounds: usize, cores: &Cores, all: &mut Value) {
    let folder = tempfile::tempdir().unwrap();
    // Not sparse: a hole reads faster than data.
    fs::write(folder.path().join("disk.img"), vec![0x5a; 256 << 20]).unwrap();
    let measured = common::rounds(&Setup::all(), rounds, |setup| boot(setup, cores, folder.path()));
    for mode in MODES {
        for variant in VARIANTS {
            let cases = CASES.iter().enumerate().filter(|_| rounds > 0).map(|(case, (name, _))| {
                let of = |variant| &measured[&(Setup { variant, mode }, case)];
                let ratios = of(variant).iter().zip(of(VARIANTS[0])).map(|(ours, base)| ours / base);
                let ratio = Median::of(ratios.collect());
                let value = json!({
                    "iops": median(of(variant)), "iops_of_rounds": of(variant),
                    "ratio_to_unpatched": { "median": ratio.median, "low": ratio.low, "high": ratio.high },
                });
                ((*name).to_string(), value)
            });
            all[variant.name][mode.name]["throughput"] = cases.collect::<serde_json::Map<_, _>>().into();
        }
    }
}

/// Boots one guest and returns the I/Os per second of each case.
fn boot(setup: Setup, cores: &Cores, folder: &std::path::Path) -> Vec<f64> {
    fs::write(folder.join("topology.toml"), setup.topology()).unwrap();
    let _daemon = Daemon::start(folder, None);
    let cases: Vec<_> =
        CASES.iter().map(|(_, case)| format!("nvme-io --op randread {case} --seconds {SECONDS}")).collect();
    let guest = Guest {
        cores,
        folder,
        files: &common::guest_files(setup.variant.kernel),
        accel: super::ACCEL,
        devices: &common::devices(folder),
        append: setup.mode.append,
        workload: &cases.join(" + "),
    };
    let results = guest.run();
    setup.check(&results);
    common::iops(&results, CASES.len(), setup)
}
