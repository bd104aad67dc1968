//! One trace of the device's events and the guest's, on the host's clock.

mod clock;
mod spans;
mod tie;

use std::io::{self, Read, Seek, Write};

use clock::Clock;
use spans::{GuestStep, HostSpans, guest_spans};
use tie::Tied;
use viommu_trace::{ClockLine, GuestTime, Item, ReadError, TraceFile, split_time};

/// Why two traces cannot be made one.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
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
    /// Reading failed, or another version wrote it.
    #[error("Cannot read the {whose} trace")]
    Read {
        /// `device's` or `guest's`.
        whose: &'static str,
        /// Why.
        source: ReadError,
    },
    /// Writing failed.
    #[error("Cannot write the merged trace")]
    Write(#[from] io::Error),
}

fn of_device(source: impl Into<ReadError>) -> MergeError {
    MergeError::Read { whose: "device's", source: source.into() }
}

fn of_guest(source: impl Into<ReadError>) -> MergeError {
    MergeError::Read { whose: "guest's", source: source.into() }
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
    steps: Vec<GuestStep>,
}

/// Merges a trace of the device and one of the guest into one of JSON lines, in the order of time. Both are read twice.
///
/// # Errors
/// If one of them is something else, or nothing ties them.
pub fn merge(
    host: &mut TraceFile<impl Read + Seek>,
    guest: &mut TraceFile<impl Read + Seek>,
    out: &mut impl Write,
) -> Result<Report, MergeError> {
    let mut report = Report { error: Some(0), ..Report::default() };
    let mut merged = Vec::new();
    let spans = read_host(host, &mut merged, &mut report, out)?;
    let mut lives = read_lives(guest, &mut report)?;
    let steps: Vec<_> = lives.iter_mut().map(|life| guest_spans(std::mem::take(&mut life.steps))).collect();
    let tied = tie::tie(&steps, &spans);
    drop((steps, spans));
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
    let (mut line, mut said) = (Vec::new(), Vec::new());
    for entry in &merged {
        line.clear();
        match entry.source {
            Source::Host => host.append_line(entry.at, &mut line).map_err(of_device)?,
            Source::Guest(life) => {
                let Some(Tied { clock, .. }) = &tied[life as usize] else { continue };
                said.clear();
                guest.append_line(entry.at, &mut said).map_err(of_guest)?;
                let Some((at, rest)) = split_time(&said) else { continue };
                guest_time(at, clock).put_line(rest, &mut line);
            }
            Source::Clock(life) => {
                let Some(Tied { pairs, clock }) = &tied[life as usize] else { continue };
                let time = guest_time(entry.at, clock);
                ClockLine { time, offset_ns: clock.offset(entry.at).value, pairs: *pairs as u64 }.put_line(&mut line);
            }
        }
        out.write_all(&line)?;
    }
    out.flush()?;
    Ok(report)
}

/// Reads the device's trace. Its hello is written at once.
fn read_host(
    host: &mut TraceFile<impl Read + Seek>,
    merged: &mut Vec<Entry>,
    report: &mut Report,
    out: &mut impl Write,
) -> Result<HostSpans, MergeError> {
    let mut spans = HostSpans::new();
    while let Some(entry) = host.next_entry().map_err(of_device)? {
        let at = entry.at;
        let time = match entry.item {
            Item::Hello => {
                let mut line = Vec::new();
                host.append_line(at, &mut line).map_err(of_device)?;
                out.write_all(&line)?;
                continue;
            }
            Item::Event(event) => {
                spans.add(&event);
                event.time_ns
            }
            Item::Guest(event) => event.time_ns,
            Item::GuestLost { time_ns } | Item::Other { time_ns, .. } => time_ns,
            Item::GuestHello { .. } | Item::Unreadable(_) => {
                report.skipped += 1;
                continue;
            }
        };
        merged.push(Entry { time: nanoseconds(time.into()), at, source: Source::Host });
        report.host += 1;
    }
    spans.sort();
    Ok(spans)
}

/// Reads the guest's trace.
fn read_lives(guest: &mut TraceFile<impl Read + Seek>, report: &mut Report) -> Result<Vec<Life>, MergeError> {
    let mut lives: Vec<Life> = Vec::new();
    while let Some(entry) = guest.next_entry().map_err(of_guest)? {
        let (time, step) = match &entry.item {
            Item::GuestHello { time_ns } => {
                lives.push(Life::default());
                (*time_ns, None)
            }
            Item::Guest(event) => (event.time_ns, GuestStep::new(event)),
            Item::GuestLost { time_ns } | Item::Other { time_ns, .. } => (*time_ns, None),
            Item::Unreadable(_) => {
                report.skipped += 1;
                continue;
            }
            Item::Hello | Item::Event(_) => return Err(MergeError::NoGuestTrace),
        };
        // The time stands first, so that it can be exchanged.
        if split_time(guest.line()).is_none() {
            report.skipped += 1;
            continue;
        }
        let life = lives.last_mut().ok_or(MergeError::NoGuestTrace)?;
        life.lines.push((time, entry.at));
        life.steps.extend(step);
    }
    if lives.is_empty() {
        return Err(MergeError::NoGuestTrace);
    }
    for life in &mut lives {
        life.lines.sort_unstable();
        life.steps.sort_by_key(|step| step.at);
    }
    Ok(lives)
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

fn guest_time(at: u64, clock: &Clock) -> GuestTime {
    GuestTime { time_ns: nanoseconds(host_time(at, clock)), error_ns: clock.offset(at).error, guest_ns: at }
}
