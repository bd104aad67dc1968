//! `viommu report`: what a trace says.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use viommu_report::audit::{self, Audit, By, Rule, Settings, Severity};
use viommu_trace::{Backlog, Subscription, TraceFile};

use super::trace::check;

/// The exit status if there are findings that --fail-on names.
const FOUND: u8 = 3;

/// Say what a trace shows: what was done, what it cost, and what was wrong
///
/// Reads a file with a trace, or a trace socket until that process ends, and prints what each endpoint and flow did, how
/// long its operations took, and findings: what a driver or a device did wrong, each with the events that show it.
#[derive(clap::Args)]
pub struct Args {
    /// The trace: a file, or the trace socket of a running viommu
    #[arg(value_name = "TRACE", default_value = "trace.sock")]
    trace: PathBuf,

    /// What to count apart
    #[arg(long, value_name = "WHAT,...", value_delimiter = ',', default_value = "endpoint,flow", value_parser = by_parser())]
    by: Vec<By>,

    /// After how many milliseconds an unmapping is late
    #[arg(long, value_name = "MS", default_value = "1", value_parser = parse_ms)]
    late: u64,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Write the findings to a file, as JUnit's XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,

    /// End with exit status 3 if there are findings with these ids, or of this severity or worse
    #[arg(long, value_name = "ID|SEVERITY,...", value_delimiter = ',', value_parser = parse_what_fails)]
    fail_on: Vec<Fails>,
}

/// Findings that are failures.
#[derive(Clone, Copy, Debug)]
enum Fails {
    /// Those of a rule.
    Rule(Rule),
    /// Those that are as bad as this.
    Severity(Severity),
}

fn by_parser() -> impl TypedValueParser<Value = By> {
    PossibleValuesParser::new(By::ALL.map(|(name, _)| name)).try_map(|text| {
        let found = By::ALL.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, by)| by).ok_or_else(|| format!("Unknown word {text}"))
    })
}

fn parse_ms(text: &str) -> Result<u64, String> {
    let ms: f64 = text.parse().map_err(|_| "Expected a number of milliseconds".to_owned())?;
    if (0.0..1e9).contains(&ms) { Ok((ms * 1e6) as u64) } else { Err("Expected 0 to 999999999 ms".into()) }
}

fn parse_what_fails(text: &str) -> Result<Fails, String> {
    let rule = Rule::ALL.iter().find(|rule| rule.id() == text).map(|rule| Fails::Rule(*rule));
    let severity = Severity::ALL.into_iter().find(|severity| severity.name() == text).map(Fails::Severity);
    rule.or(severity).ok_or_else(|| {
        let names = Severity::ALL.iter().map(|severity| severity.name()).chain(Rule::ALL.iter().map(|rule| rule.id()));
        format!("Expected one of {}", names.collect::<Vec<_>>().join(", "))
    })
}

impl Fails {
    fn has(self, rule: Rule) -> bool {
        match self {
            Fails::Rule(wanted) => wanted == rule,
            Fails::Severity(least) => rule.severity() >= least,
        }
    }
}

/// Prints the report to the standard output.
pub fn main(args: &Args) -> Result<ExitCode> {
    // With what is live: a leak may be older than the connection.
    let subscription = Subscription { backlog: Backlog::None, state: true, ..Subscription::default() };
    let mut trace = TraceFile::open(&args.trace, &subscription)
        .with_context(|| format!("Cannot read the trace {}", args.trace.display()))?;
    let mut audit = Audit::new(Settings { by: args.by.clone(), late_ns: args.late });
    while let Some(entry) = trace.next_entry()? {
        audit.read(&entry.item);
    }
    let tally = trace.tally();
    check(tally).with_context(|| format!("Nothing of {} can be read", args.trace.display()))?;
    ensure!(tally.events > 0, "{} has no events", args.trace.display());
    let report = audit.finish();
    let fails = |rule: Rule| args.fail_on.iter().any(|fails| fails.has(rule));
    if args.json {
        super::say(format_args!("{:#}\n", audit::to_json(&report)))?;
    } else {
        super::say(audit::to_text(&report))?;
    }
    if let Some(path) = &args.junit {
        fs::write(path, audit::junit(&report, fails)).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    let failed = report.findings.iter().any(|finding| fails(finding.rule));
    Ok(if failed { ExitCode::from(FOUND) } else { ExitCode::SUCCESS })
}
