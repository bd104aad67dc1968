//! The identity that drivers look for, and copies.

use crate::ioat::setup::*;
use vfio_bindings::bindings::vfio::*;
use viommu_testkit::engine::*;
use viommu_wire::virtio_iommu::*;

#[test]
fn its_identity_is_what_drivers_look_for() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let mut config = [0; 16];
    engine.client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut config).unwrap();
    assert_eq!(config[..4], [0x86, 0x80, 0x21, 0x20]);
    assert_eq!(config[9..12], [0x00, 0x80, 0x08]);
    assert_eq!(engine.client.region(0).unwrap().size, 0x4000);
    assert_eq!(engine.client.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).unwrap().count, 1);
    for offset in [0x148, 0x180, 0x184] {
        let mut value = [0xff; 4];
        engine.client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, offset, &mut value).unwrap();
        assert_eq!(value, [0; 4]);
    }
    assert_eq!(engine.read8(0), 1);
    assert_eq!(engine.read8(register::XFERCAP), 16);
    assert_eq!(engine.read8(register::VERSION), 0x33);
    assert_eq!(engine.read32(register::DMA_CAP), 0);
    assert_eq!(engine.status(), HALTED);
    assert_eq!(engine.read::<8>(0x3ff8), [0; 8]);
    engine.write(0x3ff8, &[0xff; 8]);
}

#[test]
fn registers_can_be_accessed_in_parts() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    engine.write(register::CHANCMP, &0x5555_5000u32.to_le_bytes());
    engine.write(register::CHANCMP + 4, &0x1234u32.to_le_bytes());
    assert_eq!(engine.read64(register::CHANCMP), 0x1234_5555_5000);
    assert_eq!(engine.read32(register::CHANCMP + 4), 0x1234);
    engine.write(register::CHANERR_MASK, &0x3_0000u32.to_le_bytes());
    engine.write(register::CHANERR_MASK, &[0x0f]);
    assert_eq!(engine.read32(register::CHANERR_MASK), 0x3_000f);
    // The channel's first quadword at once: control, no command, count.
    engine.write(register::CHAINADDR, &RING.to_le_bytes());
    setup.ring(&engine, 1, |_| Descriptor { control: NULL, size: 1, ..Descriptor::default() });
    engine.write(register::CHANCTRL, &[0x10, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(engine.read::<8>(register::CHANCTRL), [0x10, 0, 2, 0, 0, 0, 1, 0]);
}

#[test]
fn memory_is_copied() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    for (source, destination, len) in [
        (0x100000, 0x200000, LARGEST),
        (0x100001, 0x210003, 4097),
        (0x100fff, 0x220fff, 2),
        (0x103000, 0x230000, 1),
        (0x108000, 0x240ff0, 65535),
    ] {
        let data = setup.fill(source, len.into(), len as u8);
        setup.fill(destination + u64::from(len), 16, 0xaa);
        let behind = setup.bytes(destination + u64::from(len), 16);
        assert_eq!(engine.copy(source, destination, len), Ok(()));
        assert_eq!(setup.bytes(destination, len.into()), data);
        assert_eq!(setup.bytes(destination + u64::from(len), 16), behind);
    }
    assert!(setup.faults().is_empty());
}

#[test]
fn a_chain_gathers_and_goes_on_where_it_ended() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    // Eight pieces, taken from last to first.
    let data = setup.fill(0x100000, 8 * 0x1000, 7);
    setup.ring(&engine, 8, |n| Descriptor {
        size: 0x1000,
        source: 0x100000 + (7 - n) * 0x1000,
        destination: 0x200000 + n * 0x1000,
        ..Descriptor::default()
    });
    engine.start(RING, 3);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(engine.status(), (RING + 2 * 64) | DONE);
    assert_eq!(setup.bytes(0x203000, 0x5000), [0; 0x5000]);
    // The count is that of all descriptors since the chain began.
    engine.ready(8);
    assert_eq!(engine.wait(), Ok(()));
    let expected: Vec<u8> = data.chunks(0x1000).rev().flatten().copied().collect();
    assert_eq!(setup.bytes(0x200000, 0x8000), expected);
    // Past 65,535 it wraps.
    engine.ready(u16::MAX);
    assert_eq!(engine.wait(), Ok(()));
    setup.ring(&engine, 8, |n| Descriptor {
        size: 4,
        source: 0x300000 + n * 4,
        destination: 0x400000 + n * 4,
        ..Descriptor::default()
    });
    setup.fill(0x300000, 32, 9);
    engine.ready(2);
    assert_eq!(engine.wait(), Ok(()));
    assert_eq!(setup.bytes(0x40001c, 4), setup.bytes(0x30001c, 4));
    assert_eq!(setup.bytes(0x400000, 8), setup.bytes(0x300000, 8));
    assert_eq!(setup.bytes(0x400008, 20), [0; 20]);
}

/// The steps of Linux's `ioatdma` when it binds: `ioat_alloc_chan_resources` and `ioat_dma_self_test`.
#[test]
fn it_does_what_the_linux_driver_expects() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let event = interrupt(&mut engine);
    engine.write(register::INTRCTRL, &[0x09]);
    engine.write(register::CHANCTRL, &0x1du16.to_le_bytes());
    engine.write(register::CHANCMP, &(STATUS as u32).to_le_bytes());
    engine.write(register::CHANCMP + 4, &0u32.to_le_bytes());
    let data = setup.fill(0x100000, 2000, 3);
    setup.ring(&engine, 4, |n| match n {
        0 => Descriptor { size: 1, control: NULL | INTERRUPT | COMPLETION, ..Descriptor::default() },
        _ => Descriptor {
            size: 2000,
            control: INTERRUPT | COMPLETION,
            source: 0x100000,
            destination: 0x200000,
            ..Descriptor::default()
        },
    });
    engine.write(register::CHAINADDR, &(RING as u32).to_le_bytes());
    engine.write(register::CHAINADDR + 4, &0u32.to_le_bytes());
    engine.ready(1);
    assert!([ACTIVE, DONE].contains(&(engine.status() & 7)));
    assert_eq!(interrupts(&event), 1);
    assert_eq!(setup.word(STATUS), RING | DONE);
    engine.write(register::CHANCTRL, &0x1du16.to_le_bytes());
    engine.ready(2);
    assert_eq!(interrupts(&event), 1);
    assert_eq!(setup.word(STATUS), (RING + 64) | DONE);
    assert_eq!(setup.bytes(0x200000, 2000), data);
    // `ioat_reset_hw`.
    engine.command(SUSPEND);
    assert_eq!(engine.status() & 7, SUSPENDED);
    engine.reset_channel();
    assert_eq!(engine.status(), HALTED);
}

#[test]
fn copies_go_through_the_iommu() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    setup.attach();
    assert_eq!(engine.copy(0, 0, 1), Err(chanerr::CHAIN));
    assert_eq!(setup.faults(), [(FaultReason::Mapping as u8, false, RING)]);
    let (descriptor, source, destination) = (0x7000_0000_0000, 0xffff_f000, 1 << 63);
    engine.descriptor.1 = descriptor;
    setup.map(descriptor, 0x1000, RING, MapFlags::READ);
    // Two pages that are not adjacent in guest memory.
    setup.map(source, 0x1000, 0x500000, MapFlags::READ);
    setup.map(source + 0x1000, 0x1000, 0x400000, MapFlags::READ);
    setup.map(destination, 0x2000, 0x600000, MapFlags::WRITE);
    let first = setup.fill(0x500000, 0x1000, 1);
    let second = setup.fill(0x400000, 0x1000, 2);
    assert_eq!(engine.copy(source, destination, 0x2000), Ok(()));
    assert_eq!(setup.bytes(0x600000, 0x2000), [first, second].concat());
    // An access in the wrong direction and one to a removed mapping fail.
    assert_eq!(engine.copy(destination, destination, 8), Err(chanerr::SOURCE));
    assert_eq!(engine.copy(source, source + 8, 8), Err(chanerr::DESTINATION));
    setup.unmap(destination, 0x2000);
    assert_eq!(engine.copy(source, destination, 8), Err(chanerr::DESTINATION));
    let mapping = FaultReason::Mapping as u8;
    let expected = [(mapping, false, destination), (mapping, true, source + 8), (mapping, true, destination)];
    assert_eq!(setup.faults(), expected);
}

/// The steps of `memcpy_storm` in the kernel's VFIO selftests, with less to copy.
#[test]
fn a_descriptor_that_is_its_own_next_runs_65535_times() {
    let setup = Setup::new();
    let mut engine = setup.engine();
    let data = setup.fill(0x100000, 256, 4);
    setup.ring(&engine, 1, |_| Descriptor {
        size: 256,
        source: 0x100000,
        destination: 0x200000,
        ..Descriptor::default()
    });
    for _ in 0..2 {
        engine.start(RING, u16::MAX);
        assert_eq!(engine.wait(), Ok(()));
        assert_eq!(setup.bytes(0x200000, 256), data);
        engine.command(SUSPEND);
        assert_eq!(engine.wait_while(DONE), SUSPENDED);
    }
}
