//! What the process gives up once it has everything open: files, programs, privileges, and system calls that it does not
//! make.
//!
//! Two parts of Linux do it, and each stands by itself where the other is missing: Landlock takes the file system and the
//! network away, a seccomp filter refuses all system calls but those of [`syscalls`]. Whatever is open stays usable.
//! `docs/threat-model.md` says what is left to somebody who takes the process over.

mod files;
mod syscalls;

use std::path::PathBuf;

use nix::sys::prctl::set_no_new_privs;

/// What the process may still do besides serving what is open.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Folders in which it removes files: its sockets, when it ends.
    pub folders: Vec<PathBuf>,
    /// The folder of a socket to which it connects.
    pub connects_in: Option<PathBuf>,
    /// The process that it ends: its child.
    pub child: Option<u32>,
}

/// Enters the sandbox, for good. What the kernel cannot do is said in the log, and the rest is done.
///
/// To be called before there is another thread: Linux before 7.0 has Landlock for the calling thread only, and for those
/// that it starts from then on.
pub fn enter(policy: &Policy) {
    if let Err(error) = set_no_new_privs() {
        log::warn!("The sandbox is incomplete, as the kernel refuses no_new_privs: {error}");
    }
    if let Err(error) = files::restrict(policy) {
        log::warn!("The sandbox is incomplete: the file system is not closed: {error}");
    }
    if let Err(error) = syscalls::restrict(policy) {
        log::warn!("The sandbox is incomplete: system calls are not filtered: {error}");
    }
}

#[cfg(test)]
mod tests;
