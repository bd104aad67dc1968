//! KVM or TCG.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::qemu;
use super::short::short;

/// What is remembered of a KVM that runs the kernel.
const WORKS: &str = "ok\n";

/// What makes the guest's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM if a short boot of the kernel under it succeeds, else TCG
    Auto,
    /// The host's processors
    Kvm,
    /// Emulation
    Tcg,
}

/// What a run uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The host's processors.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Chosen {
    /// QEMU's arguments for it.
    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Chosen::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Chosen::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// Decides; `Auto` boots the kernel under KVM once for each boot of the host, QEMU and kernel, and remembers.
pub fn choose(wish: Accel, qemu: &Path, kernel: Option<&Path>) -> Result<Chosen> {
    match (wish, kernel) {
        (Accel::Tcg, _) | (Accel::Auto, None) => Ok(Chosen::Tcg),
        (Accel::Kvm, None) => Ok(Chosen::Kvm),
        (Accel::Kvm, Some(kernel)) => match probe(qemu, kernel) {
            Ok(()) => Ok(Chosen::Kvm),
            Err(why) => bail!("KVM was asked for, but {}. Use --accel tcg", short(&why)),
        },
        (Accel::Auto, Some(kernel)) => match probe(qemu, kernel) {
            Ok(()) => Ok(Chosen::Kvm),
            Err(why) => {
                eprintln!("viommu: using TCG: {}", short(&why));
                Ok(Chosen::Tcg)
            }
        },
    }
}

fn probe(qemu: &Path, kernel: &Path) -> Result<(), String> {
    let memory = memory(qemu, kernel);
    if let Some(Ok(text)) = memory.as_ref().map(std::fs::read_to_string) {
        return if text == WORKS { Ok(()) } else { Err(text) };
    }
    // Who may open it can change at any time, so that is not remembered.
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    open.map_err(|error| format!("/dev/kvm does not open: {error}"))?;
    let found = qemu::probe_kvm(qemu, kernel);
    if let Some(path) = memory {
        // Only a memory of what can be found again.
        let _ = remember(&path, found.as_ref().err().map_or(WORKS, String::as_str));
    }
    found
}

/// Writes all of the file or nothing, since another run may read it at any moment.
fn remember(path: &Path, text: &str) -> std::io::Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.persist(path)?;
    Ok(())
}

/// The file that keeps what was found; `None` where there is no place for one.
fn memory(qemu: &Path, kernel: &Path) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let mut hasher = DefaultHasher::new();
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.hash(&mut hasher);
    (qemu.canonicalize().ok()?, kernel.canonicalize().ok()?).hash(&mut hasher);
    Some(cache.join("viommu").join(format!("kvm-probe-{:016x}", hasher.finish())))
}
