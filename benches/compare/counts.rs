//! Requests and kicks of an I/O, from the trace of a boot.
//!
//! Set-up must not be counted, nor requests at the edges of a phase. So N I/Os run, then 2N, between single I/Os of a
//! size that nothing else has; the difference is the cost of N I/Os.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use viommu_testkit::guest::{Folder, Guest, InProcess};

use super::common::median;
use super::{SIZES, Setup, Size};

/// The size of the I/Os that separate the phases, in bytes.
const MARK: u64 = 1536;

/// Boots whose device polls. It polls only while it finds a processor for that, so that some boots have more kicks.
const POLLED_BOOTS: usize = 5;
/// The I/Os of such a boot.
const POLLED_IOS: u64 = 2048;

/// Boots a guest whose device waits for kicks, and counts.
pub fn count(setup: Setup) -> Value {
    let mark = format!("nvme-io --op read --bs {MARK} --total {MARK}");
    let phases: Vec<_> = SIZES
        .iter()
        .map(|size| {
            let [once, twice] = [size.io(size.ios), size.io(2 * size.ios)];
            // The first of them warms up.
            format!("{once} + {mark} + {once} + {mark} + {twice} + {mark}")
        })
        .collect();
    let guest = Guest::new(&setup.topology(false), &phases.join(" + "));
    let outcome = guest.kernel(&setup.variant.kernel()).append(setup.mode.append).run();
    let kernel = setup.check(&outcome.results);
    for name in ["faults", "events_lost", "requests_failed"] {
        assert_eq!(outcome.count(name), 0, "{setup}: {name}");
    }
    let is_mark = |event: &Value| event["kind"] == "command" && event["opcode"] == "read" && event["len"] == MARK;
    let marks: Vec<usize> = (0..outcome.trace.len()).filter(|at| is_mark(&outcome.trace[*at])).collect();
    assert_eq!(marks.len(), 3 * SIZES.len(), "{setup}: the marks between the phases");
    let mut all = json!({ "kernel": kernel });
    for (size, marks) in SIZES.iter().zip(marks.chunks(3)) {
        let [once, twice] = [0, 1].map(|phase| Counts::of(&outcome.trace[marks[phase]..marks[phase + 1]]));
        all[size.name] = once.until(&twice, size.ios);
    }
    all
}

/// The kicks of a boot whose device polls, divided by the boot's I/Os of the first size: the lowest, the median and the
/// highest of several boots. A few dozen kicks are those of the boot itself. The trace has no client, which would want a
/// processor too. To be called while this process may use all of them.
pub fn polled_kicks(setup: Setup) -> [f64; 3] {
    let boot = |_| {
        let folder = Folder::new();
        let daemon = InProcess::start(&folder, &setup.topology(true));
        let guest = daemon.guest(&SIZES[0].io(POLLED_IOS)).kernel(&setup.variant.kernel());
        let outcome = guest.append(setup.mode.append).run();
        setup.check(&outcome.results);
        let counts = daemon.end();
        assert!(counts.io_count >= POLLED_IOS, "{setup}: {counts:?}");
        counts.kicks as f64 / POLLED_IOS as f64
    };
    let mut kicks: Vec<f64> = (0..POLLED_BOOTS).map(boot).collect();
    kicks.sort_by(f64::total_cmp);
    [kicks[0], median(&kicks), kicks[POLLED_BOOTS - 1]]
}

impl Size {
    fn io(&self, ios: u64) -> String {
        let total = ios * u64::from(self.pages) * 4;
        format!("nvme-io --op read {} --depth {} --total {total}k", self.options(), self.depth)
    }
}

/// The events in a part of a trace.
struct Counts {
    requests: BTreeMap<String, u64>,
    queue_bytes: u64,
    kicks: u64,
    ios: u64,
}

impl Counts {
    fn of(events: &[Value]) -> Counts {
        let mut counts = Counts { requests: BTreeMap::new(), queue_bytes: 0, kicks: 0, ios: 0 };
        for event in events {
            match event["kind"].as_str() {
                Some("request") => {
                    let name = event["type"].as_str().unwrap().to_lowercase();
                    *counts.requests.entry(name).or_default() += 1;
                    counts.queue_bytes += request_bytes(event);
                }
                Some("kick") if event["virtqueue"] == "request" => counts.kicks += 1,
                Some("command") => counts.ios += 1,
                _ => {}
            }
        }
        counts
    }

    /// The cost of `ios` I/Os, if `other` has that many more than this one.
    fn until(&self, other: &Counts, ios: u64) -> Value {
        assert_eq!(other.ios - self.ios, ios, "the trace shows other I/Os than were asked for");
        let each = |one: u64, other: u64| (other as f64 - one as f64) / ios as f64;
        let of = |counts: &Counts, name: &String| counts.requests.get(name).copied().unwrap_or(0);
        let requests: BTreeMap<_, _> =
            other.requests.keys().map(|name| (name, each(of(self, name), of(other, name)))).collect();
        json!({
            "requests_per_io": requests.values().sum::<f64>(),
            "kicks_per_io": each(self.kicks, other.kicks),
            "requests_by_type": requests,
            "queue_bytes_per_io": each(self.queue_bytes, other.queue_bytes),
        })
    }
}

/// The bytes of a request that the device reads and writes: virtio specification 1.3, 5.13.6, and
/// docs/split-protocol.md. Each has a tail of 4.
fn request_bytes(event: &Value) -> u64 {
    match event["type"].as_str() {
        Some("MAP") => 36 + 4,
        Some("UNMAP") => 28 + 4,
        Some("RESERVE" | "UNLINK" | "RELEASE") => 36 + 4,
        Some("LINK") => 32 + 8 * event["extents"].as_u64().unwrap() + 4,
        _ => panic!("a request that belongs to no I/O: {event}"),
    }
}
