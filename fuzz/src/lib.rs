//! What the fuzz targets share: an input as a source of numbers, and a machine for a device model.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

mod input;
mod machine;

pub use input::Input;
pub use machine::{Machine, PAGE, PAGES};

/// No message takes a server so long.
pub const HANG: Duration = Duration::from_secs(60);

/// Leaves a server, and waits until it has done everything and ends the connection.
pub fn leave(mut stream: UnixStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let begun = Instant::now();
    let mut replies = [0; 4096];
    loop {
        match stream.read(&mut replies) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            // The server may have got this very stream as a descriptor, for example as a kick, and has made it
            // non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < HANG => {
                stream.set_nonblocking(false).unwrap();
            }
            // The fuzzer checks the time in a signal handler.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("The server does not end the connection: {error}"),
        }
    }
}

/// Memory that can be shared with a device, `bytes` of zeros.
pub fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}
