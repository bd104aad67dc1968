//! The folder of a guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

/// All sockets, images and logs of a guest and of its daemon are in it and nowhere else, so that any number of guests
/// can run at once. Clones are the same folder.
#[derive(Clone)]
pub struct Folder(Arc<Place>);

enum Place {
    Temporary(TempDir),
    Kept(PathBuf),
}

impl Default for Folder {
    fn default() -> Folder {
        Folder::new()
    }
}

impl Folder {
    /// A temporary folder, which is removed with its last user.
    pub fn new() -> Folder {
        Folder(Arc::new(Place::Temporary(tempfile::tempdir().unwrap())))
    }

    /// The same in memory if possible, so that the disk and other writes to it have no effect.
    pub fn in_memory() -> Folder {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Folder(Arc::new(Place::Temporary(folder.unwrap())))
    }

    /// A folder below the checkout that is emptied first, and stays.
    pub fn kept(path: impl AsRef<Path>) -> Folder {
        let path = super::root().join(path);
        // It may not exist.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Folder(Arc::new(Place::Kept(path)))
    }

    pub fn path(&self) -> &Path {
        match &*self.0 {
            Place::Temporary(folder) => folder.path(),
            Place::Kept(path) => path,
        }
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.join(name), contents).unwrap();
    }

    /// The contents of a file, or nothing if there is none.
    pub fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.join(name)).unwrap_or_default()).into_owned()
    }

    /// The JSON lines of a file. The last line is left out if it is not complete yet.
    pub fn lines(&self, name: &str) -> Vec<serde_json::Value> {
        self.read(name).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}
