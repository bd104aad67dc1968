//! What was counted, together and for each endpoint, flow, tag or size.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use viommu_trace::event::Access;
use viommu_wire::request::RequestType;
use viommu_wire::split::Flow;

use super::GRANULE;
use super::histogram::Histogram;
use super::lives::{How, Life};

/// What groups are made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The endpoint that did it, or the only one of the domain that it was done in.
    Endpoint,
    /// The flow of the tag.
    Flow,
    /// The tag.
    Tag,
    /// The bytes of the range, the access or the command.
    Size,
}

impl By {
    /// All of them, with their names.
    pub const ALL: [(&'static str, By); 4] =
        [("endpoint", By::Endpoint), ("flow", By::Flow), ("tag", By::Tag), ("size", By::Size)];
}

/// Whom something belongs to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owner {
    pub endpoint: Option<u32>,
    pub tag: u64,
    pub size: u64,
}

/// The name of a group: only what it is made by is not `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// `Some(None)`: no endpoint, or several that share a domain.
    pub endpoint: Option<Option<u32>>,
    pub flow: Option<Flow>,
    pub tag: Option<u64>,
    pub size: Option<u64>,
}

impl Key {
    /// The group of an owner.
    pub fn of(by: &[By], owner: Owner) -> Key {
        let flow = Flow::of(owner.tag);
        let has = |wanted| by.contains(&wanted);
        Key {
            endpoint: has(By::Endpoint).then_some(owner.endpoint),
            flow: has(By::Flow).then_some(flow),
            tag: has(By::Tag).then_some(owner.tag),
            size: has(By::Size).then_some(owner.size),
        }
    }
}

/// Requests of one type.
#[derive(Clone, Debug, Default)]
pub struct Requests {
    /// Those that were not answered with OK.
    pub failed: u64,
    /// The bytes of their ranges.
    pub bytes: u64,
    /// The time of each in the device, ns.
    pub times: Histogram,
}

/// Accesses in one direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accesses {
    pub runs: u64,
    pub bytes: u64,
    /// Those that touch more than one page.
    pub crossing: u64,
    /// Those that were translated to where no memory is.
    pub failed: u64,
}

/// Ranges that came and went.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    pub made: u64,
    pub live: u64,
    pub peak: u64,
    pub live_bytes: u64,
    pub peak_bytes: u64,
    /// How long those lived that are gone, ns.
    pub lifetimes: Histogram,
}

impl Ranges {
    fn made(&mut self, bytes: u64) {
        self.made += 1;
        self.add(1, bytes);
    }

    fn add(&mut self, count: u64, bytes: u64) {
        self.live += count;
        self.live_bytes = self.live_bytes.saturating_add(bytes);
        self.peak = self.peak.max(self.live);
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
    }

    fn ended(&mut self, bytes: u64, lifetime_ns: u64) {
        self.live = self.live.saturating_sub(1);
        self.live_bytes = self.live_bytes.saturating_sub(bytes);
        self.lifetimes.add(lifetime_ns);
    }
}

/// The numbers of a group.
#[derive(Clone, Debug, Default)]
pub struct Group {
    requests: BTreeMap<u8, Requests>,
    accesses: [Accesses; 2],
    pub faults: u64,
    commands: u64,
    command_bytes: u64,
    commands_failed: u64,
    /// From fetching to completing, ns.
    command_times: Histogram,
    /// By MAP.
    mappings: Ranges,
    /// By LINK.
    links: Ranges,
    reservations: Ranges,
    /// Granules of mappings and links that are gone, and those of them that were accessed.
    granules: u64,
    granules_accessed: u64,
    /// Mappings and links that are gone and were never accessed.
    unused: u64,
}

impl Group {
    pub fn request(&mut self, request: RequestType, ok: bool, bytes: u64, ns: u64) {
        let of = self.requests.entry(request as u8).or_default();
        of.failed += u64::from(!ok);
        of.bytes = of.bytes.saturating_add(bytes);
        of.times.add(ns);
    }

    pub fn access(&mut self, access: Access, iova: u64, len: u64, failed: bool) {
        let of = &mut self.accesses[access as usize];
        of.runs += 1;
        of.bytes = of.bytes.saturating_add(len);
        of.crossing += u64::from(len > 0 && iova / GRANULE != iova.saturating_add(len - 1) / GRANULE);
        of.failed += u64::from(failed);
    }

    pub fn command(&mut self, ok: bool, bytes: u64, ns: u64) {
        self.commands += 1;
        self.commands_failed += u64::from(!ok);
        self.command_bytes = self.command_bytes.saturating_add(bytes);
        self.command_times.add(ns);
    }

    fn ranges(&mut self, how: How) -> &mut Ranges {
        match how {
            How::Mapped => &mut self.mappings,
            How::Linked => &mut self.links,
        }
    }

    pub fn made(&mut self, how: How, bytes: u64) {
        self.ranges(how).made(bytes);
    }

    /// A part of a range goes, so that one more lives.
    pub fn split(&mut self, how: How) {
        self.ranges(how).add(1, 0);
    }

    pub fn ended(&mut self, start: u64, life: &Life, now_ns: u64) {
        let bytes = (life.end - start).saturating_add(1);
        self.ranges(life.how).ended(bytes, now_ns.saturating_sub(life.made.time_ns));
        self.granules = self.granules.saturating_add(bytes.div_ceil(GRANULE));
        self.granules_accessed += life.accessed_pages();
        self.unused += u64::from(life.runs == 0);
    }

    pub fn reserved(&mut self, bytes: u64) {
        self.reservations.made(bytes);
    }

    pub fn released(&mut self, bytes: u64, lifetime_ns: u64) {
        self.reservations.ended(bytes, lifetime_ns);
    }

    /// How many requests of a type there were.
    pub fn requests_of(&self, request: RequestType) -> u64 {
        self.requests.get(&(request as u8)).map_or(0, |of| of.times.count())
    }

    /// Requests of all types.
    pub fn all_requests(&self) -> u64 {
        self.requests.values().map(|of| of.times.count()).sum()
    }

    pub fn requests(&self) -> impl Iterator<Item = (RequestType, &Requests)> {
        self.requests.iter().filter_map(|(number, of)| Some((RequestType::from_number(*number)?, of)))
    }

    pub fn accesses(&self) -> &[Accesses; 2] {
        &self.accesses
    }

    pub fn commands(&self) -> (u64, u64, &Histogram) {
        (self.commands, self.command_bytes, &self.command_times)
    }

    pub fn commands_failed(&self) -> u64 {
        self.commands_failed
    }

    /// Each kind of ranges with its name.
    pub fn all_ranges(&self) -> [(&'static str, &Ranges); 3] {
        [("mappings", &self.mappings), ("links", &self.links), ("reservations", &self.reservations)]
    }

    /// Granules that are gone, those of them that were accessed, and ranges that never were.
    pub fn used(&self) -> (u64, u64, u64) {
        (self.granules, self.granules_accessed, self.unused)
    }

    /// The numbers under stable names.
    pub fn to_json(&self) -> Value {
        let mut requests = Map::new();
        for (request, of) in self.requests() {
            let mut value = times(&of.times);
            value["failed"] = of.failed.into();
            value["bytes"] = of.bytes.into();
            requests.insert(request.name().to_lowercase(), value);
        }
        let access = |of: &Accesses| json!({ "runs": of.runs, "bytes": of.bytes, "page_crossings": of.crossing, "failed": of.failed });
        let mut value = json!({
            "requests": requests,
            "accesses": { "read": access(&self.accesses[0]), "write": access(&self.accesses[1]) },
            "faults": self.faults,
            "granules": { "ended": self.granules, "accessed": self.granules_accessed },
            "never_accessed": self.unused,
        });
        for (name, ranges) in self.all_ranges() {
            value[name] = json!({
                "made": ranges.made, "live": ranges.live, "peak": ranges.peak, "live_bytes": ranges.live_bytes,
                "peak_bytes": ranges.peak_bytes, "lifetime_ns": times(&ranges.lifetimes),
            });
        }
        let mut commands = times(&self.command_times);
        commands["bytes"] = self.command_bytes.into();
        commands["failed"] = self.commands_failed.into();
        value["commands"] = commands;
        value
    }
}

/// A distribution under stable names; times are ns.
pub fn times(histogram: &Histogram) -> Value {
    json!({
        "count": histogram.count(), "p50": histogram.quantile(50), "p99": histogram.quantile(99),
        "max": histogram.max(), "log2": histogram.octaves(),
    })
}
