//! The table at the end, and the same as JSON.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::concurrent::{Beside, RATE};
use super::{COUNTS, LAYOUTS, Set};

/// The results that criterion does not keep.
pub struct Report {
    begin: SystemTime,
    /// Resident bytes a mapping, by layout, count and subject.
    memory: BTreeMap<(&'static str, u64, &'static str), f64>,
    beside: Option<Beside>,
    /// Goals that were missed, or for which there is no result.
    missed: u32,
}

/// The comparisons: the layout, the operation, and the part of the `BTreeMap`'s time that is the goal.
const ROWS: [(&str, &str, Option<f64>); 6] = [
    ("dense", "pair", Some(0.2)),
    ("dense", "translate", Some(1.0 / 3.0)),
    ("sparse", "pair", Some(1.0)),
    ("sparse", "translate", Some(1.0)),
    ("two-in-2M", "pair", None),
    ("two-in-2M", "translate", None),
];

impl Report {
    /// The report of a run that begins now.
    pub fn new() -> Self {
        Report { begin: SystemTime::now(), memory: BTreeMap::new(), beside: None, missed: 0 }
    }

    /// A subject took `bytes` for the set.
    pub fn memory(&mut self, set: Set, subject: &'static str, bytes: u64) {
        self.memory.insert((set.layout.name, set.count, subject), bytes as f64 / set.count as f64);
    }

    /// A reader beside a writer.
    pub fn beside(&mut self, beside: Beside) {
        self.beside = Some(beside);
    }

    /// Prints the table of criterion's results in `data`, and writes it below `bench`. Returns how many goals were
    /// missed.
    pub fn finish(mut self, data: &Path, bench: &Path) -> u32 {
        let mut rows = Vec::new();
        println!("\n{:<28} {:>10} {:>10} {:>7}  goal", "", "BTreeMap", "viommu", "ratio");
        for (layout, what, goal) in ROWS {
            for count in COUNTS {
                let time = |subject| self.median_ns(data, layout, &format!("{subject}_{what}"), count);
                let (Some(btree), Some(ours)) = (time("btree"), time("viommu")) else { continue };
                // The dense goals are for the larger sets.
                let goal = goal.filter(|_| layout != "dense" || count >= 100_000);
                let ratio = ours / btree;
                let name = format!("{layout} {what} {count}");
                let verdict = goal.map_or(String::new(), |goal| format!("{goal:.3} {}", self.verdict(ratio, goal)));
                println!("{name:<28} {btree:>7.1} ns {ours:>7.1} ns {ratio:>7.3}  {verdict}");
                rows.push(json!({
                    "layout": layout, "operation": what, "mappings": count,
                    "btree_ns": btree, "viommu_ns": ours, "ratio": ratio, "goal": goal,
                }));
            }
        }
        let memory: Vec<Value> = LAYOUTS.map(|layout| self.memory_row(layout.name)).into_iter().flatten().collect();
        let mut grace = serde_json::Map::new();
        for what in ["synchronize", "pair+synchronize"] {
            for readers in [1, 16] {
                if let Some(time) = self.median_ns(data, "grace", what, readers) {
                    println!("{:<28} {:>10} {time:>7.1} ns", format!("{what}, {readers} readers"), "");
                    grace.insert(format!("{what}_{readers}_readers_ns"), json!(time));
                }
            }
        }
        let beside = self.beside.take().map(|beside| {
            let verdict = if beside.pairs < 0.95 * RATE as f64 {
                self.missed += 1;
                "VOID: the writer was too slow"
            } else {
                self.verdict(beside.ratio, 1.2)
            };
            println!(
                "one reader: {:.1} ns alone, {:.1} ns beside a writer of {:.0} pairs/s, ratio {:.3}, goal 1.200 {verdict}",
                beside.alone, beside.beside, beside.pairs, beside.ratio,
            );
            json!({
                "alone_ns": beside.alone, "beside_ns": beside.beside, "ratio": beside.ratio,
                "pairs_per_second": beside.pairs, "goal": 1.2,
            })
        });
        let all = json!({ "times": rows, "memory": memory, "grace": grace, "reader_beside_writer": beside });
        let file = bench.join("address_space.json");
        let written = std::fs::create_dir_all(bench).and_then(|()| std::fs::write(&file, format!("{all:#}\n")));
        match written {
            Ok(()) => println!("Written to {}", file.display()),
            Err(error) => println!("Cannot write {}: {error}", file.display()),
        }
        self.missed
    }

    fn verdict(&mut self, value: f64, goal: f64) -> &'static str {
        if value <= goal {
            return "reached";
        }
        self.missed += 1;
        "MISSED"
    }

    /// The median that criterion estimated in this run.
    fn median_ns(&self, data: &Path, group: &str, function: &str, count: u64) -> Option<f64> {
        let file = data.join(group).join(function).join(count.to_string()).join("new/estimates.json");
        if std::fs::metadata(&file).ok()?.modified().ok()? < self.begin {
            return None;
        }
        let estimates: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        estimates["median"]["point_estimate"].as_f64()
    }

    /// The row of the largest set, in which the process's own pages do not matter.
    fn memory_row(&mut self, layout: &'static str) -> Option<Value> {
        let count = *COUNTS.last()?;
        let of = |subject| self.memory.get(&(layout, count, subject)).copied();
        let (btree, ours) = (of("btree")?, of("viommu")?);
        // The goal of the sparse layouts is 4.3 KiB for each 2 MiB that are touched.
        let goal = match layout {
            "dense" => 16.0,
            "sparse" => 4.3 * 1024.0,
            _ => 4.3 * 512.0,
        };
        let name = format!("{layout} bytes a mapping");
        println!("{name:<28} {btree:>8.1} B {ours:>8.1} B {:>7}  {goal:.0} B {}", "", self.verdict(ours, goal));
        Some(json!({ "layout": layout, "mappings": count, "btree_bytes": btree, "viommu_bytes": ours, "goal": goal }))
    }
}
