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
        // Through the binary record, from which lines are made.
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

fn list(value: &Value) -> Vec<Value> {
    value.as_array().unwrap().clone()
}

fn name(value: &Value) -> String {
    value["name"].as_str().unwrap().to_owned()
}

/// The members that the declarations name, with those of the models.
fn declared() -> BTreeSet<(String, String)> {
    let schema = trace::schema();
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

/// The names of a field, or of a member that a model declares.
fn names(field: &Value) -> Vec<String> {
    match field["names"].as_array() {
        Some(names) => names.iter().map(name).collect(),
        None => vec![name(field)],
    }
}

/// Where the table of kinds has a field with this place: the column, and the words before the field's name.
fn position(place: &Value) -> (usize, String) {
    let number = |key: &str| place[key].as_u64().unwrap();
    let (word, bit, bits) = (number("offset") / 8, number("bit"), number("bits"));
    // s0 and s1 are bytes of the third word; a0 is the fourth word.
    let (column, low) = match (word, bit) {
        (2, 16..24) => (3, bit - 16),
        (2, _) => (4, bit - 24),
        _ => (5, bit),
    };
    let last = low + bits - 1;
    let words = match (column, low, bits) {
        (3 | 4, 0, 8) => String::new(),
        (3 | 4, _, 1) => format!("bit {low} "),
        (3 | 4, ..) => format!("bits {low}-{last} "),
        (_, 0, 64) => format!("a{} ", word - 3),
        (_, 0, 32) => format!("a{}.lo ", word - 3),
        (_, 32, 32) => format!("a{}.hi ", word - 3),
        _ => format!("a{} bits {low}-{last} ", word - 3),
    };
    (column, words)
}

/// Whether a cell has these words, and not as parts of longer words.
fn has(cell: &str, words: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || c == '_';
    cell.match_indices(words)
        .any(|(at, _)| !cell[..at].ends_with(joins) && !cell[at + words.len()..].starts_with(joins))
}

/// Whether a row of the table of kinds has the field in its place, and the values if it lists them.
fn is_shown(row: &[&str], field: &Value) -> bool {
    let names = names(field);
    // A model's members stand for the field that holds them, which has no name.
    let Some(first) = names.first() else { return true };
    let (column, words) = position(&field["place"]);
    let cell = row[column];
    let lists_values = has(cell, &format!("{first}:"));
    let mut values = field["values"].as_array().into_iter().flatten();
    has(cell, &format!("{words}{first}"))
        && names.iter().all(|other| has(cell, other))
        && values.all(|value| !lists_values || has(cell, &format!("{} {}", value["number"], name(value))))
}

#[test]
fn the_documentation_has_every_field_in_its_place() {
    let schema = trace::schema();
    for field in list(&schema["common"]) {
        let at = |key: &str| field["place"][key].as_u64().unwrap();
        let row = format!("| {} | {} | `{}`", at("offset") + at("bit") / 8, at("bits") / 8, name(&field));
        assert!(DOC.contains(&row), "docs/trace.md has no row {row}");
    }
    for kind in list(&schema["kinds"]) {
        let head = format!("| {} | `{}`", kind["number"], name(&kind));
        let rows: Vec<Vec<&str>> = DOC
            .lines()
            .filter(|line| line.starts_with(&head))
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        let own = match name(&kind).as_str() {
            "command" => "command",
            "device" => "state",
            _ => "",
        };
        let mut of_models = Vec::new();
        for model in list(&schema["models"]) {
            of_models.extend(model[own].as_array().cloned().unwrap_or_default());
        }
        for layout in list(&kind["layouts"]) {
            let mut fields = list(&layout["fields"]);
            fields.extend(of_models.clone());
            let mut lacking = Vec::new();
            for row in &rows {
                let absent: Vec<_> = fields.iter().filter(|field| !is_shown(row, field)).flat_map(names).collect();
                lacking.push(absent);
            }
            assert!(lacking.iter().any(Vec::is_empty), "docs/trace.md, {head}: not there, or elsewhere: {lacking:?}");
        }
    }
}
