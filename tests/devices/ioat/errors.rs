//! A descriptor that cannot be done halts the channel and says why.

use crate::ioat::setup::*;
use vfio_bindings::bindings::vfio::*;
use viommu_testkit::engine::*;
use viommu_wire::virtio_iommu::*;

#[test]
fn data_before_the_first_bad_address_is_copied() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    let rw = MapFlags::READ | MapFlags::WRITE;
    setup.map(0x100000, 0x3000, 0x100000, rw);
    setup.map(0x200000, 0x10000, 0x200000, rw);
    setup.map(0x300000, 0x1000, 0x300000, rw);
    let data = setup.fill(0x100000, 0x3000, 5);
    assert_eq!(engine.copy(0x100010, 0x200000, 0x8000), Err(chanerr::SOURCE));
    assert_eq!(setup.bytes(0x200000, 0x2ff0), data[0x10..]);
    assert_eq!(setup.bytes(0x202ff0, 0x1000), [0; 0x1000]);
    assert_eq!(engine.copy(0x100000, 0x300800, 0x2000), Err(chanerr::DESTINATION));
    assert_eq!(setup.bytes(0x300800, 0x800), data[..0x800]);
    assert_eq!(setup.bytes(0x301000, 0x1000), [0; 0x1000]);
    let mapping = FaultReason::Mapping as u8;
    assert_eq!(setup.faults(), [(mapping, false, 0x103000), (mapping, true, 0x301000)]);
}

#[test]
fn each_kind_of_error_halts_with_its_bit() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    let bad = 0x8000_0000u64;
    let good = Descriptor { size: 64, source: 0x8000, destination: 0x9000, next: RING, ..Descriptor::default() };
    let cases = [
        ("source", chanerr::SOURCE, Descriptor { source: bad, ..good }, 1),
        ("destination", chanerr::DESTINATION, Descriptor { destination: bad, ..good }, 1),
        ("next", chanerr::NEXT, Descriptor { next: bad, ..good }, 2),
        ("alignment of next", chanerr::NEXT_ALIGNMENT, Descriptor { next: RING + 32, ..good }, 2),
        ("operation", chanerr::CONTROL, Descriptor { control: 0x87 << 24, ..good }, 1),
        ("page break", chanerr::CONTROL, Descriptor { control: 1 << 6, ..good }, 1),
        ("no length", chanerr::LENGTH, Descriptor { size: 0, ..good }, 1),
        ("length", chanerr::LENGTH, Descriptor { size: LARGEST + 1, ..good }, 1),
        ("all ones", chanerr::LENGTH, Descriptor { size: u32::MAX, ..good }, 1),
        ("completion", chanerr::COMPLETION, Descriptor { control: COMPLETION, ..good }, 1),
    ];
    for (what, errors, descriptor, count) in cases {
        engine.put(RING, &descriptor);
        engine.write(register::CHANCMP, &bad.to_le_bytes());
        engine.start(RING, count);
        assert_eq!(engine.wait(), Err(errors), "{what}");
        let faults = setup.faults();
        let faulted = errors & (chanerr::CONTROL | chanerr::LENGTH | chanerr::NEXT_ALIGNMENT) == 0;
        let write = matches!(errors, chanerr::DESTINATION | chanerr::COMPLETION);
        let expected = [(FaultReason::Mapping as u8, write, bad)];
        assert_eq!(faults, if faulted { &expected[..] } else { &[] }, "{what}");
        // The channel can be used again.
        assert_eq!(engine.copy(0x8000, 0x9000, 64), Ok(()), "{what}");
    }
    for address in [RING + 8, bad, u64::MAX - 63] {
        engine.start(address, 1);
        assert_eq!(engine.wait(), Err(chanerr::CHAIN), "{address:#x}");
    }
    engine.command(0x01);
    assert_eq!(engine.wait(), Err(chanerr::COMMAND));
    // The address is translated, but there is no memory.
    setup.map(1 << 40, 0x1000, 1 << 40, MapFlags::READ | MapFlags::WRITE);
    setup.faults();
    assert_eq!(engine.copy(1 << 40, 0x9000, 64), Err(chanerr::SOURCE));
    assert_eq!(engine.copy(0x8000, 1 << 40, 64), Err(chanerr::DESTINATION));
    assert!(setup.faults().is_empty());
}

#[test]
fn without_bus_mastering_nothing_is_accessed() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    engine.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[2, 0]).unwrap();
    assert_eq!(engine.copy(0x100000, 0x200000, 64), Err(chanerr::CHAIN));
    engine.enable();
    assert_eq!(engine.copy(0x100000, 0x200000, 64), Ok(()));
}

#[test]
fn an_error_is_completed_and_interrupts_as_chanctrl_says() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    let event = interrupt(&mut engine);
    engine.write(register::INTRCTRL, &[0x08]);
    setup.ring(&engine, 2, |n| Descriptor {
        size: 64,
        control: COMPLETION,
        source: [0x8000, 0x8000_0000][n as usize],
        destination: 0x9000,
        ..Descriptor::default()
    });
    // In turn: neither of the two, the completion, the interrupt, and an interrupt that CHANERRMSK masks.
    for (control, mask, value, sent) in
        [(0x01, 0, RING, 0), (0x05, 0, RING | HALTED, 0), (0x11, 0, RING, 1), (0x11, chanerr::SOURCE, RING, 0)]
    {
        engine.write(register::CHANCMP, &STATUS.to_le_bytes());
        engine.write(register::CHANCTRL, &[control, 0]);
        engine.write(register::CHANERR_MASK, &mask.to_le_bytes());
        engine.start(RING, 2);
        engine.wait_while(ACTIVE);
        assert_eq!(engine.status(), RING | HALTED);
        assert_eq!(setup.word(STATUS), value);
        assert_eq!(event.read().unwrap_or(0), sent);
        // A halted channel does nothing until CHANERR is cleared.
        engine.ready(3);
        assert_eq!(engine.status(), RING | HALTED);
        assert_eq!(engine.wait(), Err(chanerr::SOURCE));
    }
}

#[test]
fn a_cleared_error_can_be_tried_again_without_a_reset() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    setup.fill(0x400000, 64, 8);
    setup.ring(&engine, 1, |_| Descriptor { size: 64, source: 0x400000, destination: 0x9000, ..Descriptor::default() });
    engine.start(RING, 1);
    assert_eq!(engine.wait_while(ACTIVE), HALTED);
    setup.map(0x400000, 0x1000, 0x400000, MapFlags::READ);
    engine.write(register::CHANERR, &u32::MAX.to_le_bytes());
    assert_eq!(engine.read32(register::CHANERR), 0);
    engine.ready(1);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(setup.bytes(0x9000, 64), setup.bytes(0x400000, 64));
}
