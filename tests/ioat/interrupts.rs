//! When the interrupt is sent.

use crate::common::engine::*;
use crate::setup::*;

#[test]
fn one_interrupt_is_sent_for_each_arming() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let event = interrupt(&mut engine);
    setup.ring(&engine, 1, |_| Descriptor { size: 1, control: NULL | INTERRUPT, ..Descriptor::default() });
    engine.start(RING, 3);
    assert_eq!(engine.wait(), Ok(()));
    assert!(event.read().is_err(), "INTRCTRL is zero");
    engine.write(register::INTRCTRL, &[0x08]);
    assert_eq!(interrupts(&event), 1);
    assert_eq!(engine.read32(register::CHANCTRL) & 1, 1);
    engine.ready(5);
    assert_eq!(engine.wait(), Ok(()));
    assert!(event.read().is_err(), "the interrupt was not armed");
    engine.write(register::CHANCTRL, &[1, 0]);
    assert_eq!(interrupts(&event), 1);
    engine.write(register::CHANCTRL, &[1, 0]);
    assert!(event.read().is_err());
}

/// `ioat_dma_do_interrupt`, the handler that serves all channels.
#[test]
fn a_common_handler_finds_the_channel() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let event = interrupt(&mut engine);
    engine.write(register::INTRCTRL, &[0x01]);
    setup.ring(&engine, 1, |_| Descriptor { size: 1, control: NULL | INTERRUPT, ..Descriptor::default() });
    engine.start(RING, 1);
    assert_eq!(interrupts(&event), 1);
    assert_eq!(engine.read8(register::INTRCTRL), 0x07);
    assert_eq!(engine.read32(register::ATTNSTATUS), 1);
    assert_eq!(engine.read32(register::ATTNSTATUS), 0);
    engine.write(register::INTRCTRL, &[0x07]);
    assert_eq!(engine.read8(register::INTRCTRL), 0x01);
}

#[test]
fn no_interrupt_of_before_comes_after_a_reset() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.ring(&engine, 1, |_| Descriptor { size: 1, control: NULL | INTERRUPT, ..Descriptor::default() });
    for _ in 0..200 {
        let event = interrupt(&mut engine);
        engine.enable();
        engine.write(register::INTRCTRL, &[0x08]);
        engine.write(register::CHANCTRL, &[1, 0]);
        engine.start(RING, 100);
        engine.client.reset().unwrap();
        let _ = event.read();
        engine.write(register::INTRCTRL, &[0x08]);
        engine.write(register::CHANCTRL, &[1, 0]);
        assert!(event.read().is_err());
    }
}
