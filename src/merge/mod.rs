//! One trace of the device's events and the guest's, on the host's clock.

mod clock;
mod pairs;

use std::io::{self, Write};

use pairs::{GuestLine, HostLine, HostSpans, Tied};

use crate::wire::trace::VERSION;

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
         dma_iova)"
    )]
    Untied,
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

/// A line of the merged trace: its time, and where it comes from.
enum Source<'a> {
    Host(&'a str),
    Guest {
        line: &'a str,
        life: usize,
        at: u64,
    },
    /// The clocks are tied from here on.
    Clock {
        life: usize,
        at: u64,
    },
}

/// Merges a trace of the device (JSON lines) and one of the guest into one, in the order of time.
///
/// # Errors
/// If one of them is something else, or nothing ties them.
pub fn merge(host: &str, guest: &str, out: &mut impl Write) -> Result<Report, MergeError> {
    let mut report = Report { error: Some(0), ..Report::default() };
    let mut merged: Vec<(i128, Source)> = Vec::new();
    let mut spans = HostSpans::default();
    for line in host.lines() {
        match serde_json::from_str::<HostLine>(line) {
            Ok(event) => {
                spans.add(&event);
                merged.push((event.t.into(), Source::Host(line)));
                report.host += 1;
            }
            Err(_) if is_hello(line)? => writeln!(out, "{line}")?,
            Err(_) => report.skipped += 1,
        }
    }
    let lives = lives(guest, &mut report)?;
    let (lines, events): (Vec<Vec<&str>>, Vec<Vec<GuestLine>>) =
        lives.into_iter().map(|life| life.into_iter().unzip()).unzip();
    let tied = pairs::tie(&events, &spans);
    if tied.iter().all(Option::is_none) {
        return Err(MergeError::Untied);
    }
    for (life, tied) in tied.iter().enumerate() {
        let Some(Tied { pairs, clock }) = tied else {
            report.untied += lines[life].len();
            continue;
        };
        report.pairs += pairs;
        report.breaks += clock.breaks().count();
        report.guest += lines[life].len();
        let host_time = |at: u64| i128::from(at) + i128::from(clock.offset(at).value);
        let starts = events[life].first().map(|event| event.t).into_iter().chain(clock.breaks());
        merged.extend(starts.map(|at| (host_time(at), Source::Clock { life, at })));
        for (&line, event) in lines[life].iter().zip(&events[life]) {
            let error = clock.offset(event.t).error;
            report.error = report.error.zip(error).map(|(one, other)| one.max(other));
            merged.push((host_time(event.t), Source::Guest { line, life, at: event.t }));
        }
    }
    merged.sort_by_key(|(time, _)| *time);
    for (time, source) in &merged {
        write(*time, source, &tied, out)?;
    }
    out.flush()?;
    Ok(report)
}

fn write(time: i128, source: &Source, tied: &[Option<Tied>], out: &mut impl Write) -> io::Result<()> {
    match *source {
        Source::Host(line) => writeln!(out, "{line}"),
        Source::Guest { line, life, at } => {
            let Some(Tied { clock, .. }) = &tied[life] else { return Ok(()) };
            // After the line's own time come its other members.
            let rest = line.split_once(',').map_or("", |(_, rest)| rest);
            writeln!(out, "{{\"t\":{time},\"t_error\":{},\"guest_t\":{at},{rest}", error(clock.offset(at).error))
        }
        Source::Clock { life, at } => {
            let Some(Tied { pairs, clock }) = &tied[life] else { return Ok(()) };
            let offset = clock.offset(at);
            writeln!(
                out,
                "{{\"t\":{time},\"t_error\":{},\"guest_t\":{at},\"kind\":\"clock\",\"offset_ns\":{},\"pairs\":{pairs}}}",
                error(offset.error),
                offset.value,
            )
        }
    }
}

fn error(error: Option<u64>) -> String {
    error.map_or_else(|| "null".into(), |error| error.to_string())
}

/// Whether a line of the device's trace is its hello, which must be of the right version.
fn is_hello(line: &str) -> Result<bool, MergeError> {
    let value: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    match value["version"].as_u64() {
        Some(found) if found != u64::from(VERSION) => {
            Err(MergeError::Version { whose: "device's", found, wanted: VERSION })
        }
        _ => Ok(value["kind"] == "hello"),
    }
}

/// The guest's lines with what matters of them, one list for each time that the guest was started, each in the order of
/// time: a guest's clock begins anew with it.
fn lives<'a>(guest: &'a str, report: &mut Report) -> Result<Vec<Vec<(&'a str, GuestLine<'a>)>>, MergeError> {
    let mut lives: Vec<Vec<_>> = Vec::new();
    for line in guest.lines() {
        // The time stands first, so that it can be exchanged.
        let event = serde_json::from_str::<GuestLine>(line).ok().filter(|_| line.starts_with("{\"t\":"));
        let Some(event) = event else {
            report.skipped += 1;
            continue;
        };
        if event.kind == "hello" {
            let found = event.version.unwrap_or(0);
            if found != GUEST_VERSION {
                return Err(MergeError::Version { whose: "guest's", found: found.into(), wanted: GUEST_VERSION });
            }
            lives.push(Vec::new());
        }
        lives.last_mut().ok_or(MergeError::NoGuestTrace)?.push((line, event));
    }
    if lives.is_empty() {
        return Err(MergeError::NoGuestTrace);
    }
    lives.iter_mut().for_each(|life| life.sort_by_key(|(_, event)| event.t));
    Ok(lives)
}
