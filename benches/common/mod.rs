//! What the benchmarks that boot guests share: which core runs what, guests in interleaved time slices, and medians.

use std::fs;

use nix::unistd::Pid;
use viommu_testkit::guest::{Folder, Guest, Running};
use viommu_testkit::{PATIENCE, wait_until};

mod cores;
pub mod interleaved;

pub use cores::Cores;

impl Cores {
    /// Boots a guest whose processor has its own core. QEMU names the processor's thread shortly after its start.
    pub fn start(&self, guest: Guest) -> Running {
        let running = guest.start();
        let mut thread = None;
        wait_until(PATIENCE, "a thread of QEMU's that is named after a CPU", || {
            let threads = fs::read_dir(format!("/proc/{}/task", running.pid())).into_iter().flatten().flatten();
            let is_processor = |name: String| name.contains("CPU");
            thread = threads
                .filter(|thread| fs::read_to_string(thread.path().join("comm")).is_ok_and(is_processor))
                .find_map(|thread| thread.file_name().to_string_lossy().parse().ok());
            thread.is_some()
        });
        self.give_processor(Pid::from_raw(thread.unwrap()));
        running
    }
}

/// Makes the image of the NVMe controller. Not sparse: a hole reads faster than data.
pub fn write_image(folder: &Folder) {
    folder.write("disk.img", vec![0x5a; 256 << 20]);
}

/// The median of one or more values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// A median, and the range that contains the median of the whole population with a confidence of at least 95 %.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Median {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Median {
    /// Of values in any order. Fewer than 6 values give no range with that confidence: it is 0 to infinity then.
    pub fn of(mut values: Vec<f64>) -> Median {
        values.sort_by(f64::total_cmp);
        let count = values.len() as i32;
        // How many values may be left out at each end: each value lies below the true median with a probability of a
        // half.
        let (mut left_out, mut tail, mut ways) = (None, 0.0, 1.0);
        for at in 0..count / 2 {
            tail += ways / 2_f64.powi(count);
            ways *= f64::from(count - at) / f64::from(at + 1);
            if 2.0 * tail <= 0.05 {
                left_out = Some(at as usize);
            }
        }
        let range = left_out.map(|at| (values[at], values[values.len() - 1 - at]));
        let (low, high) = range.unwrap_or((0.0, f64::INFINITY));
        Median { median: median(&values), low, high }
    }
}

/// A verdict: the goal is reached.
pub const REACHED: &str = "reached";
/// A verdict: the goal is missed.
pub const MISSED: &str = "MISSED";

/// Whether a ratio is at least `least`, as far as the spread allows to say.
pub fn verdict(ratio: Median, least: f64) -> &'static str {
    if ratio.high < least {
        MISSED
    } else if ratio.low >= least {
        REACHED
    } else if ratio.median >= least {
        "reached, though the spread includes less"
    } else {
        "within noise: the spread includes it, the median is less"
    }
}
