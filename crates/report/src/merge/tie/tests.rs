use super::*;
use crate::merge::spans::{GuestStep, guest_spans};
use viommu_trace::{Item, TraceFile};

/// Traces in which the host's clock is 1 s ahead. Each I/O takes 100 µs and uses the same tag, address and command
/// identifier. All blocks but the first two differ.
fn lines(count: u64) -> (Vec<String>, Vec<String>) {
    let (mut host, mut guest) = (Vec::new(), Vec::new());
    for n in 0..count {
        let t = 1_000_000 + n * 100_000;
        let (tag, iova, block) = ("0x100000000000007", "0xfffd0000", if n < 2 { 0 } else { n * 8 });
        let mut say =
            |after: u64, text: String| guest.push(format!("{{\"t\":{},\"kind\":\"guest\",{text}}}", t + after));
        say(
            0,
            format!(
                "\"event\":\"nvme:nvme_setup_cmd\",\"endpoint\":32,\"qid\":1,\"cid\":9,\"opcode\":2,\"slba\":{block}"
            ),
        );
        let range = format!("\"cpu\":0,\"iova\":\"{iova}\",\"size\":8192,\"tag\":\"{tag}\"");
        say(5_000, format!("\"event\":\"dma_iova:dma_iova_link\",{range},\"ret\":0"));
        say(9_000, format!("\"event\":\"dma_iova:dma_iova_sync\",{range},\"ret\":0"));
        say(60_000, "\"event\":\"nvme:nvme_complete_rq\",\"endpoint\":32,\"qid\":1,\"cid\":9".into());
        say(70_000, format!("\"event\":\"dma_iova:dma_iova_destroy\",{range}"));
        let mut say = |after: u64, text: String| host.push(format!("{{\"t\":{},{text}}}", t + 1_000_000_000 + after));
        let range = format!(
            "\"seq\":0,\"kind\":\"request\",\"status\":\"OK\",\"domain\":1,\"virt_start\":\"{iova}\",\"virt_end\":\"0xfffd1fff\",\"tag\":\"{tag}\""
        );
        say(8_000, format!("{range},\"type\":\"LINK\",\"extents\":1,\"flags\":\"r\",\"duration_ns\":2000"));
        say(
            50_000,
            format!(
                "\"seq\":0,\"kind\":\"command\",\"endpoint\":32,\"model\":\"nvme\",\"queue\":1,\"opcode\":\"read\",\"id\":9,\"status\":\"0x0\",\"len\":8192,\"duration_ns\":30000,\"slba\":{block}"
            ),
        );
        say(90_000, format!("{range},\"type\":\"RELEASE\",\"granules\":2,\"duration_ns\":1000"));
    }
    (host, guest)
}

fn items(lines: &[String]) -> Vec<Item> {
    let text = lines.join("\n");
    let mut file = TraceFile::new(text.as_bytes()).unwrap();
    std::iter::from_fn(|| Some(file.next_entry().unwrap()?.item)).collect()
}

fn tied(host: &[String], guest: &[String]) -> Option<Tied> {
    let mut spans = HostSpans::new();
    for item in items(host) {
        let Item::Event(event) = item else { panic!("{item:?}") };
        spans.add(&event);
    }
    spans.sort();
    let steps = items(guest).into_iter().filter_map(|item| {
        let Item::Guest(event) = item else { panic!("{item:?}") };
        GuestStep::new(&event)
    });
    tie(&[guest_spans(steps)], &spans).pop().unwrap()
}

#[test]
fn unique_pairs_make_a_clock_with_which_the_others_are_found() {
    let (host, guest) = lines(20);
    let Tied { pairs, clock } = tied(&host, &guest).unwrap();
    // 18 commands are unique; with them 2 commands and 20 LINKs. A RELEASE has no later bound.
    assert_eq!(pairs, 18 + 2 + 20);
    assert_eq!(clock.breaks().count(), 0);
    // The LINK begins 1 µs after the link's event and ends 1 µs before the sync's. The drift adds a little.
    let offset = clock.offset(1_000_000 + 10 * 100_000 + 5_000);
    assert!(offset.value.abs_diff(1_000_000_000) <= 10 && offset.error.unwrap() <= 1_010, "{offset:?}");
}

#[test]
fn a_tag_that_is_unique_is_enough_and_without_anything_there_is_no_clock() {
    let (host, guest) = lines(1);
    let is_dma = |line: &&String| line.contains("tag");
    let only = |lines: &[String]| lines.iter().filter(is_dma).cloned().collect::<Vec<_>>();
    let Tied { pairs, clock } = tied(&only(&host), &only(&guest)).unwrap();
    assert_eq!(pairs, 2);
    assert_eq!(clock.offset(1_005_000).error, Some(1_002));
    assert!(tied(&host, &[]).is_none());
    let (other, _) = lines(3);
    assert!(tied(&other[3..6], &only(&guest)).is_some());
    let untagged: Vec<_> = only(&guest).iter().map(|line| line.replace("0x100000000000007", "0x0")).collect();
    assert!(tied(&host, &untagged).is_none());
}

#[test]
fn a_link_that_another_processor_may_have_posted_bounds_one_side_only() {
    let (host, guest) = lines(1);
    let guest: Vec<_> = guest
        .iter()
        .filter(|line| line.contains("link") || line.contains("sync"))
        .map(|line| if line.contains("sync") { line.replace("\"cpu\":0", "\"cpu\":1") } else { line.clone() })
        .collect();
    assert_eq!(tied(&host, &guest).unwrap().clock.offset(1_005_000).error, None);
}

/// By how much the host's clock is ahead in the steady traces at the guest's time 0, ns.
const AHEAD: u64 = 5_000_000_000;

/// The host's time at a guest's time. The host's clock runs 200 ppm faster.
fn on_host(at: u64) -> u64 {
    at + AHEAD + at / 5_000
}

/// The traces of a queue that is kept full with `count` commands on few blocks. Each step of a command takes up to
/// `jitter` ns longer than the least. Linux counts in the upper four bits of a command identifier how often it was
/// used.
fn steady(count: usize, depth: usize, blocks: usize, jitter: u64) -> (Vec<String>, Vec<String>) {
    let mut random = 1_u64;
    let mut some = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if jitter == 0 { 0 } else { (random >> 33) % jitter }
    };
    let (mut host, mut guest) = (Vec::new(), Vec::new());
    // The time at which each tag is free again.
    let mut free = vec![1_000_000_u64; depth];
    let (mut device, mut uses) = (0, vec![0_usize; depth]);
    for n in 0..count {
        let tag = (0..depth).min_by_key(|tag| free[*tag]).unwrap();
        let (cid, block) = (tag | (uses[tag] % 16) << 12, n % blocks * 8);
        uses[tag] += 1;
        let setup = free[tag] + 1_000 + some();
        let start = device.max(setup + 2_000);
        let end = start + 8_000 + some();
        let done = end + 5_000 + some();
        (device, free[tag]) = (end, done);
        let what = format!("\"endpoint\":32,\"qid\":1,\"cid\":{cid}");
        guest.push((setup, format!("{{\"t\":{setup},\"kind\":\"guest\",\"event\":\"nvme:nvme_setup_cmd\",{what},\"opcode\":2,\"slba\":{block}}}")));
        guest.push((done, format!("{{\"t\":{done},\"kind\":\"guest\",\"event\":\"nvme:nvme_complete_rq\",{what}}}")));
        let (t, duration) = (on_host(end), on_host(end) - on_host(start));
        host.push(format!(
            "{{\"t\":{t},\"seq\":{n},\"kind\":\"command\",\"endpoint\":32,\"model\":\"nvme\",\"queue\":1,\"opcode\":\"read\",\"id\":{cid},\"status\":\"0x0\",\"len\":4096,\"duration_ns\":{duration},\"slba\":{block}}}"
        ));
    }
    guest.sort();
    (host, guest.into_iter().map(|(_, line)| line).collect())
}

fn assert_true(clock: &Clock, at: u64) {
    let found = clock.offset(at);
    let error = found.error.unwrap();
    assert!(found.value.abs_diff((on_host(at) - at) as i64) <= error + 1 && error < 200_000, "{found:?} at {at}");
}

#[test]
fn a_long_steady_trace_in_which_every_key_comes_back_is_tied() {
    for (depth, blocks, jitter) in [(32, 64, 4_000), (32, 1, 4_000), (8, 512, 20_000), (1, 1, 2_000)] {
        let (host, guest) = steady(10_000, depth, blocks, jitter);
        let Tied { pairs, clock } = tied(&host, &guest).unwrap_or_else(|| panic!("{depth} {blocks} {jitter}"));
        assert!(pairs > 9_900, "{pairs} of depth {depth}, {blocks} blocks, jitter {jitter}");
        assert_eq!(clock.breaks().count(), 0);
        (1..50).for_each(|n| assert_true(&clock, 1_000_000 + n * 1_000_000));
    }
}

/// As with buffers of several pieces, of which the device sees one LINK.
#[test]
fn operations_that_the_device_does_not_know_have_no_vote() {
    let (host, guest) = steady(4_000, 1, 64, 4_000);
    let pieces = |line: &String| {
        let Some((t, _)) = line.strip_prefix("{\"t\":").and_then(|rest| rest.split_once(',')) else { panic!("{line}") };
        let t: u64 = t.parse().unwrap();
        let event = |after: u64, name: &str, iova: u64, size: u64| {
            let t = t + after;
            format!(
                "{{\"t\":{t},\"kind\":\"guest\",\"event\":\"dma_iova:dma_iova_{name}\",\"cpu\":0,\"iova\":\"{iova:#x}\",\"size\":{size},\"tag\":\"0x7\",\"ret\":0}}"
            )
        };
        let links = (0..8).map(|piece| event(1 + piece, "link", 0x10000 + piece * 0x1000, 0x1000));
        let is_setup = line.contains("setup");
        links.chain([event(500, "sync", 0x10000, 0x8000)]).filter(|_| is_setup).collect::<Vec<_>>()
    };
    let guest: Vec<_> = guest.iter().flat_map(|line| [vec![line.clone()], pieces(line)].concat()).collect();
    let Tied { pairs, clock } = tied(&host, &guest).unwrap();
    assert!(pairs > 3_900, "{pairs}");
    assert_true(&clock, 30_000_000);
}

#[test]
fn traces_with_missing_parts_are_tied() {
    let (host, guest) = steady(10_000, 32, 64, 4_000);
    // The guest's trace begins late. The device's ends early and lost one event in ten.
    let host: Vec<_> =
        host.iter().take(7_000).enumerate().filter(|(n, _)| n % 10 != 3).map(|(_, line)| line.clone()).collect();
    let Tied { pairs, clock } = tied(&host, &guest[8_000..]).unwrap();
    assert!((2_500..2_701).contains(&pairs), "{pairs}");
    assert_eq!(clock.breaks().count(), 0);
    assert_true(&clock, 50_000_000);
    assert_true(&clock, 60_000_000);
}

#[test]
fn a_clock_that_is_set_in_a_steady_trace_is_tied_again() {
    let (host, guest) = steady(10_000, 32, 64, 4_000);
    const SET: u64 = 60_000_000;
    let set = guest.iter().map(|line| {
        let (t, rest) = line.strip_prefix("{\"t\":").unwrap().split_once(',').unwrap();
        let t: u64 = t.parse().unwrap();
        format!("{{\"t\":{},{rest}", if t < SET { t } else { t + 1_000_000_000 })
    });
    let Tied { pairs, clock } = tied(&host, &set.collect::<Vec<_>>()).unwrap();
    assert!(pairs > 9_800, "{pairs}");
    assert_eq!(clock.breaks().count(), 1);
    assert_true(&clock, SET - 10_000_000);
    let after = clock.offset(SET + 10_000_000 + 1_000_000_000);
    assert!(
        after.value.abs_diff((on_host(SET + 10_000_000) - SET - 10_000_000) as i64 - 1_000_000_000) < 200_000,
        "{after:?}"
    );
}

/// Operations that are all exactly alike cannot be told apart.
#[test]
fn traces_that_are_too_regular_are_not_tied() {
    let (host, guest) = steady(4_000, 1, 1, 0);
    assert!(tied(&host, &guest[2_000..4_000]).is_none());
}
