//! The guest starts another kernel by itself, without firmware: a device is reset only by its old driver at the end, or
//! by its new driver at the beginning.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use serde_json::json;

use crate::blockdev::{self, Device};
use crate::buffers::{Buffers, PAGE};
use crate::init;
use crate::results::Results;
use crate::workload::Workload;

/// Bytes of a read.
const SIZE: usize = 64 << 10;

/// Start another kernel, which runs the workloads after this one.
///
/// Both files are at the start of the first NVMe namespace, the initial RAM file system at the next whole page after the
/// kernel.
#[derive(clap::Args)]
pub struct Args {
    /// Bytes of the kernel, a bzImage.
    #[arg(long)]
    kernel: u64,
    /// Bytes of its initial RAM file system.
    #[arg(long)]
    initramfs: u64,
}

impl Workload for Args {
    /// The workload. Emits `kexec` and does not return; the next kernel runs the workloads that follow on the command
    /// line.
    ///
    /// # Errors
    /// A file that cannot be read, or that the kernel does not take.
    fn run(&self, results: &mut Results) -> Result<()> {
        let device = Device::open(&blockdev::choose(None)?)?;
        let kernel = fetch(&device, 0, self.kernel, "/tmp/vmlinuz")?;
        let initramfs = fetch(&device, self.kernel.next_multiple_of(PAGE as u64), self.initramfs, "/tmp/initramfs")?;
        let line = command_line(&fs::read_to_string("/proc/cmdline")?)?;
        load(&kernel, &initramfs, &line)?;
        results.emit("kexec", json!({ "command_line": line }));
        init::kexec(results)
    }
}

/// Copies bytes of the device into a file, and opens it for reading only: the kernel takes none that can be written.
fn fetch(device: &Device, start: u64, bytes: u64, path: &str) -> Result<File> {
    ensure!(start + bytes <= device.bytes, "{path}: wanted {bytes} bytes from {start}, found {}", device.bytes);
    let mut buffers = Buffers::new(1, SIZE, true)?;
    let mut file = File::create(path).with_context(|| format!("Cannot create {path}"))?;
    for offset in (0..bytes).step_by(SIZE) {
        // SAFETY: this buffer is used by the calls below alone, which have ended when they return.
        let contents = unsafe { buffers.contents(0) };
        let wanted = (bytes - offset).min(SIZE as u64) as usize;
        let contents = &mut contents[..wanted.next_multiple_of(PAGE)];
        device.file.read_exact_at(contents, start + offset).with_context(|| format!("Cannot read {path}"))?;
        file.write_all(&contents[..wanted]).with_context(|| format!("Cannot write {path}"))?;
    }
    drop(file);
    File::open(path).with_context(|| format!("Cannot open {path}"))
}

/// This kernel's command line, without the workloads up to this one.
fn command_line(own: &str) -> Result<String> {
    let (parameters, workloads) = own.trim_end().split_once(" -- ").context("No workload is on the command line")?;
    let words: Vec<&str> = workloads.split([' ', ',']).collect();
    let this = words.iter().position(|word| *word == "kexec").context("kexec is not on the command line")?;
    let rest: Vec<&str> = words[this..].iter().skip_while(|word| **word != "+").skip(1).copied().collect();
    ensure!(!rest.is_empty(), "Wanted: kexec ... + WHAT THE NEXT KERNEL RUNS");
    Ok(format!("{parameters} -- {}", rest.join(",")))
}

/// kexec_file_load(2).
fn load(kernel: &File, initramfs: &File, line: &str) -> Result<()> {
    let line = CString::new(line)?;
    let length = line.as_bytes_with_nul().len();
    // SAFETY: the descriptors are open and the line ends with NUL and has this length; the kernel copies all of it before
    // the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            length,
            line.as_ptr(),
            0_usize,
        )
    };
    Errno::result(result).map(drop).context("The kernel does not take another one (CONFIG_KEXEC_FILE?)")
}

#[cfg(test)]
mod tests {
    use super::command_line;

    #[test]
    fn the_next_kernel_runs_what_is_left() {
        let own =
            "console=ttyS0 iommu.strict=0 -- busy-end,+,kexec,--kernel,1,--initramfs,2,+,nvme-io,--bs,4k,+,report\n";
        assert_eq!(command_line(own).unwrap(), "console=ttyS0 iommu.strict=0 -- nvme-io,--bs,4k,+,report");
        assert!(command_line("console=ttyS0 -- kexec --kernel 1 --initramfs 2").is_err());
    }
}
