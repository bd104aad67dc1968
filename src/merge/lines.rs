//! The lines of both traces: read one after the other first, and then again in another order.
//!
//! A trace may be much larger than memory is, so what is kept of a line is where it is in its file.

use std::borrow::Cow;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

use serde::Deserialize;

/// The members of the host's lines that matter here.
#[derive(Deserialize)]
pub struct HostLine<'a> {
    pub t: u64,
    pub kind: &'a str,
    #[serde(default)]
    pub duration_ns: u64,
    #[serde(rename = "type")]
    pub request: Option<&'a str>,
    pub tag: Option<&'a str>,
    pub virt_start: Option<&'a str>,
    pub virt_end: Option<&'a str>,
    pub iova: Option<&'a str>,
    pub endpoint: Option<u32>,
    pub model: Option<&'a str>,
    pub opcode: Option<&'a str>,
    pub queue: Option<u16>,
    #[serde(rename = "id", alias = "cid")]
    pub cid: Option<u16>,
    pub slba: Option<u64>,
}

/// The members of the guest's lines that matter here.
#[derive(Deserialize)]
pub struct GuestLine<'a> {
    pub t: u64,
    pub kind: &'a str,
    pub event: Option<&'a str>,
    pub cpu: Option<u32>,
    pub tag: Option<&'a str>,
    pub iova: Option<&'a str>,
    pub size: Option<u64>,
    pub ret: Option<i64>,
    pub endpoint: Option<u32>,
    pub qid: Option<u16>,
    pub cid: Option<u16>,
    pub opcode: Option<u8>,
    pub slba: Option<u64>,
    /// Of a `hello`.
    pub version: Option<u32>,
}

/// `"0x104b2000"`
pub fn number(text: Option<&str>) -> Option<u64> {
    u64::from_str_radix(text?.strip_prefix("0x")?, 16).ok()
}

/// A tag that somebody chose.
pub fn tag(text: Option<&str>) -> Option<u64> {
    number(text).filter(|tag| *tag != 0)
}

/// The lines of a file.
pub struct Lines<R> {
    input: BufReader<R>,
    /// Where the next line begins.
    at: u64,
    line: Vec<u8>,
}

impl<R: Read + Seek> Lines<R> {
    /// From the beginning.
    pub fn new(mut input: R) -> io::Result<Self> {
        input.rewind()?;
        Ok(Lines { input: BufReader::new(input), at: 0, line: Vec::new() })
    }

    /// The next line and where it begins; `None` at the end.
    pub fn next_line(&mut self) -> io::Result<Option<(u64, Cow<'_, str>)>> {
        let at = self.at;
        self.line.clear();
        let len = self.input.read_until(b'\n', &mut self.line)?;
        self.at += len as u64;
        // What a guest wrote need not be UTF-8.
        Ok((len > 0).then(|| (at, String::from_utf8_lossy(without_end(&self.line)))))
    }

    /// The line that begins at `at`, as [`Lines::next_line`] said.
    pub fn line_at(&mut self, at: u64) -> io::Result<Cow<'_, str>> {
        // Lines are nearly in the order of time, so most of them are in the buffer.
        match i64::try_from(i128::from(at) - i128::from(self.at)) {
            Ok(distance) => self.input.seek_relative(distance)?,
            Err(_) => drop(self.input.seek(SeekFrom::Start(at))?),
        }
        self.at = at;
        match self.next_line()? {
            Some((_, line)) => Ok(line),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a trace became shorter while it was read")),
        }
    }
}

fn without_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_again_in_any_order() {
        let text: String = (0..3_000).map(|n| format!("{n} {}\n", "x".repeat(n % 100))).collect::<String>() + "the end";
        let mut lines = Lines::new(io::Cursor::new(&text)).unwrap();
        let mut found = Vec::new();
        while let Some((at, line)) = lines.next_line().unwrap() {
            found.push((at, line.into_owned()));
        }
        assert!(found.iter().map(|(_, line)| line.as_str()).eq(text.lines()));
        for n in 0..found.len() {
            let (at, line) = &found[n * 1_009 % found.len()];
            assert_eq!(lines.line_at(*at).unwrap(), *line);
        }
        assert!(lines.line_at(text.len() as u64).is_err());
    }

    #[test]
    fn a_line_need_not_be_utf_8() {
        let mut lines = Lines::new(io::Cursor::new(b"a\xffb\r\nc")).unwrap();
        assert_eq!(lines.next_line().unwrap().unwrap(), (0, "a\u{fffd}b".into()));
        assert_eq!(lines.next_line().unwrap().unwrap(), (5, "c".into()));
        assert!(lines.next_line().unwrap().is_none());
    }
}
