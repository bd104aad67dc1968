//! Operations from reserving to releasing: one chain of steps each.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::groups::times;
use super::histogram::Histogram;
use super::lives::{Moment, Served};

/// Operations that are under way and followed.
const ACTIVE_MAX: usize = 1 << 16;

/// The slowest operations that are kept.
const SLOWEST: usize = 5;

/// The steps of an operation that are timed, each from one event to the next that is known.
pub const STEPS: [&str; 4] = ["reserve to link", "link to fetch", "fetch to completion", "completion to release"];

/// An operation.
#[derive(Clone, Debug, Default)]
pub struct Operation {
    pub domain: u32,
    pub tag: u64,
    /// First and last address.
    pub range: (u64, u64),
    /// The RESERVE; not known of an operation that was mapped in one step.
    pub reserved: Option<Moment>,
    /// The first LINK, or the MAP.
    pub linked: Option<Moment>,
    pub first_access: Option<Moment>,
    pub last_access: Option<Moment>,
    pub accesses: u64,
    /// The completion of its command, and the ns from fetching the command to that.
    pub completed: Option<(Moment, u64)>,
    /// The RELEASE or UNMAP.
    pub released: Option<Moment>,
}

impl Operation {
    /// When the device fetched the command, ns.
    fn fetched(&self) -> Option<u64> {
        self.completed.map(|(completed, ns)| completed.time_ns.saturating_sub(ns))
    }

    /// The ns of each of [`STEPS`], as far as both ends are known.
    pub fn steps(&self) -> [Option<u64>; 4] {
        let time = |moment: Option<Moment>| moment.map(|moment| moment.time_ns);
        let completed = time(self.completed.map(|(completed, _)| completed));
        let ends = [time(self.reserved), time(self.linked), self.fetched(), completed, time(self.released)];
        std::array::from_fn(|step| Some(ends[step + 1]?.saturating_sub(ends[step]?)))
    }

    /// From its first known event to its last, ns.
    pub fn total(&self) -> u64 {
        let begin = self.reserved.or(self.linked).map_or(0, |moment| moment.time_ns);
        self.released.map_or(0, |released| released.time_ns.saturating_sub(begin))
    }

    /// The numbers of its events, in their order.
    pub fn events(&self) -> Vec<(&'static str, Moment)> {
        let completed = self.completed.map(|(completed, _)| completed);
        let linked = if self.tag == 0 { "map" } else { "link" };
        let released = if self.tag == 0 { "unmap" } else { "release" };
        let all = [
            ("reserve", self.reserved),
            (linked, self.linked),
            ("first access", self.first_access),
            ("last access", self.last_access),
            ("completion", completed),
            (released, self.released),
        ];
        all.into_iter().filter_map(|(name, moment)| Some((name, moment?))).collect()
    }

    fn to_json(&self) -> Value {
        let events: Vec<_> = self
            .events()
            .iter()
            .map(|(name, moment)| json!({ "step": name, "seq": moment.seq, "t": moment.time_ns }))
            .collect();
        json!({
            "domain": self.domain, "tag": format!("{:#x}", self.tag), "virt_start": format!("{:#x}", self.range.0),
            "virt_end": format!("{:#x}", self.range.1), "accesses": self.accesses, "total_ns": self.total(), "events": events,
        })
    }
}

/// The operations of a trace.
#[derive(Debug, Default)]
pub struct Operations {
    active: HashMap<(u32, u64), Operation>,
    steps: [Histogram; 4],
    total: Histogram,
    slowest: Vec<Operation>,
    /// Operations that were not followed: too many were under way.
    untracked: u64,
}

impl Operations {
    /// Whether an operation with this tag is under way.
    pub fn has(&self, domain: u32, tag: u64) -> bool {
        self.active.contains_key(&(domain, tag))
    }

    pub fn reserved(&mut self, domain: u32, tag: u64, range: (u64, u64), now: Moment) {
        if tag == 0 {
            return;
        }
        // The tag is used again: the one before is not told apart from this any more.
        self.active.remove(&(domain, tag));
        if self.active.len() < ACTIVE_MAX {
            let operation = Operation { domain, tag, range, reserved: Some(now), ..Operation::default() };
            self.active.insert((domain, tag), operation);
        } else {
            self.untracked += 1;
        }
    }

    pub fn linked(&mut self, domain: u32, tag: u64, range: (u64, u64), now: Moment) {
        if tag == 0 {
            return;
        }
        if self.active.len() >= ACTIVE_MAX && !self.has(domain, tag) {
            self.untracked += 1;
            return;
        }
        let new = || Operation { domain, tag, range, ..Operation::default() };
        self.active.entry((domain, tag)).or_insert_with(new).linked.get_or_insert(now);
    }

    pub fn accessed(&mut self, domain: u32, tag: u64, now: Moment) {
        if tag != 0
            && let Some(operation) = self.active.get_mut(&(domain, tag))
        {
            operation.first_access.get_or_insert(now);
            operation.last_access = Some(now);
            operation.accesses += 1;
        }
    }

    pub fn completed(&mut self, domain: u32, tag: u64, now: Moment, ns: u64) {
        if let Some(operation) = self.active.get_mut(&(domain, tag)) {
            operation.completed.get_or_insert((now, ns));
        }
    }

    pub fn released(&mut self, domain: u32, tag: u64, now: Moment) {
        if let Some(operation) = self.active.remove(&(domain, tag)) {
            self.end(Operation { released: Some(now), ..operation });
        }
    }

    /// What was linked with this tag is not any more. That ends an operation whose range was reserved under another tag.
    pub fn unlinked(&mut self, domain: u32, tag: u64, now: Moment) {
        if self.active.get(&(domain, tag)).is_some_and(|operation| operation.reserved.is_none()) {
            self.released(domain, tag, now);
        }
    }

    /// How many were not followed.
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// An operation that was mapped in one step, known by its command.
    pub fn untagged(&mut self, domain: u32, range: (u64, u64), made: Moment, served: Served, now: Moment) {
        self.end(Operation {
            domain,
            range,
            linked: Some(made),
            completed: Some((served.completed, served.ns)),
            released: Some(now),
            ..Operation::default()
        });
    }

    /// All that is under way is given up.
    pub fn clear(&mut self) {
        self.active.clear();
    }

    fn end(&mut self, operation: Operation) {
        for (histogram, ns) in self.steps.iter_mut().zip(operation.steps()) {
            if let Some(ns) = ns {
                histogram.add(ns);
            }
        }
        let total = operation.total();
        self.total.add(total);
        let is_slow = self.slowest.len() < SLOWEST || self.slowest.last().is_some_and(|last| total > last.total());
        if is_slow {
            let at = self.slowest.partition_point(|slow| slow.total() >= total);
            self.slowest.insert(at, operation);
            self.slowest.truncate(SLOWEST);
        }
    }

    /// How many ended, each step with its times, and the slowest.
    pub fn all(&self) -> (&Histogram, impl Iterator<Item = (&'static str, &Histogram)>, &[Operation]) {
        (&self.total, STEPS.into_iter().zip(&self.steps), &self.slowest)
    }

    /// They under stable names.
    pub fn to_json(&self) -> Value {
        let steps: serde_json::Map<_, _> =
            STEPS.into_iter().zip(&self.steps).map(|(name, ns)| (name.replace(' ', "_"), times(ns))).collect();
        let slowest: Vec<_> = self.slowest.iter().map(Operation::to_json).collect();
        json!({
            "ended": self.total.count(), "under_way": self.active.len(), "untracked": self.untracked,
            "total_ns": times(&self.total), "steps_ns": steps, "slowest": slowest,
        })
    }
}
