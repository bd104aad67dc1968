//! Guests for the benchmarks: the daemon that serves their devices, a QEMU, and the results of their workloads.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::Value;

pub mod tandem;

/// How long one guest may take.
const LIMIT: Duration = Duration::from_secs(900);

/// The folder with QEMU, kernel and initial RAM file system that `scripts/prepare-guest FLAVOUR` made.
pub fn guest_files(flavour: &str) -> PathBuf {
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(flavour);
    assert!(files.join("initramfs").exists(), "no guest in {files:?}; run scripts/prepare-guest {flavour}");
    files
}

/// Who runs on which of the machine's cores. Where threads land by chance, the daemon shares a core with the guest's
/// processor in some boots and not in others, and that alone makes throughput differ by a factor of three.
pub struct Cores {
    /// The guest's processor has a core of its own.
    processor: CpuSet,
}

impl Cores {
    /// Moves this process, and so all that it starts from now on, to the other cores.
    pub fn divide() -> Cores {
        let this = Pid::from_raw(0);
        let all = sched_getaffinity(this).unwrap();
        let mut cores = (0..CpuSet::count()).filter(|core| all.is_set(*core).unwrap());
        let (mut processor, mut others) = (CpuSet::new(), CpuSet::new());
        processor.set(cores.next().unwrap()).unwrap();
        cores.for_each(|core| others.set(core).unwrap());
        sched_setaffinity(this, &others).expect("at least two cores are wanted");
        Cores { processor }
    }

    /// Gives the guest's processor its core. QEMU names its thread, not long after it was started.
    fn keep_processor(&self, qemu: u32) {
        let processor = || {
            let threads = fs::read_dir(format!("/proc/{qemu}/task")).ok()?;
            threads
                .flatten()
                .find(|thread| fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.contains("CPU")))
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(thread) = processor() {
                let id = thread.file_name().to_string_lossy().parse().unwrap();
                return sched_setaffinity(Pid::from_raw(id), &self.processor).unwrap();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("QEMU has no thread that is named after a CPU");
    }
}

/// A guest that runs workloads of `viommu-guest` and powers off.
pub struct Guest<'a> {
    /// Where its processor runs.
    pub cores: &'a Cores,
    /// Where sockets, images and results are.
    pub folder: &'a Path,
    /// What [`guest_files`] takes.
    pub flavour: &'a str,
    /// QEMU's accelerator, and what goes with it.
    pub accel: &'a str,
    /// QEMU's arguments for machine and devices.
    pub devices: &'a str,
    /// More words for the kernel's command line.
    pub append: &'a str,
    /// Workloads, separated by `+`.
    pub workload: &'a str,
}

impl Guest<'_> {
    /// Boots it, waits for its end and returns what it said.
    pub fn run(&self) -> Vec<Value> {
        let ended = self.boot().wait();
        let values = results(self.folder);
        let good = values.iter().any(|value| value["event"] == "end" && value["ok"] == true);
        assert!(ended && good, "{}: the guest failed or did not end; {}", self.workload, said(self.folder));
        values
    }

    /// Starts it.
    pub fn boot(&self) -> Qemu {
        let _ = fs::remove_file(self.folder.join("results.jsonl"));
        let Guest { accel, devices, append, .. } = self;
        let files = guest_files(self.flavour);
        let files = files.display();
        // Commas: one word for the kernel, which takes 32 at most.
        let workload = self.workload.replace(' ', ",");
        let line = format!(
            "exec {files}/qemu -accel {accel} -cpu max -no-user-config -nodefaults -display none -no-reboot {devices} \
             -serial file:console.log -serial file:results.jsonl -kernel {files}/vmlinuz -initrd {files}/initramfs \
             -append 'console=ttyS0 panic=-1 {append} -- {workload}'"
        );
        let mut command = Command::new("sh");
        command.arg("-c").arg(line).current_dir(self.folder).stdin(Stdio::null());
        let qemu = Qemu(end_with_this_process(&mut command).spawn().unwrap());
        self.cores.keep_processor(qemu.id());
        qemu
    }
}

/// A QEMU that runs; killed when dropped.
pub struct Qemu(Child);

impl Qemu {
    /// Its process.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it is over.
    pub fn ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// Kills it, if it is not over.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Waits for its end. `false`: it did not come in time.
    fn wait(&mut self) -> bool {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if self.ended() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Has a process killed when this one ends, however it does: one that is stopped would stay for ever.
fn end_with_this_process(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; this is one system call.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(std::io::Error::from)
        })
    }
}

/// What a guest in this folder has said so far of its workloads.
fn results(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("results.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What a guest in this folder said.
fn said(folder: &Path) -> String {
    let results = fs::read_to_string(folder.join("results.jsonl")).unwrap_or_default();
    let console = fs::read(folder.join("console.log")).unwrap_or_default();
    format!("its results:\n{results}\nits console:\n{}", String::from_utf8_lossy(&console))
}

/// Makes the image of the NVMe controller. Not sparse: a hole reads faster than data.
pub fn write_image(folder: &Path) {
    fs::write(folder.join("disk.img"), vec![0x5a; 256 << 20]).unwrap();
}

/// QEMU's arguments for the machine and the devices of `topology.toml` in this folder.
pub fn devices(folder: &Path) -> String {
    let output = viommu(folder, &["args", "--machine"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

fn viommu(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommu"));
    command.current_dir(folder).args(args).args(["--topology", "topology.toml", "--socket-path", "viommu.sock"]);
    command
}

/// `viommu serve` with `topology.toml` in a folder; ends when dropped.
pub struct Daemon(Child);

impl Daemon {
    /// Starts it, with more arguments or none.
    pub fn start(folder: &Path, args: &[&str]) -> Daemon {
        let mut command = viommu(folder, &["serve"]);
        let daemon = Daemon(end_with_this_process(command.args(args).stdout(Stdio::piped())).spawn().unwrap());
        wait_for(&folder.join("nvme0.sock"));
        daemon
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Ends it, and returns what it printed.
    pub fn end(mut self) -> String {
        self.terminate();
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// SIGTERM, so that the sockets are removed.
    fn terminate(&self) {
        let pid = Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.terminate();
        // It would wait for somebody to read what it prints.
        drop(self.0.stdout.take());
        let _ = self.0.wait();
    }
}

/// Waits until there is a file.
pub fn wait_for(path: &Path) {
    for _ in 0..500 {
        if path.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{path:?} did not appear");
}

/// The median of values, of which there is at least one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// A median, and the range that encloses that of the whole population with a confidence of at least 95 %.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Median {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Median {
    /// Of values in any order. Of fewer than 6 none has that confidence: the range is 0 to infinity then.
    pub fn of(mut values: Vec<f64>) -> Median {
        values.sort_by(f64::total_cmp);
        let count = values.len() as i32;
        // How many values may be left out at each end: half of all the rest lie below the median by chance.
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

/// Whether a ratio is at least `least`, as far as the spread lets one say.
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
