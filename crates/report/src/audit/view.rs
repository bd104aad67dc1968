//! A report as JSON, as text and as JUnit's XML.

use std::fmt::Write;

use serde_json::{Map, Value, json};
use viommu_trace::endpoint_text;
use viommu_wire::request::RequestType;

use super::groups::{By, Group, Key, times};
use super::histogram::Histogram;
use super::operations::Operation;
use super::{Report, Rule};

/// Groups that text shows.
const SHOWN: usize = 20;

/// The report under stable names.
pub fn to_json(report: &Report) -> Value {
    let requests: Map<_, _> = RequestType::ALL
        .iter()
        .map(|request| (request.name().to_lowercase(), report.totals.all.requests_of(*request).into()))
        .collect();
    let flows: Map<_, _> =
        report.totals.flows.iter().map(|(flow, group)| (flow.to_string(), group.to_json())).collect();
    let groups: Vec<_> = report
        .totals
        .groups
        .iter()
        .map(|(key, group)| {
            let mut value = group.to_json();
            value["of"] = names_of(&report.by, key).into_iter().collect::<Map<_, _>>().into();
            value
        })
        .collect();
    let findings: Vec<_> = report.findings.iter().map(super::Finding::to_json).collect();
    json!({
        "version": 1,
        "events": report.totals.events,
        "events_lost": report.totals.lost,
        "unreadable": report.totals.unreadable,
        "first_ns": report.totals.began_ns(),
        "last_ns": report.totals.last.time_ns,
        "kinds": report.totals.kinds,
        "requests": requests,
        "requests_failed": report.totals.all.requests().map(|(_, of)| of.failed).sum::<u64>(),
        "kicks": report.totals.kicks,
        "requests_by_kick": times(&report.totals.batches),
        "faults": report.totals.all.faults,
        "resets": report.totals.resets,
        "all": report.totals.all.to_json(),
        "flows": flows,
        "groups": groups,
        "operations": report.totals.operations.to_json(),
        "findings": findings,
    })
}

/// What a group is made by, each with its name.
fn names_of(by: &[By], key: &Key) -> Vec<(String, Value)> {
    if *key == Key::default() && !by.is_empty() {
        return vec![("others".into(), true.into())];
    }
    let mut names = Vec::new();
    if let Some(endpoint) = key.endpoint {
        names.push(("endpoint".into(), json!(endpoint)));
    }
    if let Some(flow) = key.flow {
        names.push(("flow".into(), flow.to_string().into()));
    }
    if let Some(tag) = key.tag {
        names.push(("tag".into(), format!("{tag:#x}").into()));
    }
    if let Some(size) = key.size {
        names.push(("size".into(), size.into()));
    }
    names
}

/// The report for people.
pub fn to_text(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(report, &mut text);
    text
}

fn write_text(report: &Report, text: &mut String) -> std::fmt::Result {
    let seconds = report.totals.last.time_ns.saturating_sub(report.totals.began_ns()) as f64 / 1e9;
    writeln!(
        text,
        "{} events in {seconds:.3} s, {} lost, {} unreadable",
        report.totals.events, report.totals.lost, report.totals.unreadable
    )?;
    write!(text, "{} kicks", report.totals.kicks)?;
    if report.totals.batches.count() > 0 {
        write!(
            text,
            " with {:.1} requests each, at most {}",
            mean(&report.totals.batches),
            report.totals.batches.max()
        )?;
    }
    writeln!(text, "; {} faults", report.totals.all.faults)?;
    for (key, group) in report.totals.groups.iter().take(SHOWN) {
        let names = names_of(&report.by, key);
        let names: Vec<_> = names.iter().map(|(name, value)| shown(name, value)).collect();
        writeln!(text, "\n{}", if names.is_empty() { "all".to_owned() } else { names.join(", ") })?;
        write_group(group, text)?;
    }
    if report.totals.groups.len() > SHOWN {
        writeln!(text, "\n{} more groups: --json has them", report.totals.groups.len() - SHOWN)?;
    }
    write_operations(report, text)?;
    if report.findings.is_empty() {
        return writeln!(text, "\nno findings");
    }
    writeln!(text, "\nfindings")?;
    report.findings.iter().try_for_each(|finding| write!(text, "  {finding}"))
}

fn mean(histogram: &Histogram) -> f64 {
    histogram.sum() as f64 / histogram.count() as f64
}

fn shown(name: &str, value: &Value) -> String {
    match (name, value) {
        ("endpoint", value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => format!("endpoint {}", endpoint_text(id)),
            None => "no endpoint, or several".into(),
        },
        ("others", _) => "all other groups".into(),
        (name, Value::String(text)) => format!("{name} {text}"),
        (name, value) => format!("{name} {value}"),
    }
}

fn write_group(group: &Group, text: &mut String) -> std::fmt::Result {
    let row = |text: &mut String, name: &str, count: u64, failed: u64, bytes: u64, ns: &Histogram| {
        writeln!(
            text,
            "  {name:<10} {count:>10} {failed:>7} {bytes:>14} {:>10.1} {:>10.1} {:>10.1}",
            ns.quantile(50) as f64 / 1e3,
            ns.quantile(99) as f64 / 1e3,
            ns.max() as f64 / 1e3
        )
    };
    let (commands, command_bytes, command_times) = group.commands();
    if group.all_requests() > 0 || commands > 0 {
        writeln!(
            text,
            "  {:<10} {:>10} {:>7} {:>14} {:>10} {:>10} {:>10}",
            "", "count", "failed", "bytes", "p50 us", "p99 us", "max us"
        )?;
    }
    for (request, of) in group.requests() {
        row(text, request.name(), of.times.count(), of.failed, of.bytes, &of.times)?;
    }
    if commands > 0 {
        row(text, "commands", commands, group.commands_failed(), command_bytes, command_times)?;
    }
    for (name, of) in ["reads", "writes"].into_iter().zip(group.accesses()) {
        if of.runs > 0 {
            writeln!(
                text,
                "  {name:<10} {:>10} {:>7} {:>14}   {} over a page's end",
                of.runs, of.failed, of.bytes, of.crossing
            )?;
        }
    }
    for (name, of) in group.all_ranges() {
        if of.made > 0 {
            let lived = &of.lifetimes;
            writeln!(
                text,
                "  {name:<12} {} made, {} live, at most {} ({} bytes); lived {:.1} us (median), at most {:.1}",
                of.made,
                of.live,
                of.peak,
                of.peak_bytes,
                lived.quantile(50) as f64 / 1e3,
                lived.max() as f64 / 1e3
            )?;
        }
    }
    let (granules, accessed, unused) = group.used();
    if granules > 0 {
        writeln!(
            text,
            "  of {granules} granules that are unmapped again {accessed} were accessed; {unused} ranges never were"
        )?;
    }
    if group.faults > 0 {
        writeln!(text, "  {} faults", group.faults)?;
    }
    Ok(())
}

fn write_operations(report: &Report, text: &mut String) -> std::fmt::Result {
    let (total, steps, slowest) = report.totals.operations.all();
    if total.count() == 0 {
        return Ok(());
    }
    writeln!(text, "\n{} operations{:>17} {:>10} {:>10}", total.count(), "p50 us", "p99 us", "max us")?;
    for (name, ns) in steps.chain([("all", total)]) {
        if ns.count() > 0 {
            let [p50, p99, max] = [ns.quantile(50), ns.quantile(99), ns.max()].map(|ns| ns as f64 / 1e3);
            writeln!(text, "  {name:<22} {p50:>10.1} {p99:>10.1} {max:>10.1}")?;
        }
    }
    if report.totals.operations.untracked() > 0 {
        writeln!(text, "  {} more were not followed: too many at a time", report.totals.operations.untracked())?;
    }
    slowest.first().map_or(Ok(()), |operation| write_chain(operation, text))
}

/// The steps of an operation, each with its time since the one before.
fn write_chain(operation: &Operation, text: &mut String) -> std::fmt::Result {
    let name = if operation.tag == 0 { "without a tag".into() } else { format!("tag {:#x}", operation.tag) };
    writeln!(text, "  the slowest, {name}, {:#x} to {:#x}:", operation.range.0, operation.range.1)?;
    let mut before = None;
    for (step, moment) in operation.events() {
        let since = before.map_or(0, |before: u64| moment.time_ns.saturating_sub(before));
        writeln!(text, "    {step:<14} +{:.1} us (event {})", since as f64 / 1e3, moment.seq)?;
        before = Some(moment.time_ns);
    }
    Ok(())
}

/// The findings as test results: each rule is a test, which fails if it was broken and is named by `fails`.
pub fn junit(report: &Report, fails: impl Fn(Rule) -> bool) -> String {
    let broken = |rule: Rule| report.findings.iter().filter(move |finding| finding.rule == rule);
    let failures = Rule::ALL.iter().filter(|rule| fails(**rule) && broken(**rule).next().is_some()).count();
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"viommu\" tests=\"{}\" failures=\"{failures}\">\n",
        Rule::ALL.len()
    );
    for rule in Rule::ALL {
        let said: String = broken(*rule).map(ToString::to_string).collect();
        let (id, said) = (rule.id(), escaped(&said));
        text += &match (said.is_empty(), fails(*rule)) {
            (true, _) => format!("  <testcase name=\"{id}\"/>\n"),
            (false, true) => format!("  <testcase name=\"{id}\"><failure>{said}</failure></testcase>\n"),
            (false, false) => format!("  <testcase name=\"{id}\"><system-out>{said}</system-out></testcase>\n"),
        };
    }
    text + "</testsuite>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
