//! Get Log Page (section 5.14.1).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::event::{ErrorInfo, Reports};
use super::features::TEMPERATURE;
use super::spec::{Status, admin, nvm};

/// Log page identifiers.
mod id {
    pub const ERROR: u8 = 0x01;
    pub const HEALTH: u8 = 0x02;
    pub const FIRMWARE: u8 = 0x03;
    pub const EFFECTS: u8 = 0x05;
}

/// The number of entries that the error log keeps.
pub(super) const ERROR_ENTRIES: usize = 64;

/// The firmware revision: the version of this program.
pub(super) const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// The commands that failed last, newest first, each with its error count.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct ErrorLog {
    entries: VecDeque<(u64, ErrorInfo)>,
    count: u64,
}

impl ErrorLog {
    /// Whether such a log is possible.
    pub fn is_possible(&self) -> bool {
        self.entries.len() <= ERROR_ENTRIES && self.entries.iter().all(|(number, _)| *number <= self.count)
    }

    /// Adds a command that failed.
    pub fn push(&mut self, info: ErrorInfo) {
        self.count = self.count.saturating_add(1);
        self.entries.push_front((self.count, info));
        self.entries.truncate(ERROR_ENTRIES);
    }
}

/// A whole log page. `warning` says whether the temperature is past a threshold, for the health page.
pub(super) fn page(disk: &Disk, reports: &Reports, warning: bool, log: u8) -> Result<Vec<u8>, Status> {
    match log {
        id::ERROR => Ok(errors(&reports.errors())),
        id::HEALTH => Ok(health(disk, reports, warning)),
        id::FIRMWARE => Ok(firmware()),
        id::EFFECTS => Ok(effects()),
        _ => Err(Status::INVALID_LOG_PAGE),
    }
}

/// Error information (figure 193).
fn errors(log: &ErrorLog) -> Vec<u8> {
    let mut page = vec![0; 64 * ERROR_ENTRIES];
    for (entry, (count, info)) in page.chunks_exact_mut(64).zip(&log.entries) {
        put(entry, 0, &count.to_le_bytes());
        put(entry, 8, &info.queue.to_le_bytes());
        put(entry, 10, &info.cid.to_le_bytes());
        put(entry, 12, &(info.status.0 << 1).to_le_bytes());
        // Parameter error location: unknown.
        put(entry, 14, &0xffffu16.to_le_bytes());
        put(entry, 16, &info.lba.to_le_bytes());
        put(entry, 24, &info.nsid.to_le_bytes());
    }
    page
}

/// SMART / health information (figure 194).
fn health(disk: &Disk, reports: &Reports, warning: bool) -> Vec<u8> {
    let mut page = vec![0; 512];
    let counters = &disk.counters;
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    // In thousands of 512-byte units, rounded up.
    let units = |counter: &AtomicU64| get(counter).div_ceil(512_000);
    put(&mut page, 0, &[u8::from(warning) << 1]);
    put(&mut page, 1, &TEMPERATURE.to_le_bytes());
    // Available spare and its threshold.
    put(&mut page, 3, &[100, 10]);
    put(&mut page, 32, &units(&counters.bytes_read).to_le_bytes());
    put(&mut page, 48, &units(&counters.bytes_written).to_le_bytes());
    put(&mut page, 64, &get(&counters.reads).to_le_bytes());
    put(&mut page, 80, &get(&counters.writes).to_le_bytes());
    put(&mut page, 112, &get(&counters.power_cycles).to_le_bytes());
    put(&mut page, 128, &(disk.opened().elapsed().as_secs() / 3600).to_le_bytes());
    put(&mut page, 144, &get(&counters.unsafe_shutdowns).to_le_bytes());
    put(&mut page, 176, &reports.errors().count.to_le_bytes());
    page
}

/// Firmware slot information (figure 195): slot 1 is active.
fn firmware() -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 1;
    page[8..16].fill(b' ');
    put(&mut page, 8, FIRMWARE.as_bytes());
    page
}

/// Commands supported and effects (figure 199).
fn effects() -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CHANGES_BLOCKS: u32 = 1 << 1;
    let mut page = vec![0; 4096];
    let mut set = |base: usize, opcode: u8, effect: u32| {
        put(&mut page, base + 4 * usize::from(opcode), &effect.to_le_bytes());
    };
    for opcode in admin::IMPLEMENTED {
        set(0, opcode, SUPPORTED);
    }
    for opcode in [nvm::FLUSH, nvm::READ, nvm::COMPARE] {
        set(1024, opcode, SUPPORTED);
    }
    for opcode in [nvm::WRITE, nvm::WRITE_ZEROES, nvm::DATASET_MANAGEMENT] {
        set(1024, opcode, SUPPORTED | CHANGES_BLOCKS);
    }
    page
}

/// Sets bytes of a page from the offset `at` on.
pub(super) fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in page.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}
