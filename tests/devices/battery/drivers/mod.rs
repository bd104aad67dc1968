//! A driver for each model, in place of the guest's driver.

mod ioat;
mod null;
mod nvme;

use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio_user::Client;

use super::held::Held;

/// The drivers: one entry for each model.
const DRIVERS: [Driver; 3] = [nvme::DRIVER, ioat::DRIVER, null::DRIVER];

/// A model's driver.
#[derive(Clone, Copy)]
pub struct Driver {
    /// The model's name in MODELS.
    pub model: &'static str,
    /// A driver that keeps the device busy.
    pub load: fn(Client) -> Box<dyn Load>,
    /// A driver that does random things with it.
    pub run: fn(Client) -> Box<dyn Run>,
}

/// The driver of a model.
pub fn of(model: &str) -> Driver {
    let found = DRIVERS.into_iter().find(|driver| driver.model == model);
    found.unwrap_or_else(|| panic!("{model} has no driver in tests/devices/battery/drivers/: add one"))
}

/// Keeps a device busy, and checks what it did.
pub trait Load: Send {
    /// Sets up the device, which is in its state after a reset.
    fn begin(&mut self);

    /// Gives it work. All earlier work is done.
    fn submit(&mut self);

    /// Waits until the work is done, and checks it.
    fn finish(&mut self);

    fn client(&mut self) -> &mut Client;
}

/// Does random things with a device. The same steps must give the same results each time.
pub trait Run {
    /// Does a step. Returns what the driver sees.
    fn step(&mut self, step: &Step, moves: &Moves<'_>) -> Seen;
}

/// A step of a run.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub what: u8,
    pub value: u16,
    /// When the state is moved into another model. Bits: before the step, in the middle of it, after it.
    pub moved: u8,
}

/// Moves the state into another model, or does nothing.
pub struct Moves<'a>(pub Option<&'a Held>);

impl Moves<'_> {
    /// At this point of a step.
    pub fn at(&self, step: &Step, when: u8) {
        if let Some(held) = self.0.filter(|_| step.moved & 1 << when != 0) {
            held.migrate();
        }
    }
}

/// The results that a driver saw: numbers, and bytes.
#[derive(Debug, PartialEq)]
pub struct Seen(pub Vec<u64>, pub Vec<u8>);

/// Sets Memory Space and Bus Master Enable, or Memory Space alone.
pub fn set_bus_master(client: &mut Client, enabled: bool) {
    client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[if enabled { 6 } else { 2 }, 0]).unwrap();
}
