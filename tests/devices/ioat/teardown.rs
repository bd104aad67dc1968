//! Work that is suspended, reset, or left by its client.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::ioat::setup::*;
use vfio_bindings::bindings::vfio::*;
use viommu_testkit::engine::*;

/// Where the test itself copies to.
const ELSEWHERE: u64 = 0x300000;

/// Changes the source; what it is now.
fn change(setup: &Setup) -> [u8; 1] {
    let marker = [setup.bytes(DESTINATION, 1)[0].wrapping_add(1)];
    setup.ram.write_all_at(&marker, SOURCE).unwrap();
    marker
}

/// The engine is at work: what changes at its source is copied.
fn assert_copying(setup: &Setup, engine: &mut Engine) {
    let marker = change(setup);
    let begun = Instant::now();
    while setup.bytes(DESTINATION, 1) != marker {
        assert!(begun.elapsed() < Duration::from_secs(60), "the engine does not copy");
        if engine.status() & 7 == DONE {
            // It was done with all of it while this thread waited for a processor.
            engine.reset_channel();
            setup.start_long_work(engine);
        }
    }
}

/// The engine is not at work: while as much is copied as takes it many descriptors, what changes at its source is not.
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
        // Bus mastering is off after a reset of the function; with it on, an access would be seen.
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
