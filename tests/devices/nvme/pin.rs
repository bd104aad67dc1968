//! Interrupts through the pin, as a guest without MSI takes them, with VFIO's rules: each event masks the pin, and the
//! unmasking decides whether there is another one.

use std::os::fd::AsRawFd;
use std::time::Instant;

use vfio_bindings::bindings::vfio::*;
use vmm_sys_util::eventfd::EventFd;

use crate::nvme::READ;
use viommu_testkit::PATIENCE;
use viommu_testkit::nvme::{Driver, Setup, Sqe, io};

const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;

/// A driver that uses the pin. It has not touched the controller yet.
fn driver_with_pin(setup: &Setup) -> Driver {
    let mut driver = setup.driver();
    let none = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    driver.client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, none, 0, 0, &[]).unwrap();
    let event = driver.events[0].as_raw_fd();
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[event]).unwrap();
    driver
}

/// The same with an enabled controller and an I/O queue pair. There is nothing to acknowledge.
fn ready(setup: &Setup) -> Driver {
    let mut driver = driver_with_pin(setup);
    driver.enable();
    add_pair(&mut driver, 1, 16);
    acknowledged(&mut driver);
    driver
}

/// Adds a queue pair of vector 0, the only vector.
fn add_pair(driver: &mut Driver, id: u16, entries: u32) {
    let (sq, cq) = (driver.pages(1), driver.pages(1));
    driver.add_pair(id, sq, entries, cq, entries);
    assert_eq!(driver.create_cq(id, entries, cq, 0b11), 0);
    assert_eq!(driver.create_sq(id, entries, sq, u32::from(id) << 16 | 1), 0);
}

/// Checks that all completions are acknowledged: there is no event after the next unmasking.
fn acknowledged(driver: &mut Driver) {
    came(driver);
    unmask(driver);
    assert!(!came(driver), "there is nothing to tell");
    assert!(!is_asserted(driver));
}

/// Whether an event came since the last call.
fn came(driver: &Driver) -> bool {
    driver.events[0].read().is_ok()
}

fn wait_for_event(driver: &Driver) {
    let begun = Instant::now();
    while !came(driver) {
        assert!(begun.elapsed() < PATIENCE, "no event comes");
        std::thread::yield_now();
    }
}

fn action(driver: &mut Driver, action: u32) {
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_DATA_NONE | action, 0, 1, &[]).unwrap();
}

fn unmask(driver: &mut Driver) {
    action(driver, VFIO_IRQ_SET_ACTION_UNMASK);
}

/// Interrupt Status of the status register.
fn is_asserted(driver: &mut Driver) -> bool {
    let mut status = [0; 2];
    driver.client.region_read(CONFIG, 6, &mut status).unwrap();
    status[0] & 1 << 3 != 0
}

/// Sets or clears Interrupt Disable beside Memory Space and Bus Master Enable.
fn disable(driver: &mut Driver, disabled: bool) {
    driver.client.region_write(CONFIG, 4, &[6, u8::from(disabled) << 2]).unwrap();
}

/// Executes a read, and does not acknowledge its completion.
fn complete(driver: &mut Driver) {
    let page = driver.pages(1);
    driver.put(1, io(READ, 0, 1, [page, 0]));
    driver.ring(1);
    let begun = Instant::now();
    while driver.reap(1).is_none() {
        assert!(begun.elapsed() < PATIENCE, "no completion");
    }
}

#[test]
fn the_pin_masks_itself_and_is_evaluated_again_when_it_is_unmasked() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    complete(&mut driver);
    wait_for_event(&driver);
    assert!(is_asserted(&mut driver));
    complete(&mut driver);
    assert!(!came(&driver), "it is masked since the event");
    unmask(&mut driver);
    assert!(came(&driver), "the entries still wait");
    driver.ring_head(1);
    assert!(!is_asserted(&mut driver));
    unmask(&mut driver);
    assert!(!came(&driver), "they are acknowledged");
    complete(&mut driver);
    wait_for_event(&driver);
}

#[test]
fn what_the_client_masks_waits() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    action(&mut driver, VFIO_IRQ_SET_ACTION_MASK);
    complete(&mut driver);
    assert_eq!(driver.delete_sq(1), 0);
    assert!(is_asserted(&mut driver));
    assert!(!came(&driver), "it is masked");
    unmask(&mut driver);
    assert!(came(&driver));
    action(&mut driver, VFIO_IRQ_SET_ACTION_TRIGGER);
    assert!(came(&driver), "the client asked for one");
}

#[test]
fn interrupt_disable_holds_the_pin_and_the_status_shows_it() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    disable(&mut driver, true);
    complete(&mut driver);
    assert_eq!(driver.delete_sq(1), 0);
    assert!(is_asserted(&mut driver));
    assert!(!came(&driver));
    disable(&mut driver, false);
    assert!(came(&driver));
    // A reset of the function enables it.
    disable(&mut driver, true);
    driver.client.reset().unwrap();
    driver.client.region_write(CONFIG, 4, &[6]).unwrap();
    driver.enable();
    unmask(&mut driver);
    driver.put(0, Sqe { opcode: 6, ..Sqe::default() });
    driver.ring(0);
    wait_for_event(&driver);
}

#[test]
fn the_controllers_own_mask_lowers_the_pin() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    driver.write32(INTMS, 1);
    complete(&mut driver);
    assert_eq!(driver.delete_sq(1), 0);
    assert!(!is_asserted(&mut driver), "what is masked does not count");
    unmask(&mut driver);
    assert!(!came(&driver));
    driver.write32(INTMC, 1);
    assert!(came(&driver) && is_asserted(&mut driver));
    driver.write32(INTMS, 1);
    unmask(&mut driver);
    assert!(!came(&driver));
}

#[test]
fn entries_of_a_deleted_queue_or_a_reset_controller_do_not_assert_it() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    complete(&mut driver);
    wait_for_event(&driver);
    assert_eq!((driver.delete_sq(1), driver.delete_cq(1)), (0, 0));
    acknowledged(&mut driver);
    driver.put(0, Sqe { opcode: 6, ..Sqe::default() });
    driver.ring(0);
    wait_for_event(&driver);
    driver.disable();
    acknowledged(&mut driver);
}

#[test]
fn a_queue_without_interrupts_does_not_assert_it() {
    let setup = Setup::new();
    let mut driver = driver_with_pin(&setup);
    driver.enable();
    let (sq, cq) = (driver.pages(1), driver.pages(1));
    driver.add_pair(1, sq, 16, cq, 16);
    assert_eq!(driver.create_cq(1, 16, cq, 1), 0);
    assert_eq!(driver.create_sq(1, 16, sq, 1 << 16 | 1), 0);
    acknowledged(&mut driver);
    complete(&mut driver);
    assert_eq!(driver.delete_sq(1), 0);
    acknowledged(&mut driver);
}

/// The pin is lowered when the host writes the register; the controller would not notice an acknowledgement in memory.
#[test]
fn shadow_doorbells_are_for_messages_only() {
    let setup = Setup::new();
    let shadow = |driver: &mut Driver| {
        let offered = u16::from_le_bytes(driver.identify(1, 0, 0).unwrap()[256..258].try_into().unwrap()) & 1 << 8 != 0;
        let data = [driver.pages(1), driver.pages(1)];
        (offered, driver.admin(Sqe { opcode: 0x7c, data, ..Sqe::default() }).status)
    };
    let mut driver = driver_with_pin(&setup);
    driver.enable();
    assert_eq!(shadow(&mut driver), (false, 1), "invalid opcode");
    // A driver that polls disables the pin.
    disable(&mut driver, true);
    assert_eq!(shadow(&mut driver), (true, 0));
    drop(driver);
    let mut driver = setup.driver();
    driver.enable();
    assert_eq!(shadow(&mut driver), (true, 0));
}

/// Does `total` reads with a driver that looks at its queue only after an event. Returns the number of events.
fn interrupt_driven(driver: &mut Driver, total: u32, unmask: impl Fn(&mut Driver)) -> u32 {
    let page = driver.pages(1);
    let (mut begun, mut done, mut events) = (0, 0, 0);
    while done < total {
        while begun < total && begun - done < 12 {
            driver.put(1, io(READ, 0, 1, [page, 0]));
            driver.ring(1);
            begun += 1;
        }
        wait_for_event(driver);
        events += 1;
        let mut found = 0;
        while driver.reap(1).is_some() {
            found += 1;
        }
        if found > 0 {
            driver.ring_head(1);
        }
        done += found;
        unmask(driver);
    }
    events
}

#[test]
fn no_interrupt_is_lost_and_none_comes_in_vain() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    let events = interrupt_driven(&mut driver, 5000, unmask);
    assert!(events <= 5000, "{events} events for 5000 completions");
    acknowledged(&mut driver);
}

/// As KVM does it: with a descriptor instead of a message.
#[test]
fn a_descriptor_unmasks_it_too() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[event.as_raw_fd()]).unwrap();
    let events = interrupt_driven(&mut driver, 3000, |_| event.write(1).unwrap());
    assert!(events <= 3000, "{events} events for 3000 completions");
    // Without it, nobody unmasks.
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[]).unwrap();
    unmask(&mut driver);
    complete(&mut driver);
    wait_for_event(&driver);
    event.write(1).unwrap();
    complete(&mut driver);
    assert_eq!(driver.delete_sq(1), 0);
    assert!(!came(&driver));
    // A descriptor that cannot be waited for is refused; this client ignores the answer.
    let file = std::fs::File::open("/dev/zero").unwrap();
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[file.as_raw_fd()]).unwrap();
    unmask(&mut driver);
    assert!(came(&driver));
    drop(driver);
    setup.ready();
}

/// A semaphore descriptor stays readable after a read. Each read takes 1 of it, so its remaining value counts the
/// reads.
#[test]
fn a_descriptor_that_is_always_readable_unmasks_once_for_each_time_it_is_signalled() {
    const MANY: u64 = 1 << 40;
    let setup = Setup::new();
    let mut driver = ready(&setup);
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_SEMAPHORE).unwrap();
    event.write(MANY).unwrap();
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[event.as_raw_fd()]).unwrap();
    interrupt_driven(&mut driver, 300, |_| event.write(1).unwrap());
    // The thread that reads it ends.
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[]).unwrap();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", event.as_raw_fd())).unwrap();
    let count = info.lines().find_map(|line| line.strip_prefix("eventfd-count:")).unwrap().trim();
    let left = u64::from_str_radix(count, 16).unwrap();
    assert!((MANY - 1..=MANY + 300).contains(&left), "{} reads", i128::from(MANY + 300) - i128::from(left));
}

#[test]
fn the_next_client_has_a_pin_that_is_not_masked_and_sends_to_nobody() {
    let setup = Setup::new();
    let mut first = ready(&setup);
    complete(&mut first);
    wait_for_event(&first);
    let event = first.events[0].try_clone().unwrap();
    drop(first);
    let mut second = setup.driver();
    second.enable();
    assert!(event.read().is_err());
    drop(second);
    let mut third = ready(&setup);
    complete(&mut third);
    wait_for_event(&third);
}

/// Some drivers try one kind of interrupt after the other.
#[test]
fn the_interrupt_that_the_client_set_last_is_used() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let (pin, message) = (driver.events[0].as_raw_fd(), driver.events[1].as_raw_fd());
    driver.client.set_irqs(VFIO_PCI_MSI_IRQ_INDEX, set, 0, 1, &[message]).unwrap();
    complete(&mut driver);
    assert_eq!(driver.delete_sq(1), 0);
    assert!(driver.events[1].read().is_ok());
    unmask(&mut driver);
    assert!(!came(&driver));
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, set, 0, 1, &[pin]).unwrap();
    assert!(came(&driver), "the entry still waits");
    unmask(&mut driver);
    assert!(came(&driver));
    assert!(driver.events[1].read().is_err());
}

#[test]
fn wrong_calls_are_refused_and_change_nothing() {
    let setup = Setup::new();
    let mut driver = ready(&setup);
    let event = driver.events[1].as_raw_fd();
    for (flags, start, count) in [
        (VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, 1, 1),
        (VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, 0, 2),
        (VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, u32::MAX, u32::MAX),
        (VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_MASK, 0, 1),
        (VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_MASK, 0, 0),
        (VFIO_IRQ_SET_DATA_NONE, 0, 1),
    ] {
        driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, flags, start, count, &[event]).unwrap();
    }
    complete(&mut driver);
    wait_for_event(&driver);
    let none = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    driver.client.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, none, 0, 0, &[]).unwrap();
    unmask(&mut driver);
    complete(&mut driver);
    assert_eq!(driver.delete_sq(1), 0);
    assert!(!came(&driver), "there is no descriptor any more");
}
