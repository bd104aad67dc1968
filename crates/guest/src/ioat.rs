//! The registers and descriptors of an I/OAT DMA engine, as `drivers/dma/ioat` of Linux uses them, as far as a copy
//! needs them.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::vfio::Bar;

/// The engine's PCI ids.
pub const VENDOR: u16 = 0x8086;
/// See [`VENDOR`].
pub const DEVICE: u16 = 0x2021;

/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 64;
/// Descriptor control: write the completion when done.
const CONTROL_COMPLETION: u32 = 1 << 3;

/// Channel 0's registers, as offsets in BAR 0.
const COMMAND: usize = 0x84;
const COUNT: usize = 0x86;
const STATUS: usize = 0x88;
const CHAIN: usize = 0x90;
const COMPLETION: usize = 0x98;
const ERROR: usize = 0xa8;

const COMMAND_RESET: u8 = 0x20;
/// The state in the status register's, and a completion's, low bits.
const STATE: u64 = 0x7;
const STATE_DONE: u64 = 1;
const STATE_HALTED: u64 = 3;

/// How long a copy may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Error bits (`IOAT_CHANERR_*`).
pub const ERROR_SOURCE: u32 = 1 << 0;
/// The destination cannot be written.
pub const ERROR_DESTINATION: u32 = 1 << 1;
/// A descriptor that another one names as next cannot be read.
pub const ERROR_NEXT: u32 = 1 << 2;
/// The chain's first descriptor cannot be read.
pub const ERROR_CHAIN: u32 = 1 << 4;
/// The completion cannot be written.
pub const ERROR_COMPLETION: u32 = 1 << 12;

/// A descriptor that copies `size` bytes, as the engine reads it. The last one of a chain may name any next descriptor.
pub fn copy(size: u32, source: u64, destination: u64, next: u64) -> [u8; DESCRIPTOR] {
    let mut bytes = [0; DESCRIPTOR];
    bytes[0..4].copy_from_slice(&size.to_le_bytes());
    bytes[4..8].copy_from_slice(&CONTROL_COMPLETION.to_le_bytes());
    bytes[8..16].copy_from_slice(&source.to_le_bytes());
    bytes[16..24].copy_from_slice(&destination.to_le_bytes());
    bytes[24..32].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// The result of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status register: state in the low three bits, above them the last completed descriptor's address.
    pub status: u64,
    /// The channel error register.
    pub error: u32,
}

impl Outcome {
    /// Whether the chain was executed.
    pub fn is_done(self) -> bool {
        self.status & STATE == STATE_DONE && self.error == 0
    }

    /// Whether the channel stopped with an error.
    pub fn is_halted(self) -> bool {
        self.status & STATE == STATE_HALTED
    }
}

/// Resets channel 0, clears its errors, and makes it execute `count` descriptors.
///
/// # Errors
/// If the channel does not halt on reset, or if it neither finishes nor halts in time.
pub fn run_chain(bar: &Bar, first: u64, count: u16, completion: u64) -> Result<Outcome> {
    bar.write(COMMAND, COMMAND_RESET)?;
    wait(bar, Outcome::is_halted)?;
    bar.write(ERROR, bar.read::<u32>(ERROR)?)?;
    let left = bar.read::<u32>(ERROR)?;
    ensure!(left == 0, "The channel's errors cannot be cleared: {left:#x}");
    bar.write(COMPLETION, completion)?;
    bar.write(CHAIN, first)?;
    bar.write(COUNT, count)?;
    // If it is halted without an error, that is still the reset's halt: the channel has not started yet.
    wait(bar, |outcome| outcome.is_done() || (outcome.is_halted() && outcome.error != 0))
}

fn wait(bar: &Bar, ended: impl Fn(Outcome) -> bool) -> Result<Outcome> {
    let end = Instant::now() + LIMIT;
    loop {
        let outcome = Outcome { status: bar.read(STATUS)?, error: bar.read(ERROR)? };
        if ended(outcome) {
            return Ok(outcome);
        }
        if Instant::now() >= end {
            bail!(
                "After {LIMIT:?} the DMA engine's channel has status {:#x}, errors {:#x}",
                outcome.status,
                outcome.error
            );
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}
