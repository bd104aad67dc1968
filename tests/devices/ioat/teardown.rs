//! Work that is suspended, reset, or left by its client.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::ioat::setup::*;
use vfio_bindings::bindings::vfio::*;
use viommu_testkit::engine::*;

/// The destination of the test's own copies.
const ELSEWHERE: u64 = 0x300000;

/// Changes the source, and returns its new contents.
fn change(setup: &Setup) -> [u8; 1] {
    let marker = [setup.bytes(DESTINATION, 1)[0].wrapping_add(1)];
    setup.ram.write_all_at(&marker, SOURCE).unwrap();
    marker
}

/// Checks that the engine is at work: a change of its source is copied.
fn assert_copying(setup: &Setup, engine: &mut Engine) {
    let marker = change(setup);
    let begun = Instant::now();
    while setup.bytes(DESTINATION, 1) != marker {
        assert!(begun.elapsed() < Duration::from_secs(60), "the engine does not copy");
        if engine.status() & 7 == DONE {
            // The engine finished all its work while this thread waited for a processor.
            engine.reset_channel();
            setup.start_long_work(engine);
        }
    }
}

/// Checks that the engine is not at work: the test copies as much as the engine does in many descriptors, and a change
/// of the engine's source is not copied.
fn assert_still(setup: &Setup) {
    let marker = change(setup);
    for _ in 0..200 {
        setup.ram.write_all_at(&setup.bytes(SOURCE, LARGEST.into()), ELSEWHERE).unwrap();
        assert_ne!(setup.bytes(DESTINATION, 1), marker, "the engine copies");
    }
}

#[test]
fn suspended_work_stops_and_goes_on() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.start_long_work(&mut engine);
    for _ in 0..5 {
        assert_copying(&setup, &mut engine);
        engine.command(SUSPEND);
        assert_eq!(engine.wait_while(ACTIVE), SUSPENDED);
        assert_still(&setup);
        engine.command(RESUME);
    }
    assert_copying(&setup, &mut engine);
    engine.command(SUSPEND);
    engine.wait_while(ACTIVE);
    engine.ready(u16::MAX);
    assert_copying(&setup, &mut engine);
}

#[test]
fn a_reset_ends_work_for_good() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let resets: [fn(&mut Engine); 3] = [
        Engine::reset_channel,
        |engine| engine.client.reset().unwrap(),
        |engine| {
            // Initiate Function Level Reset, in the PCI Express capability.
            engine.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 0x78, &[0x10, 0x88]).unwrap();
        },
    ];
    for reset in resets.iter().cycle().take(12) {
        engine.enable();
        setup.start_long_work(&mut engine);
        assert_copying(&setup, &mut engine);
        reset(&mut engine);
        // Bus mastering is off after a reset of the function. It is switched on, so that an access would be noticed.
        engine.enable();
        assert_still(&setup);
        assert_eq!(engine.status(), HALTED);
    }
}

#[test]
fn a_client_that_leaves_takes_its_work_with_it() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.start_long_work(&mut engine);
    assert_copying(&setup, &mut engine);
    drop(engine);
    let mut engine = setup.engine();
    assert_still(&setup);
    assert_eq!(engine.copy(SOURCE, DESTINATION, 64), Ok(()));
}
