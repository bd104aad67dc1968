//! What the first process of a guest has to do: mount, load drivers, power off.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::agent;
use crate::results::Results;

/// Where `mkinitramfs` put the modules: `NAME.ko` and `dependencies`, a line `NAME: WHAT IT NEEDS` for each.
const MODULES: &str = "/modules";

/// Mounts the kernel's file systems.
///
/// # Errors
/// Which one could not be mounted. The debugging file systems may be absent.
pub fn mount_file_systems() -> Result<()> {
    for (kind, target, needed) in [
        ("proc", "/proc", true),
        ("sysfs", "/sys", true),
        ("devtmpfs", "/dev", true),
        ("tmpfs", "/tmp", true),
        ("debugfs", "/sys/kernel/debug", false),
        ("tracefs", "/sys/kernel/tracing", false),
    ] {
        match mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>) {
            // EBUSY: the kernel mounted it itself (CONFIG_DEVTMPFS_MOUNT).
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(error) if needed => return Err(error).with_context(|| format!("Cannot mount {kind} on {target}")),
            Err(error) => eprintln!("viommu-guest: No {kind} on {target}: {error}"),
        }
    }
    Ok(())
}

/// The words after ` -- ` on the kernel's command line. (The kernel also hands them to its init as arguments, but mixed
/// with those of its own parameters that it does not know, such as `nokaslr`.) A comma separates words too, since the
/// kernel panics on more than 32 of them.
pub fn arguments() -> Vec<String> {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let words = line.split_whitespace().skip_while(|word| *word != "--").skip(1);
    words.flat_map(|word| word.split(',')).map(ToOwned::to_owned).collect()
}

/// Loads modules in this order, each after the modules it needs. A module that is not in the initramfs is built into
/// the kernel (`mkinitramfs` makes sure of that).
///
/// # Errors
/// The module that the kernel refused, and why.
pub fn load_modules(names: &[&str]) -> Result<()> {
    let Ok(text) = fs::read_to_string(Path::new(MODULES).join("dependencies")) else { return Ok(()) };
    let needs: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once(':')).collect();
    names.iter().try_for_each(|name| load_module(name, &needs))
}

fn load_module(name: &str, needs: &HashMap<&str, &str>) -> Result<()> {
    let Some(list) = needs.get(name) else { return Ok(()) };
    for need in list.split_whitespace() {
        load_module(need, needs)?;
    }
    let file = File::open(Path::new(MODULES).join(format!("{name}.ko")))
        .with_context(|| format!("The initramfs lists the module {name} but does not hold it"))?;
    let parameters = parameters(name, &fs::read_to_string("/proc/cmdline").unwrap_or_default());
    match finit_module(&file, &parameters, ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("The kernel does not take the module {name}")),
    }
}

/// A module's parameters on the kernel's command line, as modprobe finds them: `MODULE.PARAMETER=VALUE` before a `--`.
fn parameters(module: &str, command_line: &str) -> CString {
    let words = command_line.split_whitespace().take_while(|word| *word != "--");
    let of_module = words.filter_map(|word| {
        let (name, parameter) = word.split_once('.')?;
        (name.replace('-', "_") == module.replace('-', "_")).then_some(parameter)
    });
    CString::new(of_module.collect::<Vec<_>>().join(" ")).unwrap_or_default()
}

/// Time for Linux to flush lazy unmaps, which it does after 10 ms. At shutdown 6.12.117 resets virtio devices (6.12.107
/// does not yet), and then its virtio-iommu driver waits for ever for the answer to an UNMAP that it sends later.
const FLUSH: Duration = Duration::from_millis(50);

/// Ends the guest. Never returns.
pub fn power_off(results: &mut Results) -> ! {
    end(results, RebootMode::RB_POWER_OFF)
}

/// Restarts the guest. Never returns.
pub fn restart(results: &mut Results) -> ! {
    leave(results, RebootMode::RB_AUTOBOOT)
}

/// Starts the kernel that was loaded. Never returns.
pub fn kexec(results: &mut Results) -> ! {
    leave(results, RebootMode::RB_KEXEC)
}

/// Ends this boot of a guest that boots again.
fn leave(results: &mut Results, mode: RebootMode) -> ! {
    if let Err(error) = agent::stop(results) {
        eprintln!("viommu-guest: {error:#}");
    }
    end(results, mode)
}

fn end(results: &mut Results, mode: RebootMode) -> ! {
    results.drain();
    nix::unistd::sync();
    std::thread::sleep(FLUSH);
    let Err(error) = reboot(mode);
    eprintln!("viommu-guest: Cannot end the guest: {error}");
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_gets_its_parameters_of_the_command_line() {
        let line =
            "console=ttyS0 nvme.sgl_threshold=0 virtio-iommu.a=b nvme.io_queue_depth=8 nvme_core.x=1 -- nvme.no=1";
        assert_eq!(parameters("nvme", line).as_c_str(), c"sgl_threshold=0 io_queue_depth=8");
        assert_eq!(parameters("virtio_iommu", line).as_c_str(), c"a=b");
        assert_eq!(parameters("ioatdma", line).as_c_str(), c"");
    }
}
