//! `docs/trace.md` shows what the code writes.

use std::collections::BTreeSet;
use viommu_trace::Kind;

use serde_json::Value;
use viommu_trace::event::{Access, Answer, Channel, LossPlace, ResetKind, Route};
use viommu_trace::{self as trace, Event};
use viommu_wire::model::Model;
use viommu_wire::nvme::DataPointer;
use viommu_wire::{ioat, nvme};

/// One event of each sort that `docs/trace.md` shows, in its order.
fn documented() -> Vec<Event> {
    let request = |request, status, endpoint, domain, flags, [virt_start, virt_end, phys_start]: [u64; 3], duration| {
        Event::Request { request, status, endpoint, domain, flags, virt_start, virt_end, phys_start, duration }
    };
    let split = |request, flags, [virt_start, virt_end]: [u64; 2], tag, count, duration| Event::Split {
        request,
        status: 0,
        domain: 1,
        flags,
        virt_start,
        virt_end,
        tag,
        count,
        duration,
    };
    let nvme = |queue, opcode, id, status, part: nvme::Command, len, duration| Event::Command {
        endpoint: 0x20,
        model: Model::Nvme,
        queue,
        opcode,
        id,
        status,
        len,
        duration,
        part: part.into(),
    };
    let prp = |slba, data| nvme::Command { slba, pointer: DataPointer::Prp, data };
    let dma = |access, route, iova, gpa, len| Event::Dma {
        endpoint: 0x20,
        access,
        route,
        failed: false,
        iova,
        gpa,
        len,
        domain: 1,
        tag: 0,
    };
    let linked = Event::Dma {
        endpoint: 0x20,
        access: Access::Write,
        route: Route::Mapped,
        failed: false,
        iova: 0xfffd_0000,
        gpa: 0x1048_0000,
        len: 8192,
        domain: 1,
        tag: 0x0100_0000_0000_0008,
    };
    vec![
        Event::Session { channel: Channel::VhostUser, endpoint: None, connected: true },
        Event::Session { channel: Channel::VfioUser, endpoint: Some(0x20), connected: true },
        Event::Features { offered: 0x1_3000_0077, accepted: 0x1_3000_0077 },
        Event::Memory {
            channel: Channel::VfioUser,
            endpoint: Some(0x20),
            added: true,
            gpa: 0x10_0000,
            len: 0x7ff0_0000,
            writable: true,
        },
        Event::Queue { queue: 0, started: true, index: 0, size: 256 },
        Event::Kick { queue: 0, requests: 33 },
        request(1, 0, Some(0x20), 1, 0, [0; 3], 1_520),
        request(5, 0, Some(0x20), 0, 0, [0; 3], 410),
        request(3, 0, None, 1, 3, [0xffff_e000, 0xffff_efff, 0x104b_2000], 183),
        request(3, 4, None, 1, 1, [0xffff_e000, 0xffff_efff, 0x104b_2000], 95),
        request(4, 0, None, 1, 0, [0xffff_e000, 0xffff_efff, 0], 240),
        request(2, 0, Some(0x20), 1, 0, [0; 3], 2_210),
        dma(Access::Read, Route::Mapped, 0xffff_e000, 0x104b_2000, 64),
        dma(Access::Write, Route::Msi, 0xfee0_1004, 0xfee0_1004, 4),
        Event::Fault {
            endpoint: 0x20,
            reason: 2,
            access: Access::Write,
            address: 0xdead_b000,
            domain: Some(1),
            dropped: false,
        },
        nvme(0, 0x06, 3, 0, prp(0, 0xffff_c000), 4096, 9_300),
        nvme(1, 0x02, 17, 0, prp(2048, 0xfffd_e000), 131_072, 81_250),
        nvme(1, 0x01, 18, 0x4004, prp(4096, 0xdead_b000), 4096, 7_900),
        Event::Command {
            endpoint: 0x28,
            model: Model::Ioat,
            queue: 0,
            opcode: 0,
            id: 4,
            status: 0,
            len: 2000,
            duration: 3_450,
            part: ioat::Command { source: 0xffff_a000, destination: 0xffff_8000 }.into(),
        },
        Event::Interrupt { endpoint: Some(0x20), vector: 1 },
        Event::Device { endpoint: 0x20, model: Model::Nvme, state: 0x1_0046_0001 },
        Event::Device { endpoint: 0x28, model: Model::Ioat, state: 0x1_0000_0003 },
        Event::Reset { reset: ResetKind::Function, endpoint: Some(0x20) },
        Event::Bypass { value: 0 },
        Event::Malformed { queue: 0, head: 12, readable: 3, writable: 4, used: 0 },
        Event::Panic { endpoint: 0x20 },
        Event::Lost { place: LossPlace::Client, count: 1234, since: 5_000_000_100 },
        split(0x80, 0, [0xfffd_0000, 0xfffe_ffff], 0x0100_0000_0000_0007, 0, 160),
        split(0x81, 2, [0xfffd_0000, 0xfffd_ffff], 0x0100_0000_0000_0008, 5, 420),
        linked,
        split(0x82, 0, [0xfffd_4000, 0xfffd_4fff], 0x0100_0000_0000_0008, 1, 230),
        split(0x83, 0, [0xfffd_0000, 0xfffe_ffff], 0x0100_0000_0000_0007, 15, 610),
        Event::Injected { request: 0x81, answer: Answer::Refused, number: 101 },
        Event::Undelivered { count: 3 },
    ]
}

#[test]
fn the_documentation_shows_every_kind_as_it_is() {
    let doc = include_str!("../../docs/trace.md");
    let (mut json, mut text) = (Vec::new(), Vec::new());
    let events = documented();
    for (n, event) in events.iter().enumerate() {
        let record = event.encode(5_000_001_000 + 1_000 * n as u64, 100 + n as u64);
        trace::json(&record, &mut json).unwrap();
        trace::text(&record, &mut text).unwrap();
    }
    let lines =
        |start: &str| doc.lines().filter(|line| line.starts_with(start)).map(|line| format!("{line}\n")).collect();
    let (shown_json, shown_text): (String, String) = (lines("{\"t\":50000"), lines("    5.0000"));
    let (json, text) = (String::from_utf8(json).unwrap(), String::from_utf8(text).unwrap());
    assert!(shown_json == json, "docs/trace.md should show\n{json}");
    assert!(text.contains(&shown_text) && shown_text.lines().count() >= 5, "docs/trace.md should show of\n{text}");
    let missing = Kind::ALL.iter().find(|kind| !events.iter().any(|event| event.kind() == **kind));
    assert_eq!(missing, None);
    // The tables name every number.
    for kind in Kind::ALL {
        let row = format!("| {} | `{}` |", kind as u16, kind.name());
        assert!(doc.contains(&row), "docs/trace.md has no row {row}");
    }
}

/// The members that the declarations name, with those of the models.
fn declared() -> Vec<(String, String)> {
    let schema = trace::schema();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let mut names = Vec::new();
    for kind in list(&schema["kinds"]) {
        for field in list(&kind["layouts"]).iter().flat_map(|layout| list(&layout["fields"])) {
            names.extend(list(&field["names"]).iter().map(|found| (name(&kind), name(found))));
            names.extend(field["derived"].as_str().map(|derived| (name(&kind), derived.to_owned())));
        }
    }
    for model in list(&schema["models"]) {
        names.extend(list(&model["command"]).iter().map(|member| ("command".into(), name(member))));
        names.extend(list(&model["state"]).iter().map(|member| ("device".into(), name(member))));
    }
    names
}

#[test]
fn the_documentation_shows_every_member_of_the_schema_and_no_other() {
    let doc = include_str!("../../docs/trace.md");
    let mut shown = BTreeSet::new();
    for line in doc.lines().filter(|line| line.starts_with("{\"t\":50000")) {
        let Value::Object(members) = serde_json::from_str(line).unwrap() else { panic!("{line}") };
        let kind = members["kind"].as_str().unwrap().to_owned();
        let own = members.keys().filter(|key| !["t", "seq", "kind", "endpoint", "bdf"].contains(&key.as_str()));
        shown.extend(own.map(|key| (kind.clone(), key.clone())));
    }
    assert_eq!(shown, declared().into_iter().collect());
}
