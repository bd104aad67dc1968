//! Merges a trace of the device and one of the guest into one trace on the host's clock.

mod clock;
mod spans;
mod tie;

use std::io::{self, Read, Seek, Write};

use clock::Clock;
use spans::{GuestStep, HostSpans, guest_spans};
use tie::Tied;
use viommu_trace::{ClockLine, GuestTime, Item, ReadError, TraceFile, split_time};

/// Why two traces cannot be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The guest's trace does not begin with a guest's hello.
    #[error("This is no trace of a guest: its first line is not a hello of source \"guest\"")]
    NoGuestTrace,
    /// The clocks cannot be compared.
    #[error(
        "No event of the guest could be tied to one of the device, so their clocks cannot be compared: both traces must \
         have the same NVMe commands (guest: nvme:nvme_setup_cmd and nvme:nvme_complete_rq) or LINKs with tags (guest: \
         dma_iova), and these must not be so regular that several clocks fit"
    )]
    Untied,
    /// A trace cannot be read.
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

/// The result of a merge.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Events of the device.
    pub host: usize,
    /// Events of the guest.
    pub guest: usize,
    /// Pairs of events that tie the clocks.
    pub pairs: usize,
    /// How often the clocks had to be tied again after the first time.
    pub breaks: usize,
    /// The largest error of a guest event's time, ns; `None` if the error of one of them is not known.
    pub error: Option<u64>,
    /// Lines that were left out because they are not events of such a trace; one that was cut off, for example.
    pub skipped: usize,
    /// Events of the guest that were left out because nothing ties the clocks in their boot.
    pub untied: usize,
}

/// Where a line comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Host,
    /// The guest, in the boot with this index.
    Guest(u32),
    /// The merge itself: the clock of the boot with this index is tied from here on.
    Clock(u32),
}

/// A line of the merged trace.
struct Entry {
    /// On the host's clock, ns.
    time: i64,
    /// The offset of the line in its file; for a [`Source::Clock`], the time on the guest's clock, ns.
    at: u64,
    source: Source,
}

/// One boot of the guest. The guest's clock starts again with each.
#[derive(Default)]
struct Boot {
    /// The time of each line, ns, and the line's offset in the file. In the order of time.
    lines: Vec<(u64, u64)>,
    /// In the order of time.
    steps: Vec<GuestStep>,
}

/// Merges a trace of the device and one of the guest, and writes JSON lines in the order of time. Both traces are read
/// twice.
///
/// # Errors
/// If a trace cannot be read or is of another kind, if no event ties their clocks, or if writing to `out` fails.
pub fn merge(
    host: &mut TraceFile<impl Read + Seek>,
    guest: &mut TraceFile<impl Read + Seek>,
    out: &mut impl Write,
) -> Result<Report, MergeError> {
    let mut report = Report { error: Some(0), ..Report::default() };
    let mut merged = Vec::new();
    let spans = read_host(host, &mut merged, &mut report, out)?;
    let mut boots = read_boots(guest, &mut report)?;
    let steps: Vec<_> = boots.iter_mut().map(|boot| guest_spans(std::mem::take(&mut boot.steps))).collect();
    let tied = tie::tie(&steps, &spans);
    drop((steps, spans));
    if tied.iter().all(Option::is_none) {
        return Err(MergeError::Untied);
    }
    for ((boot, number), tied) in boots.into_iter().zip(0..).zip(&tied) {
        match tied {
            Some(tied) => place(&boot, number, tied, &mut merged, &mut report),
            None => report.untied += boot.lines.len(),
        }
    }
    merged.sort_by_key(|entry| entry.time);
    let (mut line, mut said) = (Vec::new(), Vec::new());
    for entry in &merged {
        line.clear();
        match entry.source {
            Source::Host => host.append_line(entry.at, &mut line).map_err(of_device)?,
            Source::Guest(boot) => {
                let Some(Tied { clock, .. }) = &tied[boot as usize] else { continue };
                said.clear();
                guest.append_line(entry.at, &mut said).map_err(of_guest)?;
                let Some((at, rest)) = split_time(&said) else { continue };
                guest_time(at, clock).put_line(rest, &mut line);
            }
            Source::Clock(boot) => {
                let Some(Tied { pairs, clock }) = &tied[boot as usize] else { continue };
                let time = guest_time(entry.at, clock);
                ClockLine { time, offset_ns: clock.offset(entry.at).value, pairs: *pairs as u64 }.put_line(&mut line);
            }
        }
        out.write_all(&line)?;
    }
    out.flush()?;
    Ok(report)
}

/// Reads the device's trace, and writes its hello to `out`.
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
fn read_boots(guest: &mut TraceFile<impl Read + Seek>, report: &mut Report) -> Result<Vec<Boot>, MergeError> {
    let mut boots: Vec<Boot> = Vec::new();
    while let Some(entry) = guest.next_entry().map_err(of_guest)? {
        let (time, step) = match &entry.item {
            Item::GuestHello { time_ns } => {
                boots.push(Boot::default());
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
        // The time must be the first member, since it is replaced.
        if split_time(guest.line()).is_none() {
            report.skipped += 1;
            continue;
        }
        let boot = boots.last_mut().ok_or(MergeError::NoGuestTrace)?;
        boot.lines.push((time, entry.at));
        boot.steps.extend(step);
    }
    if boots.is_empty() {
        return Err(MergeError::NoGuestTrace);
    }
    for boot in &mut boots {
        boot.lines.sort_unstable();
        boot.steps.sort_by_key(|step| step.at);
    }
    Ok(boots)
}

/// Adds the lines of a boot to the merged trace, at their times on the host's clock.
fn place(boot: &Boot, number: u32, Tied { pairs, clock }: &Tied, merged: &mut Vec<Entry>, report: &mut Report) {
    report.pairs += pairs;
    report.breaks += clock.breaks().count();
    report.guest += boot.lines.len();
    let starts = boot.lines.first().map(|(t, _)| *t).into_iter().chain(clock.breaks());
    let source = Source::Clock(number);
    merged.extend(starts.map(|at| Entry { time: nanoseconds(host_time(at, clock)), at, source }));
    for &(t, at) in &boot.lines {
        let error = clock.offset(t).error;
        report.error = report.error.zip(error).map(|(one, other)| one.max(other));
        merged.push(Entry { time: nanoseconds(host_time(t, clock)), at, source: Source::Guest(number) });
    }
}

fn host_time(at: u64, clock: &Clock) -> i128 {
    i128::from(at) + i128::from(clock.offset(at).value)
}

/// Saturates. No clock gets as far as that.
fn nanoseconds(time: i128) -> i64 {
    i64::try_from(time).unwrap_or(if time < 0 { i64::MIN } else { i64::MAX })
}

fn guest_time(at: u64, clock: &Clock) -> GuestTime {
    GuestTime { time_ns: nanoseconds(host_time(at, clock)), error_ns: clock.offset(at).error, guest_ns: at }
}
