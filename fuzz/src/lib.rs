//! What the fuzz targets have in common: an input as a supply of numbers, and a machine for a device model.

use std::fs::File;
use std::os::fd::FromRawFd;

mod input;
mod machine;

pub use input::Input;
pub use machine::{Machine, PAGE, PAGES};

/// Memory that can be shared with a device, `bytes` of zeros.
pub fn memfd(bytes: u64) -> File {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: it is new, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).unwrap();
    file
}
