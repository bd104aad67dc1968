//! `scripts/build-guest-kernel` on a source that is not Linux 6.12: it must say what does not fit, and build nothing.
//! Needs the packages that building a kernel needs, like the guest tests. And what is said of the series: it is this one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A checkout that has just the scripts and the series, so that no other's kernel tree is touched.
fn checkout() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for part in ["scripts", "guest-kernel-patches/linux-6.12"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(part);
        let to = folder.path().join(part);
        fs::create_dir_all(&to).unwrap();
        for file in fs::read_dir(from).unwrap().map(Result::unwrap) {
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    folder
}

fn build(checkout: &Path, source: &Path) -> Output {
    let script = checkout.join("scripts/build-guest-kernel");
    let cache = checkout.join("cache");
    Command::new(script).arg("--source").arg(source).env("VIOMMU_CACHE", cache).output().unwrap()
}

/// Asserts that it failed with these words, and printed no folder.
fn assert_refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in:\n{said}");
    }
}

#[test]
fn another_linux_is_refused_with_patch_and_files() {
    let checkout = checkout();
    let source = checkout.path().join("linux-6.1");
    fs::create_dir_all(source.join("drivers/iommu")).unwrap();
    fs::write(source.join("Makefile"), "VERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 192\n").unwrap();
    // One file that the first patch wants is different, the other is not there.
    fs::write(source.join("drivers/iommu/iommu.c"), "int iommu_map(void);\n").unwrap();
    let output = build(checkout.path(), &source);
    assert_refused(
        &output,
        &[
            "The series does not apply to this source.",
            "Patch:  0001-iommu-Split-iommu_map-into-mapping-and-syncing.patch",
            "File:   drivers/iommu/iommu.c include/linux/iommu.h (not there)",
            "Source: Linux 6.1.192, from ",
            "Wanted: Linux 6.12",
        ],
    );
    let objects = checkout.path().join(".kernel/own/objects");
    assert_eq!(fs::read_dir(objects).unwrap().count(), 0, "nothing was built");
}

#[test]
fn a_source_that_is_not_there_is_refused() {
    let checkout = checkout();
    let output = build(checkout.path(), &checkout.path().join("nowhere"));
    assert_refused(&output, &["There is no source tree", "nowhere", "Wanted: a folder with the source of Linux 6.12"]);
}

/// Lines that a patch adds and removes.
fn lines_of(patch: &str) -> (usize, usize) {
    let (_, diff) = patch.split_once("\ndiff --git ").unwrap();
    // Behind the signature's mark there is no diff any more.
    let (diff, _) = diff.split_once("\n-- \n").unwrap_or((diff, ""));
    let count = |sign: &str, of_file: &str| {
        diff.lines().filter(|line| line.starts_with(sign) && !line.starts_with(of_file)).count()
    };
    (count("+", "+++ "), count("-", "--- "))
}

#[test]
fn what_is_said_of_the_series_is_so() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-kernel-patches/linux-6.12");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let names = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut patches: Vec<String> = names.filter(|name| name.ends_with(".patch")).collect();
    patches.sort();
    let cover = read(&patches.remove(0));
    assert!(cover.contains(&format!("[PATCH 6.12 00/{}]", patches.len())), "the cover letter's subject");
    let readme = read("README.md");
    let range = format!("00{{01..{:02}}}-*.patch", patches.len());
    assert!(readme.contains(&range), "README.md: {range}");
    let rows: Vec<&str> = readme.lines().filter(|line| line.ends_with(" |") && line.contains(" | +")).collect();
    assert_eq!(rows.len(), patches.len(), "README.md: a row for each patch");
    for (number, (name, row)) in (1..).zip(patches.iter().zip(rows)) {
        let patch = read(name);
        assert!(patch.contains(&format!("[PATCH 6.12 {number:02}/{}]", patches.len())), "{name}");
        let (added, removed) = lines_of(&patch);
        let wanted = format!("| +{added} -{removed} |");
        assert!(row.starts_with(&format!("| {number} | ")) && row.ends_with(&wanted), "{name}: {wanted}, found {row}");
    }
}
