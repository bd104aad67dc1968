//! A daemon with two NVMe controllers, three DMA engines and a trace.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vfio_user::Client;

const TOPOLOGY: &str = "[[nvme]]\naddress = \"04.0\"\nimage = \"nvme0.img\"\n[[dma-engine]]\naddress = \"05.0\"\n\
                        [[nvme]]\naddress = \"06.0\"\nimage = \"nvme1.img\"\n[[dma-engine]]\naddress = \"07.0\"\n\
                        [[dma-engine]]\naddress = \"08.0\"\n";

/// The endpoints of the topology.
pub const NVME: [u32; 2] = [0x20, 0x30];
pub const ENGINE: u32 = 0x28;
/// These do nothing, but each keeps a domain alive.
pub const IDLE: [u32; 2] = [0x38, 0x40];

/// How much to do: `long` in `make soak`.
pub fn amount(short: u64, long: u64) -> u64 {
    if std::env::var_os("VIOMMU_SOAK").is_some() { long } else { short }
}

pub struct Daemon {
    child: Child,
    folder: TempDir,
    log: Option<JoinHandle<String>>,
    _alone: MutexGuard<'static, ()>,
}

impl Daemon {
    /// Starts one at a time: two would only slow each other down.
    pub fn start() -> Daemon {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("topology.toml"), TOPOLOGY).unwrap();
        let arguments = ["--topology", "topology.toml", "--trace-socket", "trace.sock", "--create-images", "16M"];
        let (mut child, _) = crate::serve_on("viommu.sock", folder.path(), &arguments);
        let mut log = child.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut said = String::new();
            log.read_to_string(&mut said).unwrap();
            said
        });
        Daemon { child, folder, log: Some(log), _alone: alone }
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn client(&self, name: &str) -> Client {
        Client::new(&self.socket(name)).unwrap()
    }

    fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string())
    }

    /// Memory that is resident, in bytes.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(self.proc().join("status")).unwrap();
        let field = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        field.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Descriptors that are open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(self.proc().join("fd")).unwrap().count()
    }

    /// Asks it to end. Returns its messages.
    pub fn end(mut self) -> String {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        let status = self.child.wait().unwrap();
        let said = self.log.take().unwrap().join().unwrap();
        assert!(status.success(), "{status}: {said}");
        assert!(!said.contains("panicked"), "{said}");
        said
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
