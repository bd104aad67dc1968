//! `scripts/build-guest-kernel` on a source that is not Linux 6.12: it must say what does not fit, and build nothing.
//! Needs the packages that building a kernel needs, like the guest tests.

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
