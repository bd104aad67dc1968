//! What several integration tests need.

#![allow(dead_code, reason = "each test uses its part of it")]

pub mod accesses;
pub mod engine;
pub mod frontend;
pub mod function;
pub mod nvme;
pub mod toy;
pub mod trace;
pub mod vfio;

use std::fs::File;
use std::os::fd::FromRawFd;

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
