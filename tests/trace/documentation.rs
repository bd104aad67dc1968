//! `docs/trace.md` shows what the code writes.

use std::collections::BTreeSet;

use serde_json::Value;
use viommu_trace::{self as trace, Item, Kind, Stamped, TraceFile};

const DOC: &str = include_str!("../../docs/trace.md");

/// The events that it shows as lines of JSON.
fn shown() -> Vec<(Stamped, &'static str)> {
    let lines: Vec<_> = DOC.lines().filter(|line| line.starts_with("{\"t\":50000")).collect();
    let text = lines.join("\n");
    let mut trace = TraceFile::new(text.as_bytes()).unwrap();
    let mut events = Vec::new();
    for line in lines {
        match trace.next_entry().unwrap().unwrap().item {
            Item::Event(event) => events.push((event, line)),
            other => panic!("docs/trace.md shows {line}: {other:?}"),
        }
    }
    events
}

fn written(put: impl Fn(&mut Vec<u8>)) -> String {
    let mut line = Vec::new();
    put(&mut line);
    String::from_utf8(line).unwrap()
}

#[test]
fn the_documentation_shows_every_kind_as_it_is() {
    let shown = shown();
    for (n, (event, line)) in (0..).zip(&shown) {
        // By way of the record, which it is made of.
        let event = Stamped::decode(&event.encode()).unwrap();
        assert_eq!(written(|out| event.put_json(out)).trim_end(), *line);
        assert_eq!((event.time_ns, event.seq), (5_000_001_000 + 1_000 * n, 100 + n));
    }
    let text: String = shown.iter().map(|(event, _)| written(|out| event.put_text(out))).collect();
    let shown_text: String =
        DOC.lines().filter(|line| line.starts_with("    5.0000")).map(|line| format!("{line}\n")).collect();
    assert!(text.contains(&shown_text) && shown_text.lines().count() >= 5, "docs/trace.md should show of\n{text}");
    let missing = Kind::ALL.iter().find(|kind| !shown.iter().any(|(event, _)| event.event.kind() == **kind));
    assert_eq!(missing, None, "docs/trace.md shows no event of this kind");
    // The tables name every number.
    for kind in Kind::ALL {
        let row = format!("| {} | `{}` |", kind as u16, kind.name());
        assert!(DOC.contains(&row), "docs/trace.md has no row {row}");
    }
    let schema = trace::schema();
    let hello = format!("{{\"kind\":\"hello\",\"version\":{},", schema["version"]);
    assert!(DOC.contains(&hello) && DOC.contains(&format!("\"record_size\":{}", schema["record_size"])));
}

/// The members that the declarations name, with those of the models.
fn declared() -> BTreeSet<(String, String)> {
    let schema = trace::schema();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let mut names = BTreeSet::new();
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
    let common: Vec<_> =
        trace::schema()["common"].as_array().unwrap().iter().map(|field| field["name"].clone()).collect();
    let mut found = BTreeSet::new();
    for (event, line) in shown() {
        let Value::Object(members) = serde_json::from_str(line).unwrap() else { panic!("{line}") };
        let own = members.keys().filter(|key| *key != "bdf" && !common.iter().any(|common| common == key.as_str()));
        found.extend(own.map(|key| (event.event.kind().name().to_owned(), key.clone())));
    }
    assert_eq!(found, declared());
}
