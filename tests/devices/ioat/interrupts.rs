//! When the interrupt is sent.

use std::os::fd::AsRawFd;

use crate::ioat::setup::*;
use vfio_bindings::bindings::vfio::*;
use viommu_testkit::engine::*;
use vmm_sys_util::eventfd::EventFd;

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
fn no_earlier_interrupt_comes_after_a_reset() {
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

/// In a guest without MSI, the handler's read of INTRCTRL lowers the pin, and its write allows the next interrupt.
#[test]
fn the_pin_is_asserted_until_the_handler_reads_what_it_is() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let set = |action| VFIO_IRQ_SET_DATA_EVENTFD | action;
    let trigger = set(VFIO_IRQ_SET_ACTION_TRIGGER);
    engine.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, trigger, 0, 1, &[event.as_raw_fd()]).unwrap();
    let unmask = |engine: &mut Engine| {
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
        engine.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, flags, 0, 1, &[]).unwrap();
    };
    engine.write(register::INTRCTRL, &[0x01]);
    setup.ring(&engine, 1, |_| Descriptor { size: 1, control: NULL | INTERRUPT, ..Descriptor::default() });
    engine.start(RING, 1);
    assert_eq!(interrupts(&event), 1);
    for _ in 0..3 {
        unmask(&mut engine);
        assert_eq!(event.read().unwrap(), 1, "nobody has served it");
    }
    assert_eq!(engine.read8(register::INTRCTRL), 0x07);
    unmask(&mut engine);
    assert!(event.read().is_err(), "the handler has begun");
    engine.write(register::INTRCTRL, &[0x01]);
    assert_eq!(event.read().unwrap(), 1, "and left the attention unread");
    assert_eq!(engine.read32(register::ATTNSTATUS), 1);
    unmask(&mut engine);
    assert!(event.read().is_err());
    // The next one is sent when the channel is armed.
    engine.ready(2);
    assert_eq!(engine.wait(), Ok(()));
    assert!(event.read().is_err());
    engine.write(register::CHANCTRL, &[1, 0]);
    assert_eq!(interrupts(&event), 1);
}
