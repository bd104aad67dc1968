//! QEMU's machine protocol.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::LIMIT;
use crate::wait_until;

/// A connection to a QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a socket that will soon be there.
    pub fn connect(path: &Path) -> Qmp {
        let mut stream = None;
        wait_until(LIMIT, "a QMP connection", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        qmp.message();
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Executes a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let message = self.message();
            assert!(message.get("error").is_none(), "{command}: {message}");
            if let Some(value) = message.get("return") {
                return value.clone();
            }
        }
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}
