//! Traces in files: what `viommu trace` prints for good and for bad ones.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use viommu_trace::{self as trace, Header, Record};
use zerocopy::IntoBytes;

/// A trace of version 1 with 182 events.
const RECORDS: &[u8] = include_bytes!("../../crates/trace/tests/version1.bin");
const LINES: &[u8] = include_bytes!("../../crates/trace/tests/version1.jsonl");

fn viommu(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_viommu")).arg("trace").args(arguments).output().unwrap()
}

/// The output and the messages for a file with these bytes.
fn print(bytes: &[u8], arguments: &[&str]) -> (bool, Vec<u8>, String) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a-trace");
    fs::write(&path, bytes).unwrap();
    let output = viommu(&[&["--socket", path.to_str().unwrap()], arguments].concat());
    (output.status.success(), output.stdout, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn the_schema_is_printed() {
    let output = viommu(&["--schema"]);
    assert!(output.status.success());
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), trace::schema());
}

#[test]
fn a_file_of_version_1_is_printed_as_this_version_has_it() {
    let (success, binary, said) = print(RECORDS, &["--format", "binary"]);
    assert!(success && said.is_empty(), "{said}");
    assert_eq!(binary.len(), size_of::<Header>() + 182 * size_of::<Record>());
    let (_, of_records, _) = print(RECORDS, &["--format", "json"]);
    let (_, again, said) = print(&binary, &["--format", "json"]);
    assert!(said.is_empty() && again == of_records, "{said}");
    let of_records: Vec<Value> =
        of_records.split_inclusive(|byte| *byte == b'\n').map(|line| serde_json::from_slice(line).unwrap()).collect();
    assert_eq!((of_records.len(), of_records[0]["version"].as_u64()), (183, Some(2)));
    // Events are filtered as those of a socket are.
    let (_, faults, _) = print(RECORDS, &["--format", "json", "--kind", "fault"]);
    let faults = faults.split_inclusive(|byte| *byte == b'\n').count() - 1;
    assert!(faults > 0);
    assert!(of_records[1..].iter().filter(|line| line["kind"] == "fault" || line["kind"] == "lost").count() == faults);
    // Lines and records give the same text.
    let (of_records, of_lines) = (print(RECORDS, &[]), print(LINES, &[]));
    let events = |text: Vec<u8>| {
        let text = String::from_utf8(text).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(events(of_records.1), events(of_lines.1));
    assert!(of_lines.0 && of_lines.2.is_empty(), "{}", of_lines.2);
}

#[test]
fn unreadable_parts_of_a_file_are_reported() {
    let mut version_3 = RECORDS.to_vec();
    version_3[8] = 3;
    let wrong_size = [&RECORDS[..12], 72u32.as_bytes(), &RECORDS[16..]].concat();
    for (bytes, expected) in [
        (&version_3[..], "format version 3 with records of 64 bytes; this viommu reads versions 1 and 2"),
        (&wrong_size, "format version 1 with records of 72 bytes"),
        (&RECORDS[..40], "cut off in its header: it has 40 of 64 bytes"),
        (b"\xff\xd8\xff\xe0 something else", "starts with [ff, d8, ff, e0"),
        (b"{\"kind\":\"hello\",\"version\":3}\n", "format version 3; this viommu reads versions 1 and 2"),
        (b"This is not a trace.\nNeither is this.\n", "2 could not be: the first of them begins at byte 0"),
    ] {
        let (success, printed, said) = print(bytes, &["--format", "json"]);
        assert!(!success && printed.is_empty() && said.contains(expected), "{said}");
    }
    // The complete part is printed.
    let (_, whole, _) = print(RECORDS, &["--format", "json"]);
    let (success, printed, said) = print(&RECORDS[..RECORDS.len() - 5], &["--format", "json"]);
    assert!(success && whole.starts_with(&printed));
    assert_eq!(printed.split_inclusive(|byte| *byte == b'\n').count(), 182);
    let expected =
        "181 events were read, and 1 could not be: the first of them begins at byte 11648: The trace is cut off";
    assert!(said.contains(expected), "{said}");
    let (_, whole, _) = print(RECORDS, &["--format", "binary"]);
    let (_, printed, _) = print(&RECORDS[..RECORDS.len() - 5], &["--format", "binary"]);
    assert_eq!(printed, whole[..whole.len() - size_of::<Record>()]);
    // A record with a wrong byte is left out, and the records after it are not.
    let mut flipped = RECORDS.to_vec();
    flipped[64 + 17] = 0xff;
    let (success, printed, said) = print(&flipped, &["--format", "json"]);
    assert!(
        success && said.contains("181 events were read, and 1 could not be: the first of them begins at byte 64"),
        "{said}"
    );
    assert_eq!(printed.split_inclusive(|byte| *byte == b'\n').count(), 182);
}

#[test]
fn text_says_what_it_cannot_show() {
    let lines = br#"{"kind":"hello","version":2}
{"t":7000000,"kind":"lost","place":"guest"}
{"t":8000000,"seq":1,"kind":"teleport"}
{"t":9000000,"seq":2,"kind":"lost","place":"client","count":3,"since":1}
"#;
    let (success, printed, said) = print(lines, &[]);
    let printed = String::from_utf8(printed).unwrap();
    let comments: Vec<_> = printed.lines().filter(|line| line.starts_with('#')).skip(1).collect();
    let wanted =
        ["#      0.007000 the guest lost events of its own", "#      0.008000 the kind \"teleport\" is unknown"];
    assert_eq!(comments, wanted, "{printed}");
    assert!(success && printed.contains("count=3"), "{said}");
}
