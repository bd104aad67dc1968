//! Real guests: Linux with the workloads of `viommu-guest` on a stock QEMU, with our devices or without.

mod daemon;
mod folder;
mod outcome;
mod qmp;
mod results;
mod running;

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

pub use self::daemon::{InProcess, Serve};
pub use self::folder::Folder;
pub use self::outcome::Outcome;
pub use self::qmp::Qmp;
pub use self::results::Results;
pub use self::running::Running;
use crate::process::viommu;

/// How long one guest may take, from start to power-off, under emulation on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(600);

/// Emulation, so that the results of machines with and without KVM can be compared.
pub const ACCEL: &str = "tcg,thread=multi";

/// The size of images that are made, as `--create-images` takes it.
const IMAGE_SIZE: &str = "256M";
const IMAGE_BYTES: u64 = 256 << 20;

// Files in a guest's folder.
const TOPOLOGY: &str = "topology.toml";
const SOCKET: &str = "viommu.sock";
const TRACE_SOCKET: &str = "trace.sock";
const QMP_SOCKET: &str = "test-qmp.sock";
const CONSOLE: &str = "guest.log";
const RESULTS: &str = "results.jsonl";
const TRACE: &str = "trace.jsonl";
const GUEST_TRACE: &str = "guest.jsonl";
const SUMMARY: &str = "summary.json";
const LOG: &str = "viommu.log";
const FIRST_DISK: &str = "nvme0.img";

/// The checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The Linux that `VIOMMU_SERIES` in the environment names, unless it is 7.3, the default.
pub fn other_series() -> Option<String> {
    std::env::var("VIOMMU_SERIES").ok().filter(|linux| linux != "7.3")
}

/// The name of a kernel (`patched`, `unpatched`, `debug`) of Linux 7.3, or of that which [`other_series`] says.
pub fn of_series(name: &str) -> String {
    other_series().map_or_else(|| name.into(), |linux| format!("{name}-{linux}"))
}

/// The folder with QEMU, kernel and initial RAM file system, which `scripts/prepare-guest` makes.
pub fn guest_files(kernel: &str) -> PathBuf {
    let folder = root().join("target/guest").join(kernel);
    for name in ["qemu", "vmlinuz", "initramfs"] {
        assert!(folder.join(name).exists(), "{name} is not in {folder:?}; run scripts/prepare-guest {kernel}");
    }
    folder
}

/// A guest to be booted.
pub struct Guest {
    devices: Devices,
    folder: Folder,
    kernel: String,
    append: String,
    workload: String,
    accel: String,
    limit: Duration,
    reboots: bool,
    disk: Option<Vec<u8>>,
    boots_from_disk: bool,
    guest_trace: bool,
    inject: Vec<String>,
    machine: Vec<String>,
    qemu: Vec<String>,
}

/// Who provides the machine and its devices.
enum Devices {
    /// `viommu run` serves those of this topology, and starts QEMU with them.
    Run(String),
    /// QEMU is started with these arguments, in a shell's notation.
    Shell(String),
    /// QEMU is started with these arguments.
    Arguments(Vec<String>),
}

impl Guest {
    /// A guest of `viommu run` with this topology (TOML) that runs these workloads of `viommu-guest` and powers off.
    pub fn new(topology: &str, workload: &str) -> Guest {
        Guest::with(Devices::Run(topology.into()), workload)
    }

    /// A guest whose machine and devices are QEMU's own, given by these arguments.
    pub fn plain<'a>(arguments: impl IntoIterator<Item = &'a str>, workload: &str) -> Guest {
        Guest::with(Devices::Arguments(arguments.into_iter().map(String::from).collect()), workload)
    }

    fn with(devices: Devices, workload: &str) -> Guest {
        Guest {
            devices,
            folder: Folder::new(),
            kernel: "stock".into(),
            append: String::new(),
            workload: workload.into(),
            accel: ACCEL.into(),
            limit: LIMIT,
            reboots: false,
            disk: None,
            boots_from_disk: false,
            guest_trace: false,
            inject: Vec::new(),
            machine: Vec::new(),
            qemu: Vec::new(),
        }
    }

    /// Uses this folder for all its files, in place of a temporary one.
    pub fn folder(mut self, folder: &Folder) -> Guest {
        self.folder = folder.clone();
        self
    }

    /// Adds a port for the guest's own trace, which the workload `trace` uses.
    pub fn guest_trace(mut self) -> Guest {
        self.guest_trace = true;
        self
    }

    /// Sets the contents at the start of the first disk.
    pub fn disk(mut self, contents: Vec<u8>) -> Guest {
        self.disk = Some(contents);
        self
    }

    /// Boots no kernel: firmware boots this sector of the first disk.
    pub fn boot_from_disk(mut self, sector: &[u8]) -> Guest {
        self.boots_from_disk = true;
        self.disk(sector.to_vec())
    }

    /// Boots this one of the kernels that `scripts/prepare-guest` knows, in place of `stock`.
    pub fn kernel(mut self, name: &str) -> Guest {
        self.kernel = name.into();
        self
    }

    /// Adds words to the kernel's command line.
    pub fn append(mut self, words: &str) -> Guest {
        self.append = words.into();
        self
    }

    /// Sets QEMU's accelerator, in place of [`ACCEL`]; `viommu run` knows `auto` too.
    pub fn accel(mut self, accel: &str) -> Guest {
        self.accel = accel.into();
        self
    }

    /// Sets how long it may take, in place of [`LIMIT`].
    pub fn limit(mut self, limit: Duration) -> Guest {
        self.limit = limit;
        self
    }

    /// Lets the guest restart, in a QEMU that is started without `viommu run`. Without this, QEMU ends at a restart, so
    /// that a panic ends it.
    pub fn reboots(mut self) -> Guest {
        self.reboots = true;
        self
    }

    /// Makes the device answer requests wrongly, as `--inject` says. May be called several times.
    pub fn inject(mut self, injection: &str) -> Guest {
        self.inject.push(injection.into());
        self
    }

    /// Sets QEMU's arguments for the machine and its memory, in place of the topology's.
    pub fn machine<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Guest {
        self.machine.extend(arguments.into_iter().map(String::from));
        self
    }

    /// Adds arguments for QEMU.
    pub fn qemu(mut self, words: &[&str]) -> Guest {
        self.qemu.extend(words.iter().map(ToString::to_string));
        self
    }

    /// Boots it and waits for its end, which must be a success.
    pub fn run(self) -> Outcome {
        self.start().wait()
    }

    /// Boots it.
    pub fn start(self) -> Running {
        // Results of an earlier guest must not be taken for this one's.
        for name in [RESULTS, CONSOLE] {
            let _ = std::fs::remove_file(self.folder.join(name));
        }
        if let Some(contents) = &self.disk {
            let mut disk = File::create(self.folder.join(FIRST_DISK)).unwrap();
            disk.write_all(contents).unwrap();
            disk.set_len(IMAGE_BYTES).unwrap();
        }
        let mut command = match &self.devices {
            Devices::Run(topology) => {
                self.folder.write(TOPOLOGY, topology);
                self.viommu_run()
            }
            Devices::Shell(words) => {
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(format!("exec \"$@\" {words}")).arg("sh").args(self.qemu_line());
                shell
            }
            Devices::Arguments(arguments) => {
                let line = self.qemu_line();
                let mut qemu = Command::new(&line[0]);
                qemu.args(&line[1..]).args(arguments);
                qemu
            }
        };
        let log = File::create(self.folder.join(LOG)).unwrap();
        command.current_dir(self.folder.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Running::start(&mut command, self.folder, self.limit)
    }

    /// The arguments that all guests share: the kernel, unless it boots from its disk.
    fn kernel_arguments(&self, kernel: &str, initrd: &str, append: &str) -> Vec<OsString> {
        if self.boots_from_disk {
            return Vec::new();
        }
        let files = guest_files(&self.kernel);
        // With commas, this is one word for the kernel, which takes 32 at most.
        let line = format!("console=ttyS0 panic=-1 {} -- {}", self.append, self.workload.replace(' ', ","));
        let of = |name: &str| files.join(name).into_os_string();
        vec![kernel.into(), of("vmlinuz"), initrd.into(), of("initramfs"), append.into(), line.into()]
    }

    fn monitor() -> [String; 2] {
        ["-qmp".into(), format!("unix:{QMP_SOCKET},server=on,wait=off")]
    }

    /// QEMU and its arguments, except for the machine and its devices.
    fn qemu_line(&self) -> Vec<OsString> {
        let mut line: Vec<OsString> = vec![guest_files(&self.kernel).join("qemu").into()];
        line.extend(["-accel", &self.accel, "-cpu", "max"].map(OsString::from));
        line.extend(["-no-user-config", "-nodefaults", "-display", "none"].map(OsString::from));
        if !self.reboots {
            line.push("-no-reboot".into());
        }
        for file in [CONSOLE, RESULTS] {
            line.extend(["-serial".into(), format!("file:{file}").into()]);
        }
        line.extend(Guest::monitor().map(OsString::from));
        line.extend(self.kernel_arguments("-kernel", "-initrd", "-append"));
        line.extend(self.qemu.iter().map(OsString::from));
        line
    }

    fn viommu_run(&self) -> Command {
        let mut command = viommu();
        command
            .args(["run", "--topology", TOPOLOGY, "--dir", ".", "--create-images", IMAGE_SIZE])
            .args(["--accel", self.accel.split(',').next().unwrap_or_default()])
            .args(["--trace-file", TRACE, "--summary", SUMMARY])
            .arg("--qemu")
            .arg(guest_files(&self.kernel).join("qemu"))
            .args(["--timeout", &self.limit.as_secs().to_string()]);
        if self.guest_trace {
            command.args(["--guest-trace", GUEST_TRACE]);
        }
        for injection in &self.inject {
            command.args(["--inject", injection]);
        }
        command.args(self.kernel_arguments("--kernel", "--initrd", "--append"));
        if !self.machine.is_empty() {
            command.arg("--no-machine");
        }
        command.arg("--").args(Guest::monitor()).args(&self.machine).args(&self.qemu);
        command
    }
}
