//! Where results go: one JSON object a line, each with the member `event`.
//!
//! In the project's guests that is the second serial port (`/dev/ttyS1`), so that results do not mix with the kernel's
//! messages. Without such a port lines go to the console, marked with [`CONSOLE_PREFIX`].

use std::fs::{File, OpenOptions};
use std::io::Write;

use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use serde_json::Value;

/// Marks a result among the console's other lines.
const CONSOLE_PREFIX: &str = "viommu-result: ";

/// The results' destination.
pub struct Results {
    /// `None`: standard output.
    port: Option<File>,
    prefix: &'static str,
}

impl Results {
    /// Results on standard output, for a run as an ordinary process.
    pub fn standard_output() -> Self {
        Self { port: None, prefix: "" }
    }

    /// Results on the second serial port if the machine has one, else on the console.
    pub fn guest_port() -> Self {
        match open_serial_port() {
            Some(port) => Self { port: Some(port), prefix: "" },
            None => Self { port: None, prefix: CONSOLE_PREFIX },
        }
    }

    /// Writes one line: `members` (an object) with `event` added. If the port fails, that is reported on the console,
    /// and the port is not used again.
    pub fn emit(&mut self, event: &str, mut members: Value) {
        members["event"] = event.into();
        let line = format!("{}{members}\n", self.prefix);
        if let Some(port) = &mut self.port {
            match port.write_all(line.as_bytes()) {
                Ok(()) => return,
                Err(error) => {
                    eprintln!("viommu-guest: The results' port failed: {error}");
                    *self = Self { port: None, prefix: CONSOLE_PREFIX };
                }
            }
        }
        print!("{line}");
    }

    /// Waits until everything written has left the port.
    pub fn drain(&mut self) {
        if let Some(port) = &self.port {
            // If the port cannot drain, there is nothing to wait for.
            let _ = tcdrain(port);
        }
    }
}

/// Opens `/dev/ttyS1` as a raw byte stream. The node exists on every PC; whether a port is behind it is in sysfs.
fn open_serial_port() -> Option<File> {
    let kind = std::fs::read_to_string("/sys/class/tty/ttyS1/type").ok()?;
    if kind.trim() == "0" {
        return None;
    }
    let port = OpenOptions::new().read(true).write(true).open("/dev/ttyS1").ok()?;
    let mut settings = tcgetattr(&port).ok()?;
    cfmakeraw(&mut settings);
    tcsetattr(&port, SetArg::TCSANOW, &settings).ok()?;
    Some(port)
}
