//! The protocol between readers, the writer and the freeing of tables, in all orders that the memory model allows:
//! `RUSTFLAGS="--cfg loom" cargo test --release --lib loom_`
//!
//! Each [`super::node::Node`] has a cell that every access reads and freeing writes. So the checker fails a run in
//! which a reader may still use a table when it is freed.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::thread;

use super::{AddressSpace, Budget, Mapping, Run};
use crate::iommu::grace::{Grace, Reader};
use viommu_wire::virtio_iommu::MapFlags;

const PAGE: u64 = 4096;

/// The state that the threads share: an address space, and whether the removal of page 0's mapping is acknowledged.
struct Shared {
    grace: Arc<Grace>,
    space: AddressSpace,
    gone: AtomicBool,
}

impl Shared {
    /// Page 0 leads to 0xa000; page 1 is mapped too, so that there is a table.
    fn new() -> Arc<Self> {
        let grace = Grace::new();
        let space = AddressSpace::new(grace.clone(), Budget::new(u64::MAX));
        space.map(0, PAGE - 1, 0xa000, MapFlags::READ).unwrap();
        space.map(PAGE, 2 * PAGE - 1, 0xc000, MapFlags::READ).unwrap();
        Arc::new(Shared { grace, space, gone: AtomicBool::new(false) })
    }

    /// One section that translates page 0 and uses the result.
    fn read(&self, reader: &mut Reader) -> Option<Mapping> {
        let guard = reader.enter();
        let found = self.space.lookup(&guard, 0);
        if found.is_some_and(|found| found.phys == 0xa000) {
            assert!(!self.gone.load(Relaxed), "a removed translation is used");
        }
        found
    }

    /// Completes a removal: from now on no reader may use page 0's translation.
    fn remove(&self) {
        self.unmap();
        self.grace.synchronize();
        self.gone.store(true, Relaxed);
    }

    /// Removes both pages, each by itself. No table stays idle in the model, so the table is unlinked and retired.
    fn unmap(&self) {
        for start in [0, PAGE] {
            assert_eq!(self.space.unmap(start, start + PAGE - 1).unwrap().mappings, 1);
        }
        assert_eq!(self.space.bytes(), 0);
    }
}

/// Runs a reader in a thread of its own against a writer that removes page 0, in all orders.
fn check_reader(
    read: impl Fn(&Shared, Reader) + Copy + Sync + Send + 'static,
    remove: impl Fn(&Shared) + Sync + Send + 'static,
) {
    check(move || {
        let shared = Shared::new();
        let reader = shared.grace.reader();
        let thread = thread::spawn({
            let shared = shared.clone();
            move || read(&shared, reader)
        });
        remove(&shared);
        thread.join().unwrap();
    });
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn loom_a_removed_translation_is_not_used_and_its_table_not_freed_early() {
    let read = |shared: &Shared, mut reader: Reader| {
        shared.read(&mut reader);
        shared.read(&mut reader);
    };
    check_reader(read, Shared::remove);
}

#[test]
fn loom_two_readers_and_a_new_mapping_at_the_same_address() {
    check(|| {
        let shared = Shared::new();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (shared, mut reader) = (shared.clone(), shared.grace.reader());
                thread::spawn(move || {
                    let found = shared.read(&mut reader).map(|found| found.phys);
                    assert!(matches!(found, None | Some(0xa000 | 0xb000)));
                })
            })
            .collect();
        shared.remove();
        shared.space.map(0, PAGE - 1, 0xb000, MapFlags::READ).unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
        let mut reader = shared.grace.reader();
        assert_eq!(shared.read(&mut reader).unwrap().phys, 0xb000);
    });
}

/// One thread may free what another retired, when it synchronizes for its own reasons. (That thread has no reader to
/// wait for: two threads that spin for the same one keep the checker busy for ever.)
#[test]
fn loom_two_synchronize_at_once() {
    let read = |shared: &Shared, mut reader: Reader| {
        shared.read(&mut reader);
        shared.grace.synchronize();
        shared.read(&mut reader);
    };
    check_reader(read, Shared::remove);
}

/// A reader that comes and one that goes while the writer waits.
#[test]
fn loom_readers_register_and_unregister() {
    let read = |shared: &Shared, mut early: Reader| {
        shared.read(&mut early);
        drop(early);
        let mut late = shared.grace.reader();
        shared.read(&mut late);
    };
    check_reader(read, Shared::remove);
}

/// A lone page becomes a table while it is read.
#[test]
fn loom_a_second_page_does_not_disturb_the_first() {
    check(|| {
        let grace = Grace::new();
        let space = Arc::new(AddressSpace::new(grace.clone(), Budget::new(u64::MAX)));
        space.map(0, PAGE - 1, 0xa000, MapFlags::READ).unwrap();
        assert_eq!(space.bytes(), 0);
        let mut reader = grace.reader();
        let thread = thread::spawn({
            let space = space.clone();
            move || {
                for _ in 0..2 {
                    let guard = reader.enter();
                    assert_eq!(space.lookup(&guard, 0).unwrap().phys, 0xa000);
                    let second = space.lookup(&guard, PAGE).map(|found| found.phys);
                    assert!(matches!(second, None | Some(0xc000)));
                }
            }
        });
        space.map(PAGE, 2 * PAGE - 1, 0xc000, MapFlags::READ).unwrap();
        assert_ne!(space.bytes(), 0);
        thread.join().unwrap();
    });
}

/// Shows that the models above can fail: without a grace period they do.
#[test]
#[should_panic(expected = "a removed translation is used")]
fn loom_finds_a_missing_grace_period() {
    let read = |shared: &Shared, mut reader: Reader| {
        shared.read(&mut reader);
    };
    let remove = |shared: &Shared| {
        shared.unmap();
        shared.gone.store(true, Relaxed);
    };
    check_reader(read, remove);
}

/// They also fail when the table is freed at once.
#[test]
#[should_panic(expected = "Causality violation")]
fn loom_finds_a_table_that_is_freed_early() {
    let read = |shared: &Shared, mut reader: Reader| {
        let guard = reader.enter();
        let _ = shared.space.lookup(&guard, 0);
    };
    let remove = |shared: &Shared| {
        shared.unmap();
        shared.grace.drop_garbage_at_once();
    };
    check_reader(read, remove);
}

/// A page is linked, unlinked and linked again while it is read, and its table becomes a tagged one meanwhile. Target
/// and tag belong together, and the neighbouring page stays.
#[test]
fn loom_a_tag_is_that_of_its_link() {
    check(|| {
        let grace = Grace::new();
        let space = Arc::new(AddressSpace::new(grace.clone(), Budget::new(u64::MAX)));
        space.map(0, PAGE - 1, 0xa000, MapFlags::READ).unwrap();
        space.map(PAGE, 2 * PAGE - 1, 0xc000, MapFlags::READ).unwrap();
        space.unmap(0, PAGE - 1).unwrap();
        let mut reader = grace.reader();
        let thread = thread::spawn({
            let space = space.clone();
            move || {
                let guard = reader.enter();
                let found = space.lookup(&guard, 0).map(|found| (found.phys, found.tag));
                assert!(matches!(found, None | Some((0xd000, 1) | (0xe000, 2))), "{found:x?}");
                let second = space.lookup(&guard, PAGE).map(|found| (found.phys, found.tag));
                assert_eq!(second, Some((0xc000, 0)));
            }
        });
        for (phys, tag) in [(0xd000, 1), (0xe000, 2)] {
            space.link(0, std::iter::once(Run { phys, pages: 1 }), MapFlags::READ, tag).unwrap();
            if tag == 1 {
                space.unmap(0, PAGE - 1).unwrap();
            }
        }
        grace.synchronize();
        thread.join().unwrap();
    });
}
