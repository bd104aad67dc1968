//! The guest's own events beside the device's, on one clock.

use serde_json::Value;
use viommu_testkit::guest::{Guest, Outcome};

use crate::{NVME, patched_kernel};

/// Bytes of an I/O: 32 pages that are scattered in memory.
const BYTES: u64 = 128 << 10;

/// The guest's clock: QEMU's HPET runs with the host's clock. With the processor's time stamp counter, Linux loses up
/// to some ten microseconds when it has calibrated it, a second or two after its start, and then the clocks must be
/// tied again.
const CLOCK: &str = "clocksource=hpet";

/// Checks what holds for every merged trace: it is in the order of time, has one clock throughout, and lost nothing.
fn assert_on_one_clock(outcome: &Outcome) {
    let end = outcome.guest_trace.iter().find(|line| line["kind"] == "end").expect("the agent's last line");
    assert_eq!(end["lost"], 0, "the guest lost events");
    let events = outcome.guest_trace.iter().filter(|line| line["kind"] == "guest").count() as u64;
    assert_eq!(end["events"], events);
    let result = outcome.results_of("trace").next().expect("a result");
    assert_eq!((result["events"].as_u64(), result["lost"].as_u64()), (Some(events), Some(0)));

    let times: Vec<i64> = outcome.merged.iter().filter_map(|line| line["t"].as_i64()).collect();
    assert!(times.is_sorted(), "the merged trace is not in the order of time");
    let of_guest: Vec<_> = outcome.merged.iter().filter(|line| line["kind"] == "guest").collect();
    assert_eq!(of_guest.len() as u64, events);
    assert!(of_guest.iter().all(|event| event["t_error"].is_u64()), "an event's error is not known");
    // A pair in the wrong order would have made a second clock.
    let clocks: Vec<_> = outcome.merged.iter().filter(|line| line["kind"] == "clock").collect();
    assert_eq!(clocks.len(), 1, "{clocks:?}");
    assert!(clocks[0]["pairs"].as_u64().unwrap() >= 16, "{clocks:?}");
}

/// The name of a line's event of the two-step API without its group, or its type, or its kind.
fn name(line: &Value) -> &str {
    let event = line["event"].as_str().map(|name| name.rsplit(':').next().unwrap_or_default());
    event.or(line["type"].as_str()).or(line["kind"].as_str()).unwrap_or_default()
}

/// The events of one write in the merged trace, from the guest's allocation to the device's RELEASE.
fn events_of(merged: &[Value], command: usize) -> Vec<&Value> {
    let data = &merged[command]["data"];
    let starts = |line: &Value| line["iova"] == *data || line["addr"] == *data;
    let alloc = merged[..command]
        .iter()
        .rposition(|line| name(line) == "dma_iova_alloc" && starts(line))
        .expect("the allocation");
    let tag = &merged[alloc]["tag"];
    assert!(tag.as_str().unwrap().starts_with("0x1000"), "an NVMe tag: {tag}");
    let release = merged[command..]
        .iter()
        .position(|line| line["type"] == "RELEASE" && line["tag"] == *tag)
        .expect("the RELEASE, after the command");
    let mine = |line: &&Value| line["tag"] == *tag || line["seq"] == merged[command]["seq"];
    // The reservation is queued during the allocation, whose event is written at the end.
    let reserve = merged[..command]
        .iter()
        .rposition(|line| line["type"] == "RESERVE" && line["tag"] == *tag)
        .expect("the RESERVE, before the command");
    merged[alloc.min(reserve)..=command + release].iter().filter(mine).collect()
}

/// A kernel without the series has no tags: NVMe commands tie the clocks.
#[test]
fn a_stock_kernel_s_events_are_on_the_clock_too() {
    let workload = "trace + nvme-io --op verify --bs 16k --depth 4 --total 2M";
    let outcome = Guest::new(NVME, workload).append(CLOCK).guest_trace().run();
    assert_on_one_clock(&outcome);
    for event in ["iommu:map", "iommu:unmap", "nvme:nvme_setup_cmd", "block:block_rq_complete"] {
        assert!(outcome.merged.iter().any(|line| line["event"] == event), "no {event}");
    }
    // On this clock each command lies between the guest's events about it, whether it tied the clocks or not.
    let commands = outcome.merged.iter().filter(|line| line["kind"] == "command" && line["queue"] != 0);
    let mut seen = 0;
    for command in commands {
        let of_it = |line: &&Value| line["cid"] == command["id"] && line["qid"] == command["queue"];
        let after = |line: &&Value| line["t"].as_i64() >= command["t"].as_i64();
        let setup = outcome.merged.iter().filter(of_it).take_while(|line| !after(line)).last();
        let Some(setup) = setup else { continue };
        assert_eq!((&setup["event"], &setup["slba"]), (&"nvme:nvme_setup_cmd".into(), &command["slba"]), "{command}");
        let done = outcome.merged.iter().filter(of_it).find(after).expect("the completion");
        assert_eq!(done["event"], "nvme:nvme_complete_rq", "{command}");
        seen += 1;
    }
    assert!(seen >= 32, "{seen} commands");
}

/// The ring buffer is too small, and the trace says how much it lost.
#[test]
fn lost_events_are_counted() {
    let workload = "trace --buffer 4k + nvme-io --op verify --bs 128k --depth 16 --total 16M --scatter";
    let outcome = Guest::new(NVME, workload).guest_trace().run();
    let lost = outcome.guest_trace.iter().filter(|line| line["kind"] == "lost");
    let counted: u64 = lost.filter_map(|line| line["count"].as_u64()).sum();
    let end = outcome.guest_trace.iter().find(|line| line["kind"] == "end").expect("the agent's last line");
    assert!(counted > 0, "nothing was lost in a ring buffer of 4 KiB: {end}");
    assert_eq!(end["lost"], counted);
    assert_eq!(outcome.results_of("trace").next().unwrap()["lost"], counted);
}

mod patched {
    use super::*;

    /// Checks that a write ends after the device has released its memory: the guest announces the RELEASE alone and at
    /// once, and completes the command when it is answered. A driver that did not wait would leave it to the next write.
    fn assert_released_before_the_end(merged: &[Value], command: usize) {
        let (queue, id) = (&merged[command]["queue"], &merged[command]["id"]);
        let after = &merged[command + 1..];
        let release = after.iter().position(|line| line["type"] == "RELEASE").expect("the RELEASE");
        let kicks = after[..release].iter().filter(|line| line["kind"] == "kick");
        assert_eq!(kicks.map(|kick| &kick["requests"]).collect::<Vec<_>>(), [1], "{:#?}", &after[..=release]);
        let of_it = |line: &&Value| name(line) == "nvme_complete_rq" && line["cid"] == *id && line["qid"] == *queue;
        let end = after.iter().find(of_it).expect("the completion");
        let time = |line: &Value, name: &str| line[name].as_i64().unwrap();
        let latest = time(end, "t") + time(end, "t_error");
        assert!(time(&after[release], "t") <= latest, "{} after {end}", after[release]);
    }

    /// One write from end to end: the guest allocates, links and waits; the device reserves, links, and reads the
    /// memory for the command; the guest destroys, and the device releases, before the write ends.
    #[test]
    fn a_write_is_followed_from_the_allocation_to_the_release() {
        let workload = "trace + nvme-io --op write --bs 128k --depth 1 --total 2M --scatter";
        let outcome = Guest::new(&format!("[iommu]\npolling = false\n{NVME}"), workload)
            .kernel(&patched_kernel())
            .append(&format!("{CLOCK} iommu.strict=1"))
            .guest_trace()
            .run();
        assert_on_one_clock(&outcome);
        let merged = &outcome.merged;
        let is_write = |line: &Value| line["kind"] == "command" && line["opcode"] == "write" && line["len"] == BYTES;
        let writes: Vec<_> = (0..merged.len()).filter(|at| is_write(&merged[*at])).collect();
        assert_eq!(writes.len(), 16);
        for command in writes {
            let events = events_of(merged, command);
            let at =
                |wanted: &str| -> Vec<usize> { (0..events.len()).filter(|at| name(events[*at]) == wanted).collect() };
            let one = |wanted: &str| match at(wanted)[..] {
                [one] => one,
                ref several => panic!("{} times {wanted} in {events:#?}", several.len()),
            };
            let (links, accesses) = (at("dma_iova_link"), at("dma"));
            assert_eq!(links.len(), 32, "{events:#?}");
            let moved: u64 = accesses.iter().filter_map(|at| events[*at]["len"].as_u64()).sum();
            assert_eq!(moved, BYTES, "{events:#?}");
            let order = [
                one("dma_iova_alloc"),
                links[0],
                links[31],
                one("LINK"),
                one("dma_iova_sync"),
                accesses[0],
                accesses[accesses.len() - 1],
                one("dma_iova_destroy"),
                one("RELEASE"),
            ];
            assert!(order.is_sorted(), "{order:?} in {events:#?}");
            assert!(one("RESERVE") < one("LINK"), "{events:#?}");
            assert!(accesses[accesses.len() - 1] < one("command"), "{events:#?}");
            assert!(one("command") < one("RELEASE"), "{events:#?}");
            // The linked memory is the memory that was accessed, and none of it was left.
            let size: u64 = links.iter().filter_map(|at| events[*at]["size"].as_u64()).sum();
            assert_eq!((size, &events[one("RELEASE")]["granules"]), (BYTES, &Value::from(32)));
            assert_released_before_the_end(merged, command);
        }
    }
}
