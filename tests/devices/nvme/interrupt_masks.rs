//! Interrupt Mask Set and Interrupt Mask Clear, which work with MSI and do nothing with MSI-X.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio::*;

use crate::nvme::READ;
use viommu_testkit::nvme::{Driver, Setup, Sqe, io};

const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;

/// A driver with MSI instead of MSI-X, that has not touched the controller yet.
fn driver_with_msi(setup: &Setup) -> Driver {
    let mut driver = setup.driver();
    let none = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    driver.client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, none, 0, 0, &[]).unwrap();
    let events: Vec<i32> = driver.events.iter().take(8).map(AsRawFd::as_raw_fd).collect();
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    driver.client.set_irqs(VFIO_PCI_MSI_IRQ_INDEX, set, 0, 8, &events).unwrap();
    driver
}

/// Whether this vector came since the last call.
fn came(driver: &Driver, vector: usize) -> bool {
    driver.events[vector].read().is_ok()
}

/// Waits for this vector.
fn wait_for(driver: &Driver, vector: usize) {
    let begun = Instant::now();
    while !came(driver, vector) {
        assert!(begun.elapsed() < Duration::from_secs(60), "vector {vector} does not come");
        std::thread::yield_now();
    }
}

/// Executes a command, and does not acknowledge its completion.
fn complete(driver: &mut Driver, queue: u16, sqe: Sqe) {
    driver.put(queue, sqe);
    driver.ring(queue);
    let begun = Instant::now();
    while driver.reap(queue).is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no completion on queue {queue}");
    }
}

/// The same with a read. Also ends the queue's thread, so that none of its interrupts can be on the way.
fn complete_last(driver: &mut Driver, queue: u16) {
    let page = driver.pages(1);
    complete(driver, queue, io(READ, 0, 1, [page, 0]));
    assert_eq!(driver.delete_sq(queue), 0);
}

/// A masked vector is silent. It comes at the unmasking as long as there are entries that were not acknowledged.
fn check_masks(driver: &mut Driver) {
    driver.write32(INTMS, 1 << 1);
    driver.write32(INTMS, 1 << 31);
    assert_eq!((driver.read32(INTMS), driver.read32(INTMC)), (1 << 31 | 1 << 1, 1 << 31 | 1 << 1));
    complete_last(driver, 1);
    assert!(!came(driver, 1), "it is masked");
    complete_last(driver, 2);
    assert!(came(driver, 2), "the other one is not");
    driver.write32(INTMC, 1 << 31 | 1 << 2);
    assert_eq!((driver.read32(INTMS), driver.read32(INTMC)), (1 << 1, 1 << 1));
    assert!(!came(driver, 1), "it still is");
    assert!(!came(driver, 2), "it was not masked");
    driver.write32(INTMC, 1 << 1);
    assert_eq!((driver.read32(INTMS), driver.read32(INTMC)), (0, 0));
    assert!(came(driver, 1), "the entry waits");
    driver.write32(INTMS, 1 << 1);
    driver.write32(INTMC, 1 << 1);
    assert!(came(driver, 1), "the entry still waits");
    driver.write32(INTMS, 1 << 1);
    driver.ring_head(1);
    driver.write32(INTMC, 1 << 1);
    assert!(!came(driver, 1), "the entry is acknowledged");
}

#[test]
fn a_masked_vector_comes_when_it_is_unmasked_and_still_has_a_reason() {
    let setup = Setup::new();
    let mut driver = driver_with_msi(&setup);
    driver.enable();
    (1..=2).for_each(|id| driver.create_pair(id, 16, 16));
    check_masks(&mut driver);
}

#[test]
fn shadow_doorbells_acknowledge_too() {
    let setup = Setup::new();
    let mut driver = driver_with_msi(&setup);
    driver.enable();
    (1..=2).for_each(|id| driver.create_pair(id, 16, 16));
    let shadow = (driver.pages(1), driver.pages(1));
    assert_eq!(driver.admin(Sqe { opcode: 0x7c, data: [shadow.0, shadow.1], ..Sqe::default() }).status, 0);
    driver.shadow = Some(shadow);
    // As if the controller did not ask for a write of the head's register for now.
    driver.write_ram(shadow.1 + 4 * 3, &100u32.to_le_bytes());
    check_masks(&mut driver);
}

#[test]
fn the_admin_queue_has_a_vector_too_and_a_queue_without_has_none() {
    let setup = Setup::new();
    let mut driver = driver_with_msi(&setup);
    driver.enable();
    let (sq, cq) = (driver.pages(1), driver.pages(1));
    driver.add_pair(1, sq, 16, cq, 16);
    // It has vector 3, but interrupts are disabled.
    assert_eq!(driver.create_cq(1, 16, cq, 3 << 16 | 1), 0);
    assert_eq!(driver.create_sq(1, 16, sq, 1 << 16 | 1), 0);
    driver.write32(INTMS, u32::MAX);
    complete_last(&mut driver, 1);
    complete(&mut driver, 0, Sqe { opcode: 6, ..Sqe::default() });
    came(&driver, 0);
    driver.write32(INTMC, u32::MAX);
    assert!(came(&driver, 0) && !came(&driver, 3));
}

#[test]
fn with_msi_x_masks_do_nothing() {
    let setup = Setup::new();
    let mut driver = setup.ready();
    driver.write32(INTMS, u32::MAX);
    assert_eq!(driver.read32(INTMC), u32::MAX);
    complete_last(&mut driver, 1);
    assert!(came(&driver, 1));
    driver.write32(INTMC, u32::MAX);
    assert!(!came(&driver, 1), "it was not masked");
}

#[test]
fn a_reset_unmasks_all() {
    let setup = Setup::new();
    let mut driver = driver_with_msi(&setup);
    for end in 0..3 {
        driver.enable();
        came(&driver, 0);
        driver.write32(INTMS, u32::MAX);
        match end {
            0 => driver.disable(),
            1 => driver.client.reset().unwrap(),
            // The next client gets a new controller.
            _ => {
                drop(driver);
                driver = driver_with_msi(&setup);
            }
        }
        assert_eq!((driver.read32(INTMS), driver.read32(INTMC)), (0, 0), "{end}");
        driver.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
        driver.enable();
        driver.get_feature(7, 0);
        wait_for(&driver, 0);
        driver.disable();
    }
}

/// The driver looks at its queue only after an interrupt, and only after it has unmasked the vector.
#[test]
fn an_entry_that_is_posted_at_the_unmasking_interrupts() {
    let setup = Setup::new();
    let mut driver = driver_with_msi(&setup);
    driver.enable();
    driver.create_pair(1, 16, 16);
    let page = driver.pages(1);
    for _ in 0..3000 {
        driver.write32(INTMS, 1 << 1);
        driver.put(1, io(READ, 0, 1, [page, 0]));
        driver.ring(1);
        driver.write32(INTMC, 1 << 1);
        loop {
            // An interrupt may come twice.
            wait_for(&driver, 1);
            if driver.reap(1).is_some() {
                break;
            }
        }
        driver.ring_head(1);
    }
}
