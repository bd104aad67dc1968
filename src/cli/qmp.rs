//! QEMU's machine protocol, as far as the reset rules need it: STOP, RESUME and RESET events.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::stop::Stop;

/// What happened to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// It was paused.
    Stop,
    /// It goes on.
    Resume,
    /// It was reset.
    Reset,
}

/// How often a socket that does not listen yet is tried.
const RETRY: Duration = Duration::from_millis(100);

/// Connects to the QMP socket at `path`, again whenever it is lost, and tells of events until `stop`.
pub fn watch(path: PathBuf, stop: Stop, tell: impl Fn(MachineEvent) + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name("qmp".into()).spawn(move || {
        while !stop.wait(RETRY) {
            if let Ok(stream) = UnixStream::connect(&path)
                && let Err(error) = follow(stream, &tell)
            {
                log::debug!("The QMP connection ended: {error}");
            }
        }
    })?;
    Ok(())
}

fn follow(mut stream: UnixStream, tell: &impl Fn(MachineEvent)) -> std::io::Result<()> {
    let lines = BufReader::new(stream.try_clone()?).lines();
    for line in lines {
        let Ok(message) = serde_json::from_str::<Value>(&line?) else { continue };
        if message.get("QMP").is_some() {
            stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
        }
        match message.get("event").and_then(Value::as_str) {
            Some("STOP") => tell(MachineEvent::Stop),
            Some("RESUME") => tell(MachineEvent::Resume),
            Some("RESET") => tell(MachineEvent::Reset),
            _ => {}
        }
    }
    Ok(())
}
