//! Every row has a test, and `docs/conformance.md` names it.

use std::collections::BTreeMap;
use std::path::Path;

/// The rows of `docs/conformance.md`.
const ROWS: std::ops::RangeInclusive<u32> = 1..=51;

/// The names of all tests `row_NN_...` of this directory, by row.
fn tests_by_row() -> BTreeMap<u32, Vec<String>> {
    let mut tests: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vhost_user/conformance");
    for file in std::fs::read_dir(directory).unwrap() {
        let source = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let lines: Vec<&str> = source.lines().collect();
        for pair in lines.windows(2) {
            let Some(name) = pair[1].strip_prefix("fn row_") else { continue };
            assert_eq!(pair[0], "#[test]", "row_{name} is not a test");
            let (row, _) = name.split_once('_').unwrap();
            let name = format!("row_{}", name.split_once('(').unwrap().0);
            tests.entry(row.parse().unwrap()).or_default().push(name);
        }
    }
    tests
}

#[test]
fn every_row_has_a_test_that_the_documentation_names() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/conformance.md");
    let documentation = std::fs::read_to_string(path).unwrap();
    let tests = tests_by_row();
    assert_eq!(tests.keys().copied().collect::<Vec<_>>(), ROWS.collect::<Vec<_>>());
    for (row, names) in tests {
        let start = format!("| {row} |");
        let line = documentation.lines().find(|line| line.starts_with(&start));
        let line = line.unwrap_or_else(|| panic!("row {row} is not in docs/conformance.md"));
        for name in names {
            assert!(line.contains(&format!("`{name}`")), "docs/conformance.md does not name {name} in row {row}");
        }
    }
}
