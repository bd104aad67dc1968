//! The file with the VIOT, from which QEMU takes the table.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::topology::{Topology, viot};
use viommu_socket::CreatedFile;

/// A daemon's file with the VIOT. It goes with the daemon, unless it is another's by then.
pub struct Table {
    _entry: CreatedFile,
    /// Locked, which tells others that its daemon lives.
    _file: Flock<File>,
}

impl Table {
    /// Puts a topology's table at `path`, in the place of what is there: whole at once, and without following a link or
    /// waiting for anybody.
    pub fn publish(path: &Path, topology: &Topology) -> Result<Table> {
        let table = viot::table(topology);
        if is_of_another_daemon(path, &table) {
            log::warn!(
                "{} was the table of another viommu, which still serves another topology: a QEMU that it has yet to get \
                 would find the wrong one. Give each its own folder",
                path.display()
            );
        }
        publish(path, &table).with_context(|| format!("Cannot write {}", path.display()))
    }
}

fn publish(path: &Path, table: &[u8]) -> io::Result<Table> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The umask takes from it, as from any file.
    let mode = Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().prefix(".viot-").permissions(mode).tempfile_in(folder)?;
    file.write_all(table)?;
    let open = file.as_file().try_clone()?;
    let lock = Flock::lock(open, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
    file.persist(path)?;
    Ok(Table { _entry: CreatedFile::new(path.to_owned())?, _file: lock })
}

/// Whether a living daemon has another table at `path`.
fn is_of_another_daemon(path: &Path, table: &[u8]) -> bool {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(path) else { return false };
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return false;
    }
    let mut found = Vec::new();
    // One byte more than is expected shows that it is another.
    let same = (&file).take(table.len() as u64 + 1).read_to_end(&mut found).is_ok() && found == table;
    !same && Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
}
