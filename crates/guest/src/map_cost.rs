//! The cost of mapping in the guest, in NVMe I/Os one at a time: processor time, atomic allocations, memory.
//!
//! Probes at entry and return of the functions in which the NVMe driver maps and unmaps time it; the allocator's trace
//! events give the number and size of allocations. The two are measured one after the other, since each has its own
//! cost.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use viommu_wire::size;

use crate::blockdev::{self, Device};
use crate::buffers::Buffers;
use crate::engine::{self, Direction};
use crate::ftrace::{Event, Traced, Tracing};
use crate::nvme_io::Measured;
use crate::results::Results;
use crate::workload::Workload;

/// Prepares a command: here data is mapped and the command's pointers to it are made.
const MAP: &str = "nvme_prep_rq";
/// Unmaps a command's data.
const UNMAP: &str = "nvme_unmap_data";
/// Lazy mode: gives back the addresses that were unmapped in the last 10 ms.
const FLUSH: &str = "fq_flush_timeout";
/// Inside the others: notifies the device and waits for it.
const WAIT: &str = "__viommu_sync_req";
/// A function that does next to nothing, to measure the cost of probes.
const EMPTY: &str = "__x64_sys_getppid";
/// How often it is called.
const EMPTY_CALLS: u32 = 1000;
/// The allocator's events.
const ALLOCATOR: [&str; 4] = ["kmem/kmalloc", "kmem/kmem_cache_alloc", "kmem/kfree", "kmem/kmem_cache_free"];

/// The cost of mapping in the guest in raw I/O: processor time, atomic allocations, memory held.
#[derive(clap::Args)]
pub struct Args {
    /// The namespace: its block device, or its controller's function; the first function's if not given.
    #[arg(long)]
    dev: Option<PathBuf>,
    /// Bytes an I/O: a multiple of 512.
    #[arg(long, default_value = "128k", value_parser = size::parse)]
    bs: u64,
    /// Use buffers whose pages are scattered in physical memory.
    #[arg(long)]
    scatter: bool,
    /// I/Os to time, after as many to warm up.
    #[arg(long, default_value_t = 512)]
    ios: u64,
    /// I/Os whose allocations are traced.
    #[arg(long, default_value_t = 64)]
    traced_ios: u64,
}

impl Workload for Args {
    /// The workload. Emits one `result`.
    ///
    /// # Errors
    /// An I/O that failed, or tracing that the kernel cannot do.
    fn run(&self, results: &mut Results) -> Result<()> {
        let device = Device::open(&blockdev::choose(self.dev.as_deref())?)?;
        let mut buffers = Buffers::new(1, self.bs as usize, self.scatter)?;
        let runs = buffers.physical_runs();
        let mut read = |ios| {
            let mut stream = Measured::in_order(&device, self.bs, ios);
            engine::run(&device, Direction::Read, &mut buffers, &mut stream).map(drop)
        };
        let probe = probe_cost()?;
        read(self.ios)?;
        let times = times(probe, self.ios, || read(self.ios))?;
        let allocations = allocations(self.traced_ios, || read(self.traced_ios + 1))?;
        results.emit(
            "result",
            json!({
                "workload": "map-cost", "bs": self.bs, "scatter": self.scatter, "physical_runs_per_io": runs,
                "ios": self.ios, "ticks": times, "probe_ticks": probe.inside + probe.outside,
                "traced_ios": self.traced_ios, "allocations": allocations,
            }),
        );
        Ok(())
    }
}

/// The cost of a pair of probes, in ticks.
#[derive(Clone, Copy, Default)]
struct ProbeCost {
    /// Between its two events.
    inside: f64,
    /// Before the first and after the second.
    outside: f64,
}

/// Compares an empty system call with probes and without.
fn probe_cost() -> Result<ProbeCost> {
    let mut tracing = Tracing::new()?;
    let without = empty_call();
    ensure!(tracing.probe(EMPTY)?, "The kernel has no {EMPTY}");
    let (traced, with) = tracing.run(&[], || Ok(empty_call()))?;
    let inside = median(spans(&traced.events, ProbeCost::default()).iter().map(|span| span.own).collect());
    Ok(ProbeCost { inside, outside: with - without - inside })
}

/// The time of one call of the empty function, in ticks.
fn empty_call() -> f64 {
    let times = (0..EMPTY_CALLS).map(|_| {
        let start = ticks();
        let _ = nix::unistd::getppid();
        (ticks() - start) as f64
    });
    median(times.collect())
}

/// The time stamp counter.
fn ticks() -> u64 {
    // SAFETY: every processor of this architecture has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// A call of a function, in ticks, without the cost of the probes.
struct Span {
    function: String,
    /// In the function, without other functions that have probes.
    own: f64,
    /// In [`WAIT`], called from it.
    waiting: f64,
}

/// The calls in a trace of one processor.
fn spans(events: &[Event], cost: ProbeCost) -> Vec<Span> {
    struct Open<'a> {
        function: &'a str,
        start: u64,
        others: f64,
        waiting: f64,
    }
    let mut stack: Vec<Open> = Vec::new();
    let mut spans = Vec::new();
    for event in events {
        if let Some(function) = event.name.strip_suffix("_in") {
            stack.push(Open { function, start: event.time, others: 0.0, waiting: 0.0 });
        } else if let Some(function) = event.name.strip_suffix("_out") {
            // One that was entered before tracing began is left out.
            let Some(open) = stack.pop_if(|open| open.function == function) else { continue };
            let whole = (event.time - open.start) as f64;
            let own = whole - open.others - cost.inside;
            if let Some(caller) = stack.last_mut() {
                caller.others += whole + cost.outside;
                caller.waiting += if function == WAIT { own } else { 0.0 };
            }
            spans.push(Span { function: function.to_owned(), own, waiting: open.waiting });
        }
    }
    spans
}

/// Processor time in mapping, in ticks for each I/O: medians of the functions that each I/O calls once, and the mean of
/// the function that only some call.
///
/// If a completion interrupts the handler of a probe, its unmapping makes no event. That happens on a busy host, where
/// I/Os take longer and end while the timer flushes. Such calls are counted and left out; those of [`FLUSH`] are
/// assumed to be like the others.
fn times(cost: ProbeCost, ios: u64, work: impl FnOnce() -> Result<()>) -> Result<Value> {
    let mut tracing = Tracing::new()?;
    for function in [MAP, UNMAP, FLUSH, WAIT] {
        ensure!(tracing.probe(function)?, "The kernel has no {function} that could be timed");
    }
    let start = (ticks(), Instant::now());
    let (traced, ()) = tracing.run(&[], work)?;
    let ticks_per_us = (ticks() - start.0) as f64 / start.1.elapsed().as_micros() as f64;
    let spans = spans(&traced.events, cost);
    let of = |function: &str| spans.iter().filter(|span| span.function == function).collect::<Vec<_>>();
    let each = |function: &str| {
        let calls = of(function);
        let (seen, missed) = (calls.len() as u64, traced.missed_calls(function));
        ensure!(seen + missed == ios, "{function} was seen {seen} times and missed {missed} times in {ios} I/Os");
        let middle = |value: fn(&&Span) -> f64| median(calls.iter().map(value).collect());
        Ok(json!({ "own": middle(|span| span.own), "waiting": middle(|span| span.waiting) }))
    };
    let flushes = of(FLUSH);
    let all = (flushes.len() as u64 + traced.missed_calls(FLUSH)) as f64;
    let mean = |value: fn(&&Span) -> f64| {
        let sum = flushes.iter().map(value).fold(0.0, |sum, ticks| sum + ticks);
        sum * all / flushes.len().max(1) as f64 / ios as f64
    };
    let missed_calls: u64 = [MAP, UNMAP, FLUSH].iter().map(|function| traced.missed_calls(function)).sum();
    Ok(json!({
        "ticks_per_us": ticks_per_us, "map": each(MAP)?, "unmap": each(UNMAP)?,
        "flush": { "own": mean(|span| span.own), "waiting": mean(|span| span.waiting) },
        "missed_calls": missed_calls,
    }))
}

/// The allocations in `ios` I/Os; `work` does one I/O more.
fn allocations(ios: u64, work: impl FnOnce() -> Result<()>) -> Result<Value> {
    let mut tracing = Tracing::new()?;
    ensure!(tracing.probe(MAP)?, "The kernel has no {MAP} that could be traced");
    let (Traced { events, .. }, ()) = tracing.run(&ALLOCATOR, work)?;
    let entry = format!("{MAP}_in");
    let starts: Vec<usize> = (0..events.len()).filter(|at| events[*at].name == entry).collect();
    ensure!(starts.len() as u64 == ios + 1, "{MAP} was called {} times for {} I/Os", starts.len(), ios + 1);
    // From the mapping of the first to that of the last: whole periods.
    let atomic = events[starts[0]..starts[starts.len() - 1]].iter().filter(|event| is_atomic(event));
    let mut callers: BTreeMap<String, u64> = BTreeMap::new();
    for event in atomic {
        let caller = event.member("call_site").and_then(|site| site.split('+').next()).unwrap_or("unknown");
        *callers.entry(caller.to_owned()).or_default() += 1;
    }
    let held = starts.iter().map(|start| held_bytes(&events[*start..])).collect::<Result<Vec<_>>>()?;
    Ok(json!({ "atomic": callers.values().sum::<u64>(), "atomic_by_caller": callers, "held_bytes": median(held) }))
}

fn is_atomic(event: &Event) -> bool {
    event.member("gfp_flags").is_some_and(|flags| flags.split('|').any(|flag| flag == "GFP_ATOMIC"))
}

/// The bytes that a call of [`MAP`], whose entry is the first of these events, allocated and had not freed when it
/// returned.
fn held_bytes(events: &[Event]) -> Result<f64> {
    let end = format!("{MAP}_out");
    let mut live: HashMap<&str, f64> = HashMap::new();
    for event in events.iter().take_while(|event| event.name != end) {
        let Some(pointer) = event.member("ptr") else { continue };
        match event.name.as_str() {
            "kmalloc" | "kmem_cache_alloc" => {
                let bytes = event.member("bytes_alloc").and_then(|bytes| bytes.parse().ok());
                live.insert(pointer, bytes.with_context(|| format!("An allocation without a size: {event:?}"))?);
            }
            _ => drop(live.remove(pointer)),
        }
    }
    Ok(live.values().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time: u64, name: &str, text: &str) -> Event {
        Event { time, name: name.into(), text: text.into() }
    }

    #[test]
    fn waiting_and_probes_are_no_time_of_the_caller() {
        let events = [
            event(90, "nvme_unmap_data_out", ""),
            event(100, "nvme_prep_rq_in", ""),
            event(150, "__viommu_sync_req_in", ""),
            event(250, "__viommu_sync_req_out", ""),
            event(300, "nvme_prep_rq_out", ""),
        ];
        let spans = spans(&events, ProbeCost { inside: 10.0, outside: 20.0 });
        let mapping = spans.iter().find(|span| span.function == MAP).unwrap();
        assert_eq!((mapping.own, mapping.waiting), (200.0 - 100.0 - 20.0 - 10.0, 90.0));
        assert_eq!(spans.len(), 2);
    }

    #[test]
    fn what_a_mapping_frees_again_it_does_not_hold() {
        let events = [
            event(1, "nvme_prep_rq_in", ""),
            event(2, "kmalloc", "call_site=f+0x1/0x2 ptr=a bytes_req=60 bytes_alloc=64 gfp_flags=GFP_ATOMIC"),
            event(
                3,
                "kmem_cache_alloc",
                "call_site=g+0x1/0x2 ptr=b bytes_req=100 bytes_alloc=104 gfp_flags=GFP_KERNEL",
            ),
            event(4, "kfree", "call_site=f+0x9/0x10 ptr=a"),
            event(5, "nvme_prep_rq_out", ""),
            event(6, "kmalloc", "call_site=f ptr=c bytes_req=60 bytes_alloc=64 gfp_flags=GFP_ATOMIC|__GFP_ZERO"),
        ];
        assert_eq!(held_bytes(&events).unwrap(), 104.0);
        assert_eq!(events.iter().filter(|event| is_atomic(event)).count(), 2);
    }
}
