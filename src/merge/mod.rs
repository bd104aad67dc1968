//! One trace of the device's events and the guest's, on the host's clock.

mod clock;
mod lines;
mod spans;
mod tie;

use std::io::{self, Read, Seek, Write};

use clock::Clock;
use lines::{GuestLine, HostLine, Lines};
use spans::{GuestEvent, HostSpans, guest_spans};
use tie::Tied;

use viommu_trace::record::VERSION;

/// The version of the guest's lines that is read.
pub const GUEST_VERSION: u32 = 1;

/// Why two traces cannot be made one.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// Another version wrote it.
    #[error("The {whose} trace has format version {found}; this viommu reads version {wanted}")]
    Version {
        /// `device's` or `guest's`.
        whose: &'static str,
        /// The version it has.
        found: u64,
        /// The version wanted.
        wanted: u32,
    },
    /// It does not begin as such a trace does.
    #[error("This is no trace of a guest: its first line is not a hello of source \"guest\"")]
    NoGuestTrace,
    /// The clocks cannot be compared.
    #[error(
        "No event of the guest could be tied to one of the device, so their clocks cannot be compared: both traces must \
         have the same NVMe commands (guest: nvme:nvme_setup_cmd and nvme:nvme_complete_rq) or LINKs with tags (guest: \
         dma_iova), and these must not be so regular that several clocks fit"
    )]
    Untied,
    /// Reading failed.
    #[error("Cannot read a trace that is to be merged")]
    Read(#[source] io::Error),
    /// Writing failed.
    #[error("Cannot write the merged trace")]
    Write(#[from] io::Error),
}

/// What was merged.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Events of the device.
    pub host: usize,
    /// Events of the guest.
    pub guest: usize,
    /// Pairs that tie the clocks.
    pub pairs: usize,
    /// How often the clocks had to be tied anew.
    pub breaks: usize,
    /// The largest error of an event's time, ns; `None` if there is one whose error cannot be said.
    pub error: Option<u64>,
    /// Lines that were left out, as they are no events of such a trace (one that was cut off, for example).
    pub skipped: usize,
    /// Events of the guest that were left out: of a life in which nothing ties the clocks.
    pub untied: usize,
}

/// Whose line it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Host,
    /// Of this life of the guest.
    Guest(u32),
    /// The clock of this life is tied from here on.
    Clock(u32),
}

/// A line of the merged trace.
struct Entry {
    /// The host's, ns.
    time: i64,
    /// Where the line begins in its file; of a clock: when, on the guest's.
    at: u64,
    source: Source,
}

/// What is read of one life of the guest: its clock begins anew with each.
#[derive(Default)]
struct Life {
    /// The time of each line, and where the line begins in the file. In the order of time.
    lines: Vec<(u64, u64)>,
    /// In the order of time.
    events: Vec<GuestEvent>,
}

/// Merges a trace of the device (JSON lines) and one of the guest into one, in the order of time. Both are read twice.
///
/// # Errors
/// If one of them is something else, or nothing ties them.
pub fn merge(host: impl Read + Seek, guest: impl Read + Seek, out: &mut impl Write) -> Result<Report, MergeError> {
    let mut report = Report { error: Some(0), ..Report::default() };
    let mut host = Lines::new(host).map_err(MergeError::Read)?;
    let mut guest = Lines::new(guest).map_err(MergeError::Read)?;
    let mut merged = Vec::new();
    let spans = read_host(&mut host, &mut merged, &mut report, out)?;
    let mut lives = read_lives(&mut guest, &mut report)?;
    let of_guest: Vec<_> = lives.iter_mut().map(|life| guest_spans(std::mem::take(&mut life.events))).collect();
    let tied = tie::tie(&of_guest, &spans);
    drop((of_guest, spans));
    if tied.iter().all(Option::is_none) {
        return Err(MergeError::Untied);
    }
    for ((life, number), tied) in lives.into_iter().zip(0..).zip(&tied) {
        match tied {
            Some(tied) => place(&life, number, tied, &mut merged, &mut report),
            None => report.untied += life.lines.len(),
        }
    }
    merged.sort_by_key(|entry| entry.time);
    for entry in &merged {
        match entry.source {
            Source::Host => writeln!(out, "{}", host.line_at(entry.at).map_err(MergeError::Read)?)?,
            Source::Guest(life) => {
                let Some(tied) = &tied[life as usize] else { continue };
                write_guest(&guest.line_at(entry.at).map_err(MergeError::Read)?, tied, out)?;
            }
            Source::Clock(life) => {
                let Some(tied) = &tied[life as usize] else { continue };
                write_clock(entry, tied, out)?;
            }
        }
    }
    out.flush()?;
    Ok(report)
}

/// Reads the device's trace. Its hello is written at once.
fn read_host(
    host: &mut Lines<impl Read + Seek>,
    merged: &mut Vec<Entry>,
    report: &mut Report,
    out: &mut impl Write,
) -> Result<HostSpans, MergeError> {
    let mut spans = HostSpans::new();
    while let Some((at, line)) = host.next_line().map_err(MergeError::Read)? {
        match serde_json::from_str::<HostLine>(&line) {
            Ok(event) => {
                spans.add(&event);
                merged.push(Entry { time: nanoseconds(event.t.into()), at, source: Source::Host });
                report.host += 1;
            }
            Err(_) if is_hello(&line)? => writeln!(out, "{line}")?,
            Err(_) => report.skipped += 1,
        }
    }
    spans.sort();
    Ok(spans)
}

/// Reads the guest's trace.
fn read_lives(guest: &mut Lines<impl Read + Seek>, report: &mut Report) -> Result<Vec<Life>, MergeError> {
    let mut lives: Vec<Life> = Vec::new();
    while let Some((at, line)) = guest.next_line().map_err(MergeError::Read)? {
        // The time stands first, so that it can be exchanged.
        let event = serde_json::from_str::<GuestLine>(&line).ok().filter(|_| time(&line).is_some());
        let Some(event) = event else {
            report.skipped += 1;
            continue;
        };
        if event.kind == "hello" {
            let found = event.version.unwrap_or(0);
            if found != GUEST_VERSION {
                return Err(MergeError::Version { whose: "guest's", found: found.into(), wanted: GUEST_VERSION });
            }
            lives.push(Life::default());
        }
        let life = lives.last_mut().ok_or(MergeError::NoGuestTrace)?;
        life.lines.push((event.t, at));
        life.events.extend(GuestEvent::new(&event));
    }
    if lives.is_empty() {
        return Err(MergeError::NoGuestTrace);
    }
    for life in &mut lives {
        life.lines.sort_unstable();
        life.events.sort_by_key(|event| event.at);
    }
    Ok(lives)
}

/// The time that a line of the guest begins with, and what follows its comma.
fn time(line: &str) -> Option<(u64, &str)> {
    let (time, rest) = line.strip_prefix("{\"t\":")?.split_once(',')?;
    Some((time.trim().parse().ok()?, rest))
}

/// Puts the lines of a life where they belong on the host's clock.
fn place(life: &Life, number: u32, Tied { pairs, clock }: &Tied, merged: &mut Vec<Entry>, report: &mut Report) {
    report.pairs += pairs;
    report.breaks += clock.breaks().count();
    report.guest += life.lines.len();
    let starts = life.lines.first().map(|(t, _)| *t).into_iter().chain(clock.breaks());
    let source = Source::Clock(number);
    merged.extend(starts.map(|at| Entry { time: nanoseconds(host_time(at, clock)), at, source }));
    for &(t, at) in &life.lines {
        let error = clock.offset(t).error;
        report.error = report.error.zip(error).map(|(one, other)| one.max(other));
        merged.push(Entry { time: nanoseconds(host_time(t, clock)), at, source: Source::Guest(number) });
    }
}

fn host_time(at: u64, clock: &Clock) -> i128 {
    i128::from(at) + i128::from(clock.offset(at).value)
}

/// As what lines are sorted by; clocks do not come as far as where this is wrong.
fn nanoseconds(time: i128) -> i64 {
    i64::try_from(time).unwrap_or(if time < 0 { i64::MIN } else { i64::MAX })
}

fn write_guest(line: &str, Tied { clock, .. }: &Tied, out: &mut impl Write) -> io::Result<()> {
    let Some((at, rest)) = time(line) else { return Ok(()) };
    let (time, error) = (host_time(at, clock), error(clock.offset(at).error));
    writeln!(out, "{{\"t\":{time},\"t_error\":{error},\"guest_t\":{at},{rest}")
}

fn write_clock(&Entry { at, .. }: &Entry, Tied { pairs, clock }: &Tied, out: &mut impl Write) -> io::Result<()> {
    let offset = clock.offset(at);
    let (time, error) = (host_time(at, clock), error(offset.error));
    writeln!(
        out,
        "{{\"t\":{time},\"t_error\":{error},\"guest_t\":{at},\"kind\":\"clock\",\"offset_ns\":{},\"pairs\":{pairs}}}",
        offset.value,
    )
}

fn error(error: Option<u64>) -> String {
    error.map_or_else(|| "null".into(), |error| error.to_string())
}

/// Whether a line of the device's trace is its hello, which must be of the right version.
fn is_hello(line: &str) -> Result<bool, MergeError> {
    let value: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    match value["version"].as_u64() {
        Some(found) if !(1..=u64::from(VERSION)).contains(&found) => {
            Err(MergeError::Version { whose: "device's", found, wanted: VERSION })
        }
        _ => Ok(value["kind"] == "hello"),
    }
}
