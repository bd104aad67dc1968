//! Asynchronous events (section 5.2), and what the error log keeps of a failed command.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::log::ErrorLog;
use super::spec::Status;
use crate::sync::lock;

/// Error status: the log page that tells more.
const LOG_ERROR: u8 = 1;
/// SMART / health status.
const LOG_HEALTH: u8 = 2;

/// Event types.
const TYPE_ERROR: u8 = 0;
const TYPE_HEALTH: u8 = 1;
/// SMART / health information: temperature threshold.
const HEALTH_TEMPERATURE: u8 = 1;

/// One command that failed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct ErrorInfo {
    pub queue: u16,
    pub cid: u16,
    pub status: Status,
    pub nsid: u32,
    pub lba: u64,
}

/// What any thread may have to tell the host.
#[derive(Default)]
pub(super) struct Reports {
    events: Mutex<AsyncEvents>,
    errors: Mutex<ErrorLog>,
}

impl Reports {
    /// Events that the host was not told of yet.
    pub fn events(&self) -> MutexGuard<'_, AsyncEvents> {
        lock(&self.events)
    }

    /// Commands that failed; a reset keeps them.
    pub fn errors(&self) -> MutexGuard<'_, ErrorLog> {
        lock(&self.errors)
    }
}

/// Events that the host was not told of yet.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct AsyncEvents {
    queue: VecDeque<(u8, u8, u8)>,
    /// By type: told, and no more of that type until the host has read its log page.
    masked: [bool; 2],
}

impl AsyncEvents {
    /// An error event.
    pub fn error(&mut self, information: u8) {
        self.push(TYPE_ERROR, information, LOG_ERROR);
    }

    /// The temperature passed a threshold.
    pub fn temperature(&mut self) {
        self.push(TYPE_HEALTH, HEALTH_TEMPERATURE, LOG_HEALTH);
    }

    fn push(&mut self, kind: u8, information: u8, log: u8) {
        // One of a type says it all: the log page has the rest.
        if !self.queue.iter().any(|event| event.0 == kind) {
            self.queue.push_back((kind, information, log));
        }
    }

    /// The result of an Asynchronous Event Request that can be completed now.
    pub fn take(&mut self) -> Option<u32> {
        let at = self.queue.iter().position(|event| !self.masked[usize::from(event.0)])?;
        let (kind, information, log) = self.queue.remove(at)?;
        self.masked[usize::from(kind)] = true;
        Some(u32::from(kind) | u32::from(information) << 8 | u32::from(log) << 16)
    }

    /// Whether a controller can have such events.
    pub fn are_possible(&self) -> bool {
        self.queue.iter().all(|event| usize::from(event.0) < self.masked.len())
    }

    /// The host has read a log page.
    pub fn read(&mut self, log: u8) {
        match log {
            LOG_ERROR => self.masked[usize::from(TYPE_ERROR)] = false,
            LOG_HEALTH => self.masked[usize::from(TYPE_HEALTH)] = false,
            _ => {}
        }
    }
}
