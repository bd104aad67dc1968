//! `viommu trace`: prints what the trace socket says.

use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use zerocopy::IntoBytes;

use viommu_trace::{self as trace, Backlog, Entry, Item, Kind, ReadError, Subscription, Tally, TraceFile};

/// Print the trace of a running viommu, or of a file
///
/// Connects to the trace socket of `viommu serve` or `viommu run` and prints events as they happen, until that process
/// ends or so many events have been printed as --count says. A file with a trace, binary or in lines of JSON, is printed
/// in the same way.
#[derive(clap::Args)]
pub struct Args {
    /// The trace socket, or a file with a trace
    #[arg(long, value_name = "PATH", default_value = "trace.sock")]
    socket: PathBuf,

    /// How to print the events
    #[arg(long, value_enum, default_value_t)]
    format: Format,

    /// Only events of this kind; may be given several times, or as a list with commas
    #[arg(long = "kind", value_name = "KIND", value_delimiter = ',', value_parser = kind_parser())]
    kinds: Vec<Kind>,

    /// Leave out events about other endpoints; an id (32) or a PCI address (00:04.0), several times or as a list
    #[arg(long = "endpoint", value_name = "ENDPOINT", value_delimiter = ',', value_parser = trace::parse_endpoint)]
    endpoints: Vec<u32>,

    /// Begin with the last N events that happened before, or with all that are kept; of a file all are printed
    #[arg(long, value_name = "N|all", default_value = "0", value_parser = parse_backlog)]
    backlog: Backlog,

    /// Tell also what is live: domains, endpoints, reservations, mappings, between two marks, while requests go on
    #[arg(long)]
    state: bool,

    /// Print instead what the trace's formats are, as JSON for programs: kinds, fields, types, units, places in a record
    #[arg(long, exclusive = true)]
    schema: bool,

    /// End after N events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A line for people: seconds since boot, kind, endpoint, then field=value
    #[default]
    Text,
    /// A JSON object a line
    Json,
    /// The binary stream as docs/trace.md describes it
    Binary,
}

fn kind_parser() -> impl TypedValueParser<Value = Kind> {
    PossibleValuesParser::new(Kind::ALL.map(Kind::name))
        .try_map(|name| Kind::from_name(&name).ok_or_else(|| format!("Unknown kind {name}")))
}

fn parse_backlog(text: &str) -> Result<Backlog, String> {
    match (text, text.parse()) {
        ("all", _) => Ok(Backlog::All),
        (_, Ok(0)) => Ok(Backlog::None),
        (_, Ok(count)) => Ok(Backlog::Count(count)),
        _ => Err("Expected a number of events or \"all\"".into()),
    }
}

/// Prints the trace to the standard output.
pub fn main(args: &Args) -> Result<()> {
    if args.schema {
        return super::say(format_args!("{:#}\n", trace::schema()));
    }
    let stdout = io::stdout();
    ensure!(
        args.format != Format::Binary || !stdout.is_terminal(),
        "A terminal cannot show the binary format: send it to a file or a program, or choose --format text"
    );
    let subscription = Subscription {
        kinds: args.kinds.clone(),
        endpoints: args.endpoints.clone(),
        backlog: args.backlog,
        state: args.state,
        ..Subscription::default()
    };
    let mut trace = TraceFile::open(&args.socket, &subscription)?;
    ensure!(
        args.format != Format::Binary || trace.header().is_some(),
        "{} is a trace of JSON lines, which cannot be made binary: choose another --format",
        args.socket.display()
    );
    let mut out = BufWriter::with_capacity(64 << 10, stdout.lock());
    match print(&mut trace, args.format, args.count, &mut out) {
        // Whoever read our output has seen enough.
        Err(PrintError::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(PrintError::Write(error)) => Err(error).context("Cannot write the trace"),
        Err(PrintError::Read(error)) => Err(error.into()),
        Ok(()) => check(trace.tally()),
    }
}

enum PrintError {
    Read(ReadError),
    Write(io::Error),
}

impl From<ReadError> for PrintError {
    fn from(error: ReadError) -> Self {
        PrintError::Read(error)
    }
}

impl From<io::Error> for PrintError {
    fn from(error: io::Error) -> Self {
        PrintError::Write(error)
    }
}

/// Prints up to `count` events. What is printed is flushed whenever the next event is not here yet.
fn print(
    trace: &mut TraceFile<impl io::Read>,
    format: Format,
    count: Option<u64>,
    out: &mut impl Write,
) -> Result<(), PrintError> {
    let mut left = count.unwrap_or(u64::MAX);
    let mut line = Vec::new();
    while left > 0 {
        if !trace.is_ready() {
            out.flush()?;
        }
        let Some(entry) = trace.next_entry()? else { break };
        if matches!(entry.item, Item::Event(_) | Item::Guest(_)) {
            left -= 1;
        }
        line.clear();
        match format {
            Format::Json => trace.append_json(&entry, &mut line),
            Format::Text => append_text(trace, &entry, &mut line),
            Format::Binary => append_binary(trace, &entry, &mut line),
        }
        out.write_all(&line)?;
    }
    out.flush()?;
    Ok(())
}

/// Says how much could not be read.
///
/// # Errors
/// It is all.
pub(super) fn check(Tally { events, unreadable, first }: &Tally) -> Result<()> {
    if let Some((at, why)) = first {
        let message = format!(
            "{events} events were read, and {unreadable} could not be: the first of them begins at byte {at}: {why}"
        );
        ensure!(*events > 0, message);
        log::warn!("{message}");
    }
    Ok(())
}

fn append_text(trace: &TraceFile<impl io::Read>, entry: &Entry, line: &mut Vec<u8>) {
    match &entry.item {
        Item::Hello => {
            if let Some(header) = trace.header() {
                line.extend(format!("# viommu, process {}; lost before: {}\n", header.pid, header.lost).as_bytes());
            }
            line.extend(format!("# {:>13} {:<9} {:<8} fields\n", "monotonic", "kind", "endpoint").as_bytes());
        }
        Item::Event(event) => event.put_text(line),
        Item::Guest(event) => event.put_text(line),
        Item::GuestLost { time_ns } => comment(line, *time_ns, "the guest lost events of its own"),
        Item::Other { time_ns, why } => comment(line, *time_ns, why),
        // The clock is of use to `viommu merge` only, and `check` says what cannot be read.
        Item::GuestHello { .. } | Item::Unreadable(_) => {}
    }
}

/// A line for what happened at a time and is no event that this version knows.
fn comment(line: &mut Vec<u8>, time_ns: u64, what: impl Display) {
    let (s, us) = (time_ns / 1_000_000_000, time_ns / 1000 % 1_000_000);
    line.extend(format!("# {:>13} {what}\n", format!("{s}.{us:06}")).as_bytes());
}

fn append_binary(trace: &TraceFile<impl io::Read>, entry: &Entry, line: &mut Vec<u8>) {
    match (&entry.item, trace.header(), trace.record()) {
        (Item::Hello, Some(header), _) => line.extend(header.upgrade().as_bytes()),
        (_, _, Some(record)) => line.extend(record.as_bytes()),
        _ => {}
    }
}
