//! The NVMe controller over a real vfio-user socket, with a test in the driver's place.

mod blocks;
mod controller;
mod data;
mod events;
mod hostile;
mod interrupt_masks;
mod pin;
mod poller;
mod queues;
mod teardown;
mod traced;
mod unmapped;

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const COMPARE: u8 = 5;
const WRITE_ZEROES: u8 = 8;
const DATASET_MANAGEMENT: u8 = 9;
