//! What viommu's tests and benchmarks share, for them alone: a driver with its virtqueues behind a vhost-user frontend,
//! vfio-user clients, drivers of the device models, and whole guests.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(missing_docs, reason = "the names are the specifications'")]
#![allow(clippy::new_without_default, reason = "a test says what it makes")]

pub mod accesses;
pub mod engine;
pub mod frames;
pub mod frontend;
pub mod function;
pub mod guest;
pub mod huge;
pub mod nvme;
pub mod process;
pub mod toy;
pub mod trace;
pub mod twin;
pub mod vfio;
mod wait;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};

pub use wait::{PATIENCE, wait_until};

/// Sets another thread's flag to stop when this is dropped, also by a panic: a scope waits for its other threads before
/// it passes the panic on, so they must end.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Pseudo-random numbers. The seed must not be 0.
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

/// `len` bytes of zeros that can be shared with a device, as a guest's RAM is.
pub fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// A folder in memory, whose files never make anybody wait, and one on the machine's disk. The NVMe controller accesses
/// images in them in different ways.
pub fn folders() -> [PathBuf; 2] {
    let on_disk = binaries().join("tmp");
    std::fs::create_dir_all(&on_disk).unwrap();
    ["/dev/shm".into(), on_disk]
}

/// The folder of the binaries that were built together with this program, which is in it or, if it is a test or
/// benchmark, in `deps/` below it.
pub fn binaries() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().unwrap();
    if folder.ends_with("deps") { folder.parent().unwrap() } else { folder }.into()
}
