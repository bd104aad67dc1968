//! What several integration tests need.

#![allow(dead_code, reason = "each test uses its part of it")]

pub mod accesses;
pub mod engine;
pub mod frontend;
pub mod function;
pub mod huge;
pub mod nvme;
pub mod toy;
pub mod trace;
pub mod twin;
pub mod vfio;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sets what another thread looks at to end, when it is dropped: also if the thread that has it panics, since a scope waits
/// for the other one before it lets the panic be told.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Numbers that look like random ones; the first of them must not be 0.
pub struct Numbers(pub u64);

impl Numbers {
    /// The next one, less than `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Memory that can be shared with a device, as a guest's RAM is; `len` bytes of zeros.
pub fn memfd(len: u64) -> File {
    // SAFETY: the name is a NUL-terminated string, and the call returns a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert_ne!(fd, -1, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, so nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file
}
