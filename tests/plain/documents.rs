//! The documents: each link leads somewhere, and lines are short enough to be read beside code.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// Columns of a line of prose.
const WIDTH: usize = 100;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The project's documents.
fn documents() -> Vec<PathBuf> {
    let entries = |folder: PathBuf| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let patches = root().join("guest-kernel-patches");
    let series = entries(patches.clone()).filter(|path| path.is_dir());
    let folders = [root().to_owned(), root().join("docs"), patches].into_iter().chain(series);
    let files: Vec<_> = folders.flat_map(entries).filter(|file| file.extension().is_some_and(|e| e == "md")).collect();
    assert!(files.iter().any(|file| file.ends_with("docs/trace.md")), "{files:?}");
    files
}

/// The names of a document's headings in links, and the targets of its own links.
fn read(file: &Path) -> (HashSet<String>, Vec<String>) {
    let text = fs::read_to_string(file).unwrap();
    let (mut headings, mut links) = (HashSet::new(), Vec::new());
    let mut heading = None;
    for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => {
                headings.extend(heading.take().as_deref().map(anchor));
            }
            Event::Text(text) | Event::Code(text) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&text);
                }
            }
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => links.push(dest_url.to_string()),
            _ => {}
        }
    }
    (headings, links)
}

/// The name that a heading has in a link: its words in lower case with hyphens between them.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

#[test]
fn each_link_between_documents_leads_to_what_is_there() {
    let documents: HashMap<_, _> = documents().into_iter().map(|file| (file.clone(), read(&file))).collect();
    let mut broken = Vec::new();
    for (file, (headings, links)) in &documents {
        for link in links.iter().filter(|link| !link.contains("://")) {
            let (path, fragment) = link.split_once('#').map_or((link.as_str(), None), |(path, at)| (path, Some(at)));
            let target = file.parent().unwrap().join(path).canonicalize();
            let good = match (path, fragment) {
                ("", Some(fragment)) => headings.contains(fragment),
                (_, None) => target.is_ok(),
                (_, Some(fragment)) => {
                    target.is_ok_and(|to| documents.get(&to).is_some_and(|d| d.0.contains(fragment)))
                }
            };
            if !good {
                broken.push(format!("{}: {link}", file.display()));
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere: {broken:#?}");
}

/// Documents name files and folders in code spans, which become wrong as easily as links.
#[test]
fn each_file_that_a_document_names_is_there() {
    let folders = [
        "src/",
        "crates/",
        "docs/",
        "scripts/",
        "tests/",
        "benches/",
        "fuzz/",
        "qemu-configs/",
        "guest-kernel-patches/",
    ];
    let mut missing = Vec::new();
    for file in documents().iter().filter(|file| !file.ends_with("CHANGELOG.md")) {
        let text = fs::read_to_string(file).unwrap();
        for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
            let Event::Code(code) = event else { continue };
            let path = code.split([' ', ':']).next().unwrap();
            let named = folders.iter().any(|folder| path.starts_with(folder)) && !path.contains(['*', '{', '<', '$']);
            if named && !root().join(path).exists() {
                missing.push(format!("{}: {path}", file.display()));
            }
        }
    }
    assert!(missing.is_empty(), "not there: {missing:#?}");
}

/// Tables, commands and their output may be as wide as they have to be.
#[test]
fn prose_is_wrapped() {
    let mut long = Vec::new();
    for file in documents() {
        let text = fs::read_to_string(&file).unwrap();
        let verbatim: Vec<_> = Parser::new_ext(&text, Options::ENABLE_TABLES)
            .into_offset_iter()
            .filter(|(event, _)| matches!(event, Event::Start(Tag::CodeBlock(_) | Tag::Table(_))))
            .map(|(_, range)| range)
            .collect();
        let mut at = 0;
        for (number, line) in text.split_inclusive('\n').enumerate() {
            let prose = !verbatim.iter().any(|range| range.contains(&at) || range.contains(&(at + line.len() - 1)));
            if prose && line.trim_end().chars().count() > WIDTH {
                long.push(format!("{}:{}", file.display(), number + 1));
            }
            at += line.len();
        }
    }
    assert!(long.is_empty(), "lines of more than {WIDTH} columns: {long:#?}");
}
