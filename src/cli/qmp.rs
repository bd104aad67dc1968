//! QEMU's machine protocol, as far as the reset rules need it: STOP, RESUME and RESET events, and what the status was
//! when the connection was made, since events may have come before.

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

/// Bytes of a line that are looked at. The greeting and the events have some hundred, and nothing else is asked for.
const LINE_MAX: usize = 64 << 10;

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
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = Vec::new();
    while next_line(&mut reader, &mut line)? {
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { continue };
        if message.get("QMP").is_some() {
            stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\"}\n")?;
        }
        if let Some(event) = event(&message).or_else(|| status(&message)) {
            tell(event);
        }
    }
    Ok(())
}

fn event(message: &Value) -> Option<MachineEvent> {
    match message.get("event")?.as_str()? {
        "STOP" => Some(MachineEvent::Stop),
        "RESUME" => Some(MachineEvent::Resume),
        "RESET" => Some(MachineEvent::Reset),
        _ => None,
    }
}

/// What the answer to query-status says. A machine that has not run yet is not paused, as no RESUME was missed; nor is one
/// whose guest sleeps, as none will come when it wakes.
fn status(message: &Value) -> Option<MachineEvent> {
    match message.get("return")?.get("status")?.as_str()? {
        "running" | "suspended" => Some(MachineEvent::Resume),
        "preconfig" | "prelaunch" | "inmigrate" => None,
        _ => Some(MachineEvent::Stop),
    }
}

/// Reads a line, and keeps no more of it than [`LINE_MAX`] bytes; `false` at the end.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    line.clear();
    loop {
        let bytes = reader.fill_buf()?;
        if bytes.is_empty() {
            return Ok(!line.is_empty());
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let part = &bytes[..end.unwrap_or(bytes.len())];
        line.extend(&part[..part.len().min(LINE_MAX - line.len())]);
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_resume_that_was_missed_is_told_when_the_connection_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let stop = Stop::default();
        let (sender, events) = mpsc::channel();
        watch(path, stop.clone(), move |event| sender.send(event).unwrap()).unwrap();
        let connection = |messages: &[&str]| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut commands = BufReader::new(stream.try_clone().unwrap()).lines();
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            assert!(commands.next().unwrap().unwrap().contains("qmp_capabilities"));
            stream.write_all(b"{\"return\": {}}\n").unwrap();
            assert!(commands.next().unwrap().unwrap().contains("query-status"));
            messages.iter().for_each(|message| writeln!(stream, "{message}").unwrap());
        };
        let running = r#"{"return": {"status": "running", "running": true}}"#;
        let paused = r#"{"return": {"status": "paused", "running": false}}"#;
        connection(&[r#"{"return": {"status": "prelaunch", "running": false}}"#, r#"{"event": "STOP"}"#]);
        assert_eq!(events.recv(), Ok(MachineEvent::Stop));
        connection(&[running]);
        assert_eq!(events.recv(), Ok(MachineEvent::Resume));
        connection(&[paused, r#"{"event": "RESET"}"#]);
        assert_eq!(events.recv(), Ok(MachineEvent::Stop));
        assert_eq!(events.recv(), Ok(MachineEvent::Reset));
        stop.set();
    }

    #[test]
    fn a_line_without_an_end_is_kept_in_part_and_those_behind_it_are_read() {
        let long = "a".repeat(LINE_MAX + 7);
        let text = format!("{{}}\n{long}\n\n{long}{long}\nlast");
        // Smaller than a line, and larger.
        for size in [100, 1 << 20] {
            let mut reader = BufReader::with_capacity(size, text.as_bytes());
            let mut line = Vec::new();
            let mut lengths = Vec::new();
            while next_line(&mut reader, &mut line).unwrap() {
                lengths.push(line.len());
                assert!(line.capacity() <= 2 * LINE_MAX);
            }
            assert_eq!(lengths, [2, LINE_MAX, 0, LINE_MAX, 4]);
        }
    }
}
