//! The walls between modules: which module may import which.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules of the crate, and the crates of [`CRATES`], that a module may import besides itself and [`SYNC`]. `cli`
/// may import everything.
const MAY_IMPORT: [(&str, &[&str]); 11] = [
    ("sandbox", &[]),
    ("poller", &[]),
    ("iommu", &["wire", "trace"]),
    ("memory", &[]),
    ("dma", &["iommu", "trace", "memory"]),
    ("vhost", &["wire", "trace", "iommu", "memory", "poller", "socket"]),
    ("vfio_user", &[]),
    ("pci", &["trace", "iommu", "dma", "memory", "poller", "socket", "vfio_user"]),
    ("devices", &["wire", "trace", "dma", "poller", "pci"]),
    ("topology", &["wire", "iommu", "vhost", "devices"]),
    ("daemon", &["trace", "dma", "devices", "iommu", "pci", "socket", "topology", "vhost"]),
];

/// Locks, which every module may use.
const SYNC: &str = "sync";

/// The crates of the workspace that the library uses: `trace` is `viommu_trace`.
const CRATES: [&str; 4] = ["report", "socket", "trace", "wire"];

/// Crates that only one module may use.
const ONLY_IN: [(&str, &str); 6] = [
    ("vhost", "vhost"),
    ("vhost_user_backend", "vhost"),
    ("virtio_queue", "vhost"),
    ("vfio_bindings", "pci"),
    ("landlock", "sandbox"),
    ("seccompiler", "sandbox"),
];

/// The source files below a path.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|entry| files(&entry)).filter(|file| file.extension().is_some_and(|e| e == "rs")).collect()
}

/// The modules of the library, each with the text of its files up to their unit tests, which may import anything.
fn modules() -> Vec<(String, Vec<(PathBuf, String)>)> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let library = fs::read_to_string(source.join("lib.rs")).unwrap();
    let names = library.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let text = |file: PathBuf| {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned();
        (file, code)
    };
    let module = |name: &str| {
        let path = source.join(name);
        let path = if path.is_dir() { path } else { source.join(format!("{name}.rs")) };
        let code = files(&path).into_iter().filter(|file| !file.ends_with("tests.rs")).map(text);
        (name.to_owned(), code.collect())
    };
    names.map(module).collect()
}

/// The names that follow `prefix` in a text.
fn names_after<'t>(text: &'t str, prefix: &'t str) -> impl Iterator<Item = &'t str> {
    let end = |rest: &str| rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    text.match_indices(prefix).map(move |(at, _)| {
        let rest = &text[at + prefix.len()..];
        &rest[..end(rest)]
    })
}

#[test]
fn no_module_imports_what_it_must_not_know() {
    let modules = modules();
    let known: Vec<&str> = MAY_IMPORT.iter().map(|(name, _)| *name).chain(["cli"]).collect();
    for (module, files) in &modules {
        assert!(known.contains(&module.as_str()), "say in this test what {module} may import");
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| name == module) else { continue };
        for (file, text) in files {
            assert!(!text.contains("crate::{"), "{}: this test reads `crate::module`", file.display());
            for name in names_after(text, "crate::") {
                assert!(name == module || name == SYNC || allowed.contains(&name), "{} imports {name}", file.display());
            }
            for name in CRATES {
                let imported = text.contains(&format!("viommu_{name}::"));
                assert!(!imported || allowed.contains(&name), "{} imports viommu_{name}", file.display());
            }
        }
    }
    assert_eq!(modules.len(), known.len());
}

#[test]
fn one_module_alone_knows_each_protocol() {
    for (module, files) in modules() {
        for (file, text) in files {
            for name in names_after(&text, "\nuse ") {
                let owner = ONLY_IN.iter().find(|(of, _)| *of == name).map(|(_, owner)| *owner);
                assert!(owner.is_none_or(|owner| owner == module), "{} imports {name}", file.display());
            }
        }
    }
}

/// The files that may name a model: its own; those of the structures on the wire; the guest and tests; and the code
/// that ties the guest's clock to the host's by the events that both have of the same commands.
const MAY_NAME_MODELS: [&str; 5] =
    ["src/devices", "crates/wire", "crates/guest", "crates/testkit", "crates/report/src/merge"];

#[test]
fn nobody_else_names_a_model() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let allowed = |file: &Path| MAY_NAME_MODELS.iter().any(|folder| file.starts_with(root.join(folder)));
    let is_test = |file: &Path| file.ends_with("tests.rs") || file.components().any(|part| part.as_os_str() == "tests");
    let all = [files(&root.join("src")), files(&root.join("crates"))].concat();
    let others: Vec<_> = all.iter().filter(|file| !allowed(file) && !is_test(file)).collect();
    assert!(others.len() > 50, "{} files", others.len());
    for file in others {
        let text = fs::read_to_string(file).unwrap().to_ascii_lowercase();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for name in ["nvme", "ioat"] {
            assert!(!code.contains(name), "{} names {name}", file.display());
        }
    }
}
