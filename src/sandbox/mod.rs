//! The sandbox: once everything is open, the process gives up files, programs, privileges, and the system calls that it
//! does not make.
//!
//! Two parts of Linux do this: Landlock takes the file system and the network away, and a seccomp filter refuses all
//! system calls but those of `syscalls.rs`. Each works alone if the other is missing. Whatever is open stays usable.
//! `docs/threat-model.md` says what an attacker who has taken over the process can still do.

mod files;
mod syscalls;

use std::path::PathBuf;

use nix::sys::prctl::set_no_new_privs;

/// What the process may still do in addition to serving what is open.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Folders in which it may remove files. It removes its sockets when it ends.
    pub folders: Vec<PathBuf>,
    /// The folder of a socket to which it may connect.
    pub connects_in: Option<PathBuf>,
    /// The process that it may end, its child.
    pub child: Option<u32>,
}

/// Enters the sandbox, which cannot be left. If the kernel lacks a part, this is logged and the rest is done.
///
/// To be called before there is another thread. Before Linux 7.0, Landlock applies only to the calling thread and to
/// those that it starts from then on.
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
