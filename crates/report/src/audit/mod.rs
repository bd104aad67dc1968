//! Reads a trace and says what was done, what it cost, and what was wrong.

mod faults;
mod findings;
mod groups;
mod histogram;
mod lives;
mod operations;
mod requests;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;

use viommu_trace::event::{ResetKind, Route, StateItem};
use viommu_trace::{Event, Item, Stamped};
use viommu_wire::model::{Model, Part};
use viommu_wire::split::Flow;

use findings::Findings;
pub use findings::{Breach, Finding, Rule, Severity};
pub use groups::By;
use groups::{Group, Key, Owner};
use histogram::Histogram;
use lives::{How, Life, Moment, Space, Uses};
use operations::Operations;
pub use view::{junit, to_json, to_text};

/// The granule of the device's mappings.
const GRANULE: u64 = 4096;

/// How long after its command a mapping may live before it is called leaked, ns. Lazy unmapping takes 10 ms.
const LEAKED_AFTER: u64 = 1_000_000_000;

/// Groups that are kept apart.
const GROUPS_MAX: usize = 4096;

/// What to look for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What groups are made by.
    pub by: Vec<By>,
    /// After how many ns an unmapping is late.
    pub late_ns: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { by: vec![By::Endpoint, By::Flow], late_ns: 1_000_000 }
    }
}

/// MAPs of adjacent addresses.
#[derive(Clone, Copy, Debug, Default)]
struct Adjacent {
    /// The last address of the last one.
    last: u64,
    count: u64,
    /// The kicks of the trace before the last one, and how many of them had a kick of their own.
    kicks: u64,
    kicked: u64,
}

/// A domain.
#[derive(Debug, Default)]
struct Domain {
    space: Space,
    endpoints: Vec<u32>,
    /// MAPs in a row, each of the addresses after those of the one before.
    adjacent: Adjacent,
    /// The last requests of the domain that were refused: first and last address, and the event.
    refused: Vec<(u64, u64, Moment)>,
}

impl Domain {
    /// Whether nothing of it is on the device.
    fn is_over(&self) -> bool {
        self.endpoints.is_empty() && self.space.reservations.is_empty()
    }

    /// Whose requests these are: those of its only endpoint.
    fn endpoint(&self) -> Option<u32> {
        if let [only] = self.endpoints[..] { Some(only) } else { None }
    }
}

/// A trace that is being read.
pub struct Audit {
    settings: Settings,
    totals: Totals,
    domains: BTreeMap<u32, Domain>,
    attached: BTreeMap<u32, u32>,
    findings: Findings,
    /// MAPs that a LINK could have carried, the LINKs that it takes, and MAPs of these that had a kick of their own.
    joinable: (u64, u64, u64),
    /// While the live state is sent, what comes meanwhile. An item may be older than an event that was sent before it.
    waiting: Option<Vec<Stamped>>,
}

impl Audit {
    /// Nothing was read yet.
    pub fn new(settings: Settings) -> Audit {
        Audit {
            settings,
            totals: Totals::default(),
            domains: BTreeMap::new(),
            attached: BTreeMap::new(),
            findings: Findings::default(),
            joinable: (0, 0, 0),
            waiting: None,
        }
    }

    /// Reads the next entry of the trace.
    pub fn read(&mut self, item: &Item) {
        match item {
            Item::Event(event) => self.sort(event),
            Item::Unreadable(_) => self.totals.unreadable += 1,
            // The guest's own events are not evaluated.
            _ => {}
        }
    }

    /// Reads an event, after all that are older.
    fn sort(&mut self, event: &Stamped) {
        let mark = match event.event {
            Event::State { item, .. } => Some(item),
            _ => None,
        };
        match (mark, &mut self.waiting) {
            (Some(StateItem::Begin), waiting) => *waiting = Some(Vec::new()),
            (Some(StateItem::End), _) => self.catch_up(),
            (_, Some(waiting)) => waiting.push(*event),
            (_, None) => self.event(event),
        }
    }

    /// Reads what came while the live state was sent. An item was read before the event that has its number.
    fn catch_up(&mut self) {
        let mut waiting = self.waiting.take().unwrap_or_default();
        waiting.sort_by_key(|event| (event.seq, !matches!(event.event, Event::State { .. })));
        waiting.iter().for_each(|event| self.event(event));
    }

    /// Does something to all groups that `owner` belongs to.
    fn count(&mut self, owner: Owner, change: impl Fn(&mut Group)) {
        change(&mut self.totals.all);
        change(self.totals.flows.entry(Flow::of(owner.tag)).or_default());
        let key = Key::of(&self.settings.by, owner);
        // A group of everything else has no name at all.
        let is_full = self.totals.groups.len() >= GROUPS_MAX && !self.totals.groups.contains_key(&key);
        change(self.totals.groups.entry(if is_full { Key::default() } else { key }).or_default());
    }

    fn event(&mut self, event: &Stamped) {
        let now = Moment { seq: event.seq, time_ns: event.time_ns };
        // Items of the live state are no events of the run.
        if !matches!(event.event, Event::State { .. }) {
            self.totals.events += 1;
            self.totals.first.get_or_insert(now);
            self.totals.last = now;
            *self.totals.kinds.entry(event.event.kind().name()).or_default() += 1;
        }
        match event.event {
            Event::Request { .. } | Event::Split { .. } => self.request(&event.event, now),
            Event::Dma { .. } => self.access(&event.event, now),
            Event::Fault { .. } => self.fault(&event.event, now),
            Event::Command { endpoint, model, queue, id, status, len, duration, part, .. } => {
                let command = Command { model, queue, id, ok: status == 0, len: len.into(), ns: duration, part };
                self.command(now, endpoint, &command);
            }
            Event::Kick { requests, .. } => {
                self.totals.kicks += 1;
                self.totals.batches.add(requests.into());
            }
            Event::Reset { endpoint: None, reset } if ends_domains(reset) => self.end_domains(now),
            Event::Session { endpoint: None, connected: false, .. } => self.end_domains(now),
            Event::Lost { count, .. } => self.totals.lost = self.totals.lost.saturating_add(count),
            Event::State { .. } => self.state(&event.event, now),
            _ => {}
        }
    }

    /// The driver or the machine ended all domains.
    fn end_domains(&mut self, now: Moment) {
        self.totals.resets += 1;
        for (id, mut domain) in std::mem::take(&mut self.domains) {
            self.look_for_leaks(id, &domain, now);
            self.join(domain.adjacent);
            self.end_mappings(&mut domain, now, |_| true);
            self.end_reservations(&mut domain, now);
        }
        self.attached.clear();
        self.totals.operations.clear();
    }

    /// An item of what was live when the trace began.
    fn state(&mut self, event: &Event, now: Moment) {
        let Event::State { endpoint, item, domain, virt_start: start, virt_end: end, flags, tag, .. } = *event else {
            return;
        };
        let how = match item {
            StateItem::Endpoint => {
                if let Some(endpoint) = endpoint {
                    self.attach(endpoint, domain, now);
                }
                return;
            }
            StateItem::Reservation => {
                let of = self.domains.get(&domain);
                if !of.is_some_and(|of| of.space.reservations.contains_key(&start)) {
                    self.reserve(domain, (start, end), tag, now);
                }
                return;
            }
            StateItem::Mapping => How::Mapped,
            StateItem::Linked => How::Linked,
            StateItem::Begin | StateItem::Domain | StateItem::End => return,
        };
        let is_known = self.domains.get(&domain).is_some_and(|domain| domain.space.live.contains_key(&start));
        if start <= end && !is_known {
            let mut life = Life::new(start, end, how, tag, flags, now);
            life.is_old = true;
            self.note_linked(domain, start);
            self.make(domain, start, life);
        }
    }

    fn access(&mut self, event: &Event, now: Moment) {
        let Event::Dma { endpoint, access, failed, iova, len, domain, tag, route, .. } = *event else { return };
        let len = u64::from(len);
        let owner = Owner { endpoint: Some(endpoint), tag, size: len };
        self.count(owner, |group| group.access(access, iova, len, failed));
        if route != Route::Mapped {
            return;
        }
        self.totals.operations.accessed(domain, tag, now);
        let Some(space) = self.domains.get_mut(&domain).map(|domain| &mut domain.space) else { return };
        space.access(iova, len);
        if let Some((_, life)) = space.live_at(iova).filter(|_| failed) {
            let (made, how) = (life.made, life.how);
            self.findings.add(Rule::NoMemory, Some(endpoint), || Breach {
                text: format!("{iova:#x} leads to where the guest has no memory, since the {}", how.request()),
                evidence: vec![made.seq, now.seq],
                tag,
            });
        }
    }

    fn command(&mut self, now: Moment, endpoint: u32, command: &Command) {
        let domain = self.attached.get(&endpoint).copied();
        let tag = command.tag();
        let tagged = tag.filter(|tag| domain.is_some_and(|domain| self.totals.operations.has(domain, *tag)));
        let owner = Owner { endpoint: Some(endpoint), tag: tagged.unwrap_or_default(), size: command.len };
        self.count(owner, |group| group.command(command.ok, command.len, command.ns));
        let Some(domain) = domain else { return };
        if let Some(tag) = tagged {
            self.totals.operations.completed(domain, tag, now, command.ns);
        }
        if !command.ok || command.len == 0 {
            return;
        }
        let Some(space) = self.domains.get_mut(&domain).map(|domain| &mut domain.space) else { return };
        for start in command.addresses() {
            let end = start.saturating_add(command.len - 1);
            space.serve(start, end, now, command.ns);
        }
    }

    /// What was never undone although its command ended long ago.
    fn look_for_leaks(&mut self, id: u32, domain: &Domain, now: Moment) {
        let long_ago = |uses: &Uses| {
            let completed = uses.once()?.completed;
            (now.time_ns.saturating_sub(completed.time_ns) >= LEAKED_AFTER).then_some(completed)
        };
        for (start, life) in &domain.space.live {
            let Some(completed) = long_ago(&life.uses) else { continue };
            let ms = (now.time_ns - completed.time_ns) / 1_000_000;
            self.findings.add(Rule::Leaked, life.owner.endpoint, || Breach {
                text: format!(
                    "{start:#x} to {:#x} in domain {id} is there {ms} ms after the command that it was {} for",
                    life.end,
                    life.how.participle()
                ),
                evidence: vec![life.made.seq, completed.seq],
                tag: life.owner.tag,
            });
        }
        for (start, reservation) in &domain.space.reservations {
            let Some(completed) = long_ago(&reservation.uses) else { continue };
            self.findings.add(Rule::ReservationLeaked, reservation.owner.endpoint, || Breach {
                text: format!("{start:#x} to {:#x} in domain {id} is reserved still", reservation.end),
                evidence: vec![reservation.made.seq, completed.seq],
                tag: reservation.owner.tag,
            });
        }
    }

    /// The end of the trace.
    pub fn finish(mut self) -> Report {
        self.catch_up();
        let now = self.totals.last;
        for (id, domain) in std::mem::take(&mut self.domains) {
            self.look_for_leaks(id, &domain, now);
            self.join(domain.adjacent);
        }
        self.look_at_costs();
        // Accesses may be among what was lost, or were never in the trace.
        if self.totals.lost > 0 || !self.totals.kinds.contains_key("dma") {
            self.findings.remove(Rule::NeverAccessed);
        }
        Report { by: self.settings.by, totals: self.totals, findings: self.findings.into_vec() }
    }
}

fn ends_domains(reset: ResetKind) -> bool {
    matches!(reset, ResetKind::Device | ResetKind::System)
}

/// What was counted.
#[derive(Default)]
struct Totals {
    first: Option<Moment>,
    last: Moment,
    events: u64,
    lost: u64,
    unreadable: u64,
    kinds: BTreeMap<&'static str, u64>,
    kicks: u64,
    /// Requests that were found at each kick.
    batches: Histogram,
    resets: u64,
    all: Group,
    flows: BTreeMap<Flow, Group>,
    groups: BTreeMap<Key, Group>,
    operations: Operations,
}

impl Totals {
    /// The time of the first event, ns.
    fn began_ns(&self) -> u64 {
        self.first.map_or(0, |first| first.time_ns)
    }
}

/// What a trace says.
pub struct Report {
    by: Vec<By>,
    totals: Totals,
    /// What was wrong, the worst first.
    pub findings: Vec<Finding>,
}

/// A command that a device model completed.
struct Command {
    model: Model,
    queue: u32,
    id: u64,
    ok: bool,
    len: u64,
    ns: u64,
    part: Part,
}

impl Command {
    /// The tag of what a driver maps for it.
    fn tag(&self) -> Option<u64> {
        (self.model.declaration().tag)(self.queue, self.id)
    }

    /// The first addresses of the data that it names.
    fn addresses(&self) -> impl Iterator<Item = u64> {
        let declaration = self.model.declaration();
        let members = declaration.command.iter().filter(|member| declaration.addresses.contains(&member.name));
        members.filter(|member| (member.is_there)(self.queue, &self.part)).map(|member| member.get(&self.part))
    }
}

impl How {
    fn request(self) -> &'static str {
        match self {
            How::Mapped => "MAP",
            How::Linked => "LINK",
        }
    }

    fn participle(self) -> &'static str {
        match self {
            How::Mapped => "mapped",
            How::Linked => "linked",
        }
    }
}
