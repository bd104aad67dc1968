//! A file system with real files: it is made, filled, changed, read back past every cache, and read back again after a
//! remount.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount, umount};
use serde_json::json;
use viommu_wire::size;

use crate::blockdev;
use crate::buffers::Buffers;
use crate::pattern::{self, Random, SECTOR};
use crate::results::Results;
use crate::workload::{Needs, Workload};

/// Where the file system is mounted.
const ROOT: &str = "/tmp/fs";
/// Small files are spread over this many folders.
const FOLDERS: u64 = 8;
/// A small file is shorter than this, in bytes.
const SMALL: u64 = 64 << 10;
/// Bytes of one direct read or write.
const DIRECT: usize = 256 << 10;

/// A file system with real files on an NVMe namespace.
#[derive(clap::Args)]
pub struct Args {
    /// The namespace: its block device, or its controller's function; the first function's if not given.
    #[arg(long)]
    dev: Option<PathBuf>,
    /// How many small files.
    #[arg(long, default_value_t = 200)]
    files: u64,
    /// The size of each large file.
    #[arg(long, default_value = "16M", value_parser = size::parse)]
    large: u64,
}

/// What must be in the file system: each file's path below [`ROOT`], and its bytes.
type Files = BTreeMap<PathBuf, Vec<u8>>;

impl Workload for Args {
    const NEEDS: Needs =
        Needs { modules: &["ext4"], optional: &["crc32c_generic"], programs: &["mke2fs", "e2fsck"], ..Needs::NOTHING };

    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// What could not be done, or the first file that has other contents than were written; the result has
    /// `"verified":false` then.
    fn run(&self, results: &mut Results) -> Result<()> {
        let device = blockdev::choose(self.dev.as_deref())?;
        let mut files = Files::new();
        let outcome = exercise(self, &device, &mut files);
        let mut result = json!({
            "workload": "fs", "dev": device, "fs": "ext4", "files": files.len(),
            "bytes": files.values().map(Vec::len).sum::<usize>(), "verified": outcome.is_ok(),
        });
        if let Err(error) = &outcome {
            result["error"] = format!("{error:#}").into();
        }
        results.emit("result", result);
        outcome.with_context(|| format!("fs on {}", device.display()))
    }
}

fn exercise(args: &Args, device: &Path, files: &mut Files) -> Result<()> {
    // As on a disk in use: the kernel writes no tables in the background later.
    let options = ["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
    program("mke2fs", &options, device)?;
    let mounted = Mounted::new(device)?;
    create_small(args.files, files)?;
    create_large(args.large, files)?;
    change(files)?;
    nix::unistd::sync();
    drop_caches()?;
    compare(files).context("After the caches were dropped")?;
    mounted.unmount()?;
    let mounted = Mounted::new(device).context("Once more")?;
    compare(files).context("After a remount")?;
    mounted.unmount()?;
    program("e2fsck", &["-f", "-n"], device)
}

/// Makes small files of all lengths, and syncs every fourth at once.
fn create_small(count: u64, files: &mut Files) -> Result<()> {
    let mut random = Random::new(1);
    for folder in 0..FOLDERS {
        let folder = Path::new(ROOT).join(format!("folder{folder}"));
        fs::create_dir(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    }
    for number in 0..count {
        let name = PathBuf::from(format!("folder{}/small{number}", number % FOLDERS));
        let contents = contents(random.below(SMALL) as usize, number);
        let write = || -> Result<()> {
            let mut file = File::create_new(Path::new(ROOT).join(&name))?;
            file.write_all(&contents)?;
            if number % 4 == 0 {
                file.sync_all()?;
            }
            Ok(())
        };
        write().with_context(|| format!("Cannot write {}", name.display()))?;
        files.insert(name, contents);
    }
    Ok(())
}

/// Makes one large file through the page cache, and one past it.
fn create_large(bytes: u64, files: &mut Files) -> Result<()> {
    let bytes = bytes.next_multiple_of(DIRECT as u64) as usize;
    let cached = contents(bytes, 1 << 32);
    fs::write(Path::new(ROOT).join("cached"), &cached).context("Cannot write the file cached")?;
    files.insert("cached".into(), cached);

    let direct = contents(bytes, 2 << 32);
    let file = open_direct("direct", OpenOptions::new().write(true).create_new(true))?;
    let mut buffers = Buffers::new(1, DIRECT, true)?;
    // SAFETY: no I/O is in flight on these buffers outside of the calls below, which have ended when they return.
    let buffer = unsafe { buffers.contents(0) };
    for (part, offset) in direct.chunks_exact(DIRECT).zip((0..).step_by(DIRECT)) {
        buffer.copy_from_slice(part);
        file.write_all_at(buffer, offset).context("Cannot write the file direct")?;
    }
    file.sync_all().context("Cannot flush the file direct")?;
    files.insert("direct".into(), direct);
    Ok(())
}

/// Renames, truncates, extends, overwrites and removes files.
fn change(files: &mut Files) -> Result<()> {
    let names: Vec<PathBuf> = files.keys().filter(|name| name.starts_with("folder0")).cloned().collect();
    for (number, name) in names.iter().enumerate() {
        let path = Path::new(ROOT).join(name);
        change_one(number, name, &path, files).with_context(|| format!("Cannot change {}", name.display()))?;
    }
    // In the middle of a large file, across sectors and pages.
    let patch = contents(3 * SECTOR + 77, 3 << 32);
    let at = 1000 * SECTOR + 321;
    let file = OpenOptions::new().write(true).open(Path::new(ROOT).join("cached"))?;
    if let Some(place) = files.get_mut(Path::new("cached")).and_then(|bytes| bytes.get_mut(at..at + patch.len())) {
        file.write_all_at(&patch, at as u64).context("Cannot overwrite a part of the file cached")?;
        place.copy_from_slice(&patch);
    }
    Ok(())
}

fn change_one(number: usize, name: &Path, path: &Path, files: &mut Files) -> Result<()> {
    let Some(mut contents) = files.remove(name) else { return Ok(()) };
    let resize = |length: usize| OpenOptions::new().write(true).open(path)?.set_len(length as u64);
    let mut name = name.to_owned();
    match number % 5 {
        0 => {
            name = format!("folder1/renamed{number}").into();
            fs::rename(path, Path::new(ROOT).join(&name))?;
        }
        1 => {
            // Onto an existing file.
            name = format!("folder{}/small{}", FOLDERS - 1, FOLDERS - 1).into();
            fs::rename(path, Path::new(ROOT).join(&name))?;
        }
        2 => {
            contents.truncate(contents.len() / 2);
            resize(contents.len())?;
        }
        3 => {
            // The hole reads as zeroes.
            contents.resize(contents.len() + 3 * 4096 + 5, 0);
            resize(contents.len())?;
        }
        _ => {
            fs::remove_file(path)?;
            return Ok(());
        }
    }
    files.insert(name, contents);
    Ok(())
}

/// Checks that the file system has these files, with these contents, and no others.
fn compare(files: &Files) -> Result<()> {
    let mut found = Vec::new();
    list(Path::new(ROOT), &mut found)?;
    found.sort();
    let wanted: Vec<_> = files.keys().map(|name| Path::new(ROOT).join(name)).collect();
    let missing = wanted.iter().find(|path| found.binary_search(path).is_err());
    ensure!(missing.is_none(), "A file is missing: {missing:?}");
    let foreign = found.iter().find(|path| wanted.binary_search(path).is_err());
    ensure!(foreign.is_none(), "A file is there that should not be: {foreign:?}");
    for (name, contents) in files {
        let read = if name == Path::new("direct") {
            read_direct(name)
        } else {
            fs::read(Path::new(ROOT).join(name)).map_err(Into::into)
        };
        let read = read.with_context(|| format!("Cannot read {}", name.display()))?;
        ensure!(read.len() == contents.len(), "{}: {} bytes, not {}", name.display(), read.len(), contents.len());
        let wrong = read.iter().zip(contents).position(|(one, other)| one != other);
        ensure!(wrong.is_none(), "{} is wrong from byte {}", name.display(), wrong.unwrap_or_default());
    }
    Ok(())
}

/// All files below a folder.
fn list(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("Cannot list {}", folder.display()))? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            found.push(entry.path());
        } else if entry.file_name() != "lost+found" {
            list(&entry.path(), found)?;
        }
    }
    Ok(())
}

fn read_direct(name: &Path) -> Result<Vec<u8>> {
    let mut file = open_direct(name, OpenOptions::new().read(true))?;
    let mut buffers = Buffers::new(1, DIRECT, true)?;
    // SAFETY: no I/O is in flight on these buffers outside of the calls below, which have ended when they return.
    let buffer = unsafe { buffers.contents(0) };
    let mut all = Vec::new();
    loop {
        let length = file.read(buffer)?;
        if length == 0 {
            return Ok(all);
        }
        all.extend_from_slice(&buffer[..length]);
    }
}

fn open_direct(name: impl AsRef<Path>, options: &mut OpenOptions) -> Result<File> {
    let file = options.custom_flags(libc::O_DIRECT).open(Path::new(ROOT).join(name));
    file.context("Cannot open a file for direct I/O")
}

/// This many bytes, different for each file.
fn contents(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length.next_multiple_of(SECTOR)];
    pattern::fill(&mut bytes, 0, seed);
    bytes.truncate(length);
    bytes
}

/// Drops clean data of the file system from memory (Documentation/admin-guide/sysctl/vm.rst).
fn drop_caches() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "3").context("Cannot drop the caches")
}

/// Runs a program of e2fsprogs on the device; it must succeed.
fn program(name: &str, options: &[&str], device: &Path) -> Result<()> {
    let mut command = Command::new(name);
    command.args(options).arg(device).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let output = command.output().with_context(|| format!("Cannot start {name}, of the package e2fsprogs"))?;
    ensure!(
        output.status.success(),
        "{name} failed ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// The file system, until it is dropped.
struct Mounted(());

impl Mounted {
    fn new(device: &Path) -> Result<Self> {
        fs::create_dir_all(ROOT).with_context(|| format!("Cannot make {ROOT}"))?;
        mount(Some(device), ROOT, Some("ext4"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("Cannot mount {} on {ROOT}", device.display()))?;
        Ok(Self(()))
    }

    /// Unmounts it; all data is on the disk then.
    fn unmount(self) -> Result<()> {
        std::mem::forget(self);
        umount(ROOT).with_context(|| format!("Cannot unmount {ROOT}"))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Something failed before, and was reported.
        let _ = umount(ROOT);
    }
}
