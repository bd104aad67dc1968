//! Work that is suspended, reset, or left by its client.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio::*;

use crate::common::engine::*;
use crate::setup::*;

/// Whether the engine writes: its source is changed, and the destination looked at.
fn is_copying(setup: &Setup, wait: Duration) -> bool {
    let marker = [setup.bytes(0x200000, 1)[0].wrapping_add(1)];
    setup.ram.write_all_at(&marker, 0x100000).unwrap();
    let begun = Instant::now();
    while setup.bytes(0x200000, 1) != marker {
        if begun.elapsed() > wait {
            return false;
        }
    }
    true
}

const SOON: Duration = Duration::from_secs(60);
const A_WHILE: Duration = Duration::from_millis(50);

#[test]
fn suspended_work_stops_and_goes_on() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.start_long_work(&mut engine);
    for _ in 0..5 {
        assert!(is_copying(&setup, SOON));
        engine.command(SUSPEND);
        assert_eq!(engine.wait_while(ACTIVE), SUSPENDED);
        assert!(!is_copying(&setup, A_WHILE));
        engine.command(RESUME);
    }
    assert!(is_copying(&setup, SOON));
    engine.command(SUSPEND);
    engine.wait_while(ACTIVE);
    engine.ready(u16::MAX);
    assert!(is_copying(&setup, SOON));
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
        assert!(is_copying(&setup, SOON));
        reset(&mut engine);
        // Bus mastering is off after a reset of the function; with it on, an access would be seen.
        engine.enable();
        assert!(!is_copying(&setup, A_WHILE));
        assert_eq!(engine.status(), HALTED);
    }
}

#[test]
fn a_client_that_leaves_takes_its_work_with_it() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.start_long_work(&mut engine);
    assert!(is_copying(&setup, SOON));
    drop(engine);
    let mut engine = setup.engine();
    assert!(!is_copying(&setup, A_WHILE));
    assert_eq!(engine.copy(0x100000, 0x200000, 64), Ok(()));
}
