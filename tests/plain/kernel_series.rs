//! The kernel series: `scripts/build-guest-kernel` on a source that is not Linux 6.12 must say what does not fit, and
//! build nothing; the documents describe the series as it is; and `scripts/series` makes patch files of the commits of
//! a small series, and commits of the files. Needs the packages for building a kernel, like the guest tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A checkout with only the scripts, the series and a driver, so that no other checkout's kernel tree is touched.
fn checkout() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for part in ["scripts", "guest-kernel-patches/linux-6.12", "guest-kernel-patches/modules/iova_test"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(part);
        let to = folder.path().join(part);
        fs::create_dir_all(&to).unwrap();
        for file in fs::read_dir(from).unwrap().map(Result::unwrap) {
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    folder
}

/// A checkout whose series has no patches yet, and a source of two files for it.
fn empty_series() -> TempDir {
    let checkout = checkout();
    let series = checkout.path().join("guest-kernel-patches/linux-6.12");
    for file in fs::read_dir(&series).unwrap().map(Result::unwrap) {
        fs::remove_file(file.path()).unwrap();
    }
    let cover =
        "From 0\nSubject: [PATCH 6.12 0/0] Letters\n\nA letter (or more):\n  kept as it is\n\nNobody (0):\n  gone\n";
    fs::write(series.join("0000-cover-letter.patch"), cover).unwrap();
    let readme = "`git am 00{01..00}-*`\n\n| # | what | why | lines |\n|---|---|---|---|\n\nThe end.\n";
    fs::write(series.join("README.md"), readme).unwrap();
    let source = checkout.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("Makefile"), "VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 0\n").unwrap();
    for name in ["a.c", "b.c"] {
        fs::write(source.join(name), "int f(void)\n{\n\treturn 0;\n}\n").unwrap();
    }
    checkout
}

/// The files of the series and their contents.
fn series_files(checkout: &Path) -> BTreeMap<String, String> {
    let files = fs::read_dir(checkout.join("guest-kernel-patches/linux-6.12")).unwrap().map(Result::unwrap);
    files.map(|file| (file.file_name().into_string().unwrap(), fs::read_to_string(file.path()).unwrap())).collect()
}

fn series(checkout: &Path, arguments: &[&str]) -> Output {
    let script = checkout.join("scripts/series");
    Command::new(script).args(arguments).env("VIOMMU_CACHE", checkout.join("cache")).output().unwrap()
}

/// The tree with the series as commits.
fn edit(checkout: &Path) -> PathBuf {
    let output = series(checkout, &["edit", "6.12", "--source", checkout.join("source").to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
}

/// Writes the commits back, and returns the script's messages.
fn export(checkout: &Path) -> String {
    let output = series(checkout, &["export", "6.12"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

fn git(tree: &Path, arguments: &[&str]) {
    let mut command = Command::new("git");
    command.arg("-C").arg(tree).args(["-c", "user.name=A. Hacker", "-c", "user.email=a@example.org"]).args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A commit with this subject, which adds a line to a file.
fn commit(tree: &Path, subject: &str, file: &str) {
    let before = fs::read_to_string(tree.join(file)).unwrap();
    fs::write(tree.join(file), format!("{before}/* {subject} */\n")).unwrap();
    git(tree, &["commit", "-qam", subject]);
}

#[test]
fn commits_become_patch_files_and_come_back() {
    let checkout = empty_series();
    let checkout = checkout.path();
    let tree = edit(checkout);
    commit(&tree, "a: First", "a.c");
    commit(&tree, "b: Second", "b.c");
    export(checkout);
    let files = series_files(checkout);
    let names = ["0000-cover-letter.patch", "0001-a-First.patch", "0002-b-Second.patch", "README.md"];
    assert_eq!(files.keys().collect::<Vec<_>>(), names);
    assert!(files["0002-b-Second.patch"].contains("\nSubject: [PATCH 6.12 2/2] b: Second\n"));
    assert_eq!(
        files["README.md"],
        "`git am 00{01..02}-*`\n\n| # | what | why | lines |\n|---|---|---|---|\n\
         | 1 | a: First | | +1 -0 |\n| 2 | b: Second | | +1 -0 |\n\nThe end.\n"
    );
    assert_eq!(
        files["0000-cover-letter.patch"],
        "From 0\nSubject: [PATCH 6.12 0/2] Letters\n\nA letter (or more):\n  kept as it is\n\n\
         A. Hacker (2):\n  a: First\n  b: Second\n\n \
         a.c | 1 +\n b.c | 1 +\n 2 files changed, 2 insertions(+)\n\n"
    );
    // Nothing is written if nothing has changed, whether the tree is made again or not.
    fs::remove_dir_all(&tree).unwrap();
    for _ in 0..2 {
        assert_eq!(edit(checkout), tree);
        assert_eq!((export(checkout).as_str(), series_files(checkout)), ("", files.clone()));
    }
}

#[test]
fn commits_that_move_take_their_numbers_and_rows_along() {
    let checkout = empty_series();
    let checkout = checkout.path();
    let tree = edit(checkout);
    for (subject, file) in [("a: First", "a.c"), ("b: Second", "b.c"), ("a: Third", "a.c")] {
        commit(&tree, subject, file);
    }
    export(checkout);
    let readme = checkout.join("guest-kernel-patches/linux-6.12/README.md");
    let said = series_files(checkout)["README.md"]
        .replace("a: First | |", "first | one |")
        .replace("b: Second | |", "second | two |")
        .replace("a: Third | |", "third | three |");
    fs::write(&readme, said).unwrap();
    // The second commit moves to the front, the first is dropped, the third gets another subject, and there is a new
    // one.
    git(&tree, &["tag", "old"]);
    git(&tree, &["reset", "-q", "--hard", "origin"]);
    git(&tree, &["cherry-pick", "old~1"]);
    commit(&tree, "b: New", "b.c");
    git(&tree, &["cherry-pick", "--strategy-option=theirs", "old"]);
    git(&tree, &["commit", "-q", "--amend", "-m", "a: Last"]);
    // Work that was not exported is not lost.
    assert_eq!(edit(checkout), tree);
    fs::write(tree.join("b.c"), "").unwrap();
    assert_refused(&series(checkout, &["export", "6.12"]), &["The tree has changes that are not committed."]);
    git(&tree, &["checkout", "-q", "b.c"]);
    export(checkout);
    let files = series_files(checkout);
    let names =
        ["0000-cover-letter.patch", "0001-b-Second.patch", "0002-b-New.patch", "0003-a-Last.patch", "README.md"];
    assert_eq!(files.keys().collect::<Vec<_>>(), names);
    for (name, number) in names[1..4].iter().zip(1..) {
        assert!(files[*name].contains(&format!("[PATCH 6.12 {number}/3]")), "{name}");
    }
    let rows: Vec<_> = files["README.md"].lines().filter(|line| line.contains(" | +")).collect();
    assert_eq!(rows, ["| 1 | second | two | +1 -0 |", "| 2 | b: New | | +1 -0 |", "| 3 | third | three | +2 -0 |"]);
}

fn build(checkout: &Path, source: &Path) -> Output {
    let script = checkout.join("scripts/build-guest-kernel");
    let cache = checkout.join("cache");
    Command::new(script).args(["--series", "6.12", "--source"]).arg(source).env("VIOMMU_CACHE", cache).output().unwrap()
}

/// Checks that it failed with these words, and printed no folder.
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
    // One of the files that the first patch changes is different, and the other does not exist.
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
    let objects = checkout.path().join(".kernel/6.12/own/objects");
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
    // The diff ends at the signature's mark.
    let (diff, _) = diff.split_once("\n-- \n").unwrap_or((diff, ""));
    let count = |sign: &str, of_file: &str| {
        diff.lines().filter(|line| line.starts_with(sign) && !line.starts_with(of_file)).count()
    };
    (count("+", "+++ "), count("-", "--- "))
}

#[test]
fn the_documents_describe_each_series_as_it_is() {
    for linux in ["6.12", "7.3"] {
        documents_describe(linux);
    }
}

fn documents_describe(linux: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("guest-kernel-patches/linux-{linux}"));
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let names = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut patches: Vec<String> = names.filter(|name| name.ends_with(".patch")).collect();
    patches.sort();
    let cover = read(&patches.remove(0));
    assert!(cover.contains(&format!("[PATCH {linux} 00/{}]", patches.len())), "{linux}: the cover letter's subject");
    let readme = read("README.md");
    let range = format!("00{{01..{:02}}}-*.patch", patches.len());
    assert!(readme.contains(&range), "{linux}: README.md: {range}");
    let rows: Vec<&str> = readme.lines().filter(|line| line.ends_with(" |") && line.contains(" | +")).collect();
    assert_eq!(rows.len(), patches.len(), "{linux}: README.md: a row for each patch");
    for (number, (name, row)) in (1..).zip(patches.iter().zip(rows)) {
        let patch = read(name);
        assert!(patch.contains(&format!("[PATCH {linux} {number:02}/{}]", patches.len())), "{name}");
        let (added, removed) = lines_of(&patch);
        let wanted = format!("| +{added} -{removed} |");
        assert!(row.starts_with(&format!("| {number} | ")) && row.ends_with(&wanted), "{name}: {wanted}, found {row}");
    }
}

#[test]
fn each_driver_is_a_folder_that_the_readme_names() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-kernel-patches/modules");
    let readme = fs::read_to_string(folder.join("README.md")).unwrap();
    let rows: BTreeSet<_> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("/` |"))
        .map(|(name, _)| name.to_owned())
        .collect();
    let entries = fs::read_dir(&folder).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_dir());
    let drivers: BTreeSet<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert_eq!(rows, drivers);
    assert!(!drivers.is_empty());
    for driver in drivers {
        for file in fs::read_dir(folder.join(&driver)).unwrap().map(|file| file.unwrap().path()) {
            let text = fs::read_to_string(&file).unwrap();
            assert!(text.lines().next().unwrap().contains("SPDX-License-Identifier: GPL-2.0"), "{}", file.display());
        }
        let module = format!("obj-m := {driver}.o");
        assert!(
            fs::read_to_string(folder.join(&driver).join("Kbuild")).unwrap().contains(&module),
            "{driver}: {module}"
        );
    }
}
