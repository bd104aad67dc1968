//! The tables, and the targets.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use serde_json::{Value, json};
use viommu_testkit::guest::{ACCEL, guest_files, of_series, other_series};

use super::common::{MISSED, Median, REACHED, verdict};
use super::throughput::CASES;
use super::{SIZES, Setup};

/// The mark at the end of each Linux's tables in docs/results.md.
const END: &str = "<!-- to here -->";

/// The I/O that the series is made for, as compare.json names it: 128 KiB of 32 scattered pages.
const LARGE: &str = "128k";
/// An I/O that the series must not make slower: 4 KiB.
const SMALL: &str = "4k";
/// The least speed of small I/Os with the protocol, and without it, as a part of the speed of unpatched Linux.
const ON_TO_UNPATCHED: f64 = 1.0;
const OFF_TO_UNPATCHED: f64 = 0.97;
/// The same of large I/Os with the protocol.
const LARGE_TO_UNPATCHED: f64 = 1.65;

/// Columns of a line in docs/results.md, which `tests/plain/documents.rs` checks.
const WIDTH: usize = 100;

/// With fewer rounds the ratios mean nothing, and docs/results.md stays as it is.
const ENOUGH_ROUNDS: usize = 6;

/// The rows about one I/O size: title, member, digits after the point.
const ROWS: [(&str, &str, usize); 8] = [
    ("requests", "requests_per_io", 3),
    ("kicks, where the device waits for them", "kicks_per_io", 3),
    ("bytes on the queue", "queue_bytes_per_io", 1),
    ("guest CPU time in mapping, us", "mapping_cpu_us_per_io", 1),
    ("- of it waiting for the device, us", "of_it_waiting_us_per_io", 1),
    ("instructions in mapping, without waiting", "mapping_instructions_per_io", 0),
    ("atomic allocations", "atomic_allocations_per_io", 2),
    ("memory held while mapped, bytes", "held_bytes_per_mapping", 0),
];

/// Prints everything, and writes target/compare/compare.json (for Linux 6.12 compare-6.12.json) and docs/results.md. Fails
/// if a count misses its target.
pub fn finish(measured: &Value, rounds: usize, cores: usize) -> ExitCode {
    let mut all = measured.clone();
    all["about"] = about(measured, rounds, cores);
    let targets = targets(measured);
    let text = text(&all, &targets);
    println!("{text}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("target/compare");
    fs::create_dir_all(&folder).unwrap();
    large_io_in_front(&mut all);
    all["targets"] = targets.iter().map(|target| json!({ "target": target.what, "verdict": target.verdict })).collect();
    fs::write(folder.join(of_series("compare") + ".json"), format!("{all:#}\n")).unwrap();
    if rounds >= ENOUGH_ROUNDS {
        let page = root.join("docs/results.md");
        let old = fs::read_to_string(&page).unwrap();
        let begin = format!("<!-- {} writes from here -->", command());
        let (before, rest) =
            old.split_once(&begin).expect("docs/results.md has lost the mark before this Linux's table");
        let (_, after) = rest.split_once(END).expect("docs/results.md has lost the mark at the end of its table");
        fs::write(&page, format!("{before}{begin}\n\n{text}\n{END}{after}")).unwrap();
    } else {
        println!("docs/results.md was left as it is: it takes {ENOUGH_ROUNDS} rounds.");
    }
    if targets.iter().any(|target| target.exact && target.verdict == MISSED) {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Puts the costs of the large I/O into each mode itself too, since they are the most interesting:
/// `jq .patched_on.strict.requests_per_io`.
fn large_io_in_front(all: &mut Value) {
    for setup in Setup::all() {
        let of = &mut all[setup.variant.name][setup.mode.name];
        let large = of[LARGE].as_object().cloned().unwrap_or_default();
        for (member, value) in large {
            of[member] = value;
        }
    }
}

/// What runs this benchmark.
fn command() -> String {
    other_series().map_or("make compare".into(), |linux| format!("make compare SERIES={linux}"))
}

fn about(measured: &Value, rounds: usize, cores: usize) -> Value {
    let said = |program: &Path, arg: &str| {
        let output = Command::new(program).arg(arg).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_string()
    };
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let kernel = |variant: &str| measured[variant]["strict"]["kernel"].clone();
    json!({
        "date": said(Path::new("date"), "+%Y-%m-%d"),
        "command": format!("VIOMMU_COMPARE_ROUNDS={rounds} {}", command()),
        "kernels": { "unpatched": kernel("unpatched"), "patched": kernel("patched_on") },
        "qemu": said(&guest_files(&of_series("patched")).join("qemu"), "--version"),
        "accel": ACCEL,
        "cores": cores,
        "processor": processor.trim_start_matches([' ', '\t', ':']),
        "rounds": rounds,
    })
}

fn text(all: &Value, targets: &[Target]) -> String {
    let about = &all["about"];
    let run = format!(
        "{}, `{}`: Linux {} and {}, {}, accelerator {}, {} cores ({}).",
        plain(&about["date"]),
        plain(&about["command"]),
        plain(&about["kernels"]["unpatched"]),
        plain(&about["kernels"]["patched"]),
        plain(&about["qemu"]),
        plain(&about["accel"]),
        about["cores"],
        plain(&about["processor"])
    );
    let mut text = wrapped(&run, "");
    for size in &SIZES {
        let _ = writeln!(text, "\nOne read of {} KiB, {} physically contiguous:\n", size.pages * 4, size.runs());
        let mut table = Table::new(all, "each I/O");
        for (title, member, digits) in ROWS {
            table.row(title, |of| of[size.name][member].as_f64().map(|value| format!("{value:.digits$}")));
            if member == "requests_per_io" {
                table.row("- by type", |of| Some(by_type(&of[size.name]["requests_by_type"])));
            } else if member == "kicks_per_io" && size.name == LARGE {
                table.row("kicks, where it polls while it is awake", |of| polled_kicks(&of[LARGE]));
            }
        }
        text += &table.markdown();
    }
    if about["rounds"] != 0 {
        let rounds = &about["rounds"];
        let _ = writeln!(
            text,
            "\nThroughput, I/Os per second: median of {rounds} rounds, each of interleaved time slices of the three.\n"
        );
        let mut table = Table::new(all, "reads");
        for (name, ..) in CASES {
            table.row(name, |of| of["throughput"][name]["iops"].as_f64().map(|iops| format!("{iops:.0}")));
            table.row("- ratio to unpatched", |of| {
                let ratio = ratio(of, name)?;
                Some(format!("{:.3} ({:.3} to {:.3})", ratio.median, ratio.low, ratio.high))
            });
        }
        text += &table.markdown();
    }
    text += "\nTargets:\n\n";
    for target in targets {
        text += &wrapped(&format!("- {}: {}", target.what, target.verdict), "  ");
    }
    text
}

/// A line of prose, broken at [`WIDTH`]; the lines after the first begin with `indent`.
fn wrapped(line: &str, indent: &str) -> String {
    let (mut text, mut column) = (String::new(), 0);
    for word in line.split(' ') {
        if column > 0 && column + 1 + word.len() > WIDTH {
            text += "\n";
            text += indent;
            column = indent.len();
        } else if column > 0 {
            text += " ";
            column += 1;
        }
        text += word;
        column += word.len();
    }
    text + "\n"
}

/// A string of JSON without its quotes.
fn plain(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

impl super::Size {
    fn runs(&self) -> String {
        if self.pages == 1 { "one page,".into() } else { format!("{} pages, none", self.pages) }
    }
}

fn by_type(requests: &Value) -> String {
    let each = requests.as_object().into_iter().flatten().filter(|(_, count)| count.as_f64() != Some(0.0));
    each.map(|(name, count)| format!("{} {}", number(count), name.to_uppercase())).collect::<Vec<_>>().join(", ")
}

/// The median of boots, and the range.
fn polled_kicks(of: &Value) -> Option<String> {
    let [median, low, high] = ["/polled_kicks_per_io", "/polled_kicks_range/0", "/polled_kicks_range/1"]
        .map(|member| of.pointer(member).and_then(Value::as_f64));
    Some(format!("{:.3} ({:.3} to {:.3})", median?, low?, high?))
}

fn number(value: &Value) -> String {
    let text = format!("{:.3}", value.as_f64().unwrap_or(f64::NAN));
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn ratio(of: &Value, case: &str) -> Option<Median> {
    let ratio = &of["throughput"][case]["ratio_to_unpatched"];
    // JSON has no infinity.
    Some(Median {
        median: ratio["median"].as_f64()?,
        low: ratio["low"].as_f64()?,
        high: ratio["high"].as_f64().unwrap_or(f64::INFINITY),
    })
}

/// A table in Markdown, with a column for each setup.
struct Table<'a> {
    all: &'a Value,
    rows: Vec<Vec<String>>,
}

impl Table<'_> {
    fn new<'a>(all: &'a Value, head: &str) -> Table<'a> {
        let names = Setup::all().into_iter().map(|setup| setup.to_string());
        Table { all, rows: vec![std::iter::once(head.to_string()).chain(names).collect()] }
    }

    fn row(&mut self, title: &str, cell: impl Fn(&Value) -> Option<String>) {
        let cells = Setup::all().into_iter().map(|setup| {
            let of = &self.all[setup.variant.name][setup.mode.name];
            cell(of).unwrap_or_else(|| "?".into())
        });
        let row = std::iter::once(title.to_string()).chain(cells).collect();
        self.rows.push(row);
    }

    fn markdown(&self) -> String {
        let columns = self.rows[0].len();
        let widths: Vec<_> =
            (0..columns).map(|column| self.rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
        let mut text = String::new();
        for (at, row) in self.rows.iter().enumerate() {
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(text, "| {cell:<width$} ");
            }
            text += "|\n";
            if at == 0 {
                text += &format!("{}|\n", "|---".repeat(columns));
            }
        }
        text
    }
}

/// A goal of the series and the protocol.
struct Target {
    what: String,
    verdict: &'static str,
    /// Whether it is a count, which depends on nothing but the code: missing it is a failure.
    exact: bool,
}

impl Target {
    /// A count that may be at most `most`.
    fn counted(what: String, found: f64, most: f64) -> Target {
        Target { what, verdict: if found <= most { REACHED } else { MISSED }, exact: true }
    }
}

fn targets(all: &Value) -> Vec<Target> {
    let count = |what: &str, mode: &str, member: &str, most: f64| {
        let found = all["patched_on"][mode][LARGE][member].as_f64().unwrap();
        let base = all["unpatched"][mode][LARGE][member].as_f64().unwrap();
        let what =
            format!("128 KiB of 32 scattered pages, {mode}: {what} {found:.3}, wanted {most} (unpatched {base:.3})");
        Target::counted(what, found, most)
    };
    // Instructions show what throughput cannot, a few per cent. In the path of an I/O nothing else is changed except
    // the handling of an answer, which is a part of the waiting.
    let instructions = |variant: &str, least: f64| {
        let of = |variant: &str| all[variant]["strict"][SMALL]["mapping_instructions_per_io"].as_f64().unwrap();
        let (found, base) = (of(variant), of("unpatched"));
        let most = base / least;
        let what = format!(
            "4 KiB read, strict, {variant}: {found:.0} instructions in mapping, wanted at most {most:.0} (unpatched \
             {base:.0})"
        );
        Target::counted(what, found, most)
    };
    let mut targets = vec![
        count("requests", "strict", "requests_per_io", 3.0),
        count("requests", "lazy", "requests_per_io", 3.0),
        count("kicks", "strict", "kicks_per_io", 2.0),
        count("kicks", "lazy", "kicks_per_io", 1.1),
        Target {
            exact: false,
            ..count("kicks of a device that polls, median of boots", "strict", "polled_kicks_per_io", 0.1)
        },
        instructions("patched_on", ON_TO_UNPATCHED),
        instructions("patched_off", OFF_TO_UNPATCHED),
    ];
    let [small, deep, large] = CASES.map(|(case, ..)| case);
    let wanted = [
        (small, "patched_on", ON_TO_UNPATCHED),
        (deep, "patched_on", ON_TO_UNPATCHED),
        (small, "patched_off", OFF_TO_UNPATCHED),
        (deep, "patched_off", OFF_TO_UNPATCHED),
        (large, "patched_on", LARGE_TO_UNPATCHED),
    ];
    for (case, variant, least) in wanted {
        let Some(ratio) = ratio(&all[variant]["strict"], case) else { continue };
        targets.push(Target {
            what: format!(
                "{case}, strict, {variant} to unpatched: {:.3} ({:.3} to {:.3}), wanted at least {least}",
                ratio.median, ratio.low, ratio.high
            ),
            verdict: verdict(ratio, least),
            exact: false,
        });
    }
    targets
}
