//! The files that a run writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Opens a file that the user names, to write it; makes it if need be, and leaves in it what is there. It may be
/// anything that can be written, but nobody is waited for: a FIFO must have its reader.
pub fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => io::Error::other("nobody reads it; start its reader before"),
        _ => error,
    })?;
    // From here on it is waited for, as long as it takes to write.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(file)
}

/// Empties a file. What is no regular file has nothing in it.
pub fn truncate(file: &File) -> io::Result<()> {
    if file.metadata()?.is_file() { file.set_len(0) } else { Ok(()) }
}

/// Makes a new file in the place of what is at `path`, be it a link, and opens it to be read: who is started next opens it
/// to write.
pub fn replace(path: &Path) -> Result<File> {
    remove(path)?;
    let mut options = OpenOptions::new();
    let made = options.read(true).write(true).create_new(true).open(path);
    made.with_context(|| format!("Cannot make {}", path.display()))
}

/// Removes what is at `path`, if there is something.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
