//! Asynchronous events (section 5.2), and entries of the error log.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::log::ErrorLog;
use super::spec::Status;
use crate::sync::lock;

/// The log page for events of the type error status.
const LOG_ERROR: u8 = 1;
/// The log page for events of the type SMART / health status.
const LOG_HEALTH: u8 = 2;

/// Event types.
const TYPE_ERROR: u8 = 0;
const TYPE_HEALTH: u8 = 1;
/// SMART / health information: temperature threshold.
const HEALTH_TEMPERATURE: u8 = 1;

/// A command that failed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct ErrorInfo {
    pub queue: u16,
    pub cid: u16,
    pub status: Status,
    pub nsid: u32,
    pub lba: u64,
}

/// Reports to the host that any thread may make.
#[derive(Default)]
pub(super) struct Reports {
    events: Mutex<AsyncEvents>,
    errors: Mutex<ErrorLog>,
}

impl Reports {
    /// Events that were not sent to the host yet.
    pub fn events(&self) -> MutexGuard<'_, AsyncEvents> {
        lock(&self.events)
    }

    /// Commands that failed. A reset keeps them.
    pub fn errors(&self) -> MutexGuard<'_, ErrorLog> {
        lock(&self.errors)
    }
}

/// Events that were not sent to the host yet.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct AsyncEvents {
    queue: VecDeque<(u8, u8, u8)>,
    /// By type: an event was sent, and the next one waits until the host has read the log page.
    masked: [bool; 2],
}

impl AsyncEvents {
    /// Adds an error event.
    pub fn error(&mut self, information: u8) {
        self.push(TYPE_ERROR, information, LOG_ERROR);
    }

    /// Adds an event for a temperature past a threshold.
    pub fn temperature(&mut self) {
        self.push(TYPE_HEALTH, HEALTH_TEMPERATURE, LOG_HEALTH);
    }

    fn push(&mut self, kind: u8, information: u8, log: u8) {
        // One event of a type is enough, since the log page has the details.
        if !self.queue.iter().any(|event| event.0 == kind) {
            self.queue.push_back((kind, information, log));
        }
    }

    /// Takes an event to send: the result of an Asynchronous Event Request.
    pub fn take(&mut self) -> Option<u32> {
        let at = self.queue.iter().position(|event| !self.masked[usize::from(event.0)])?;
        let (kind, information, log) = self.queue.remove(at)?;
        self.masked[usize::from(kind)] = true;
        Some(u32::from(kind) | u32::from(information) << 8 | u32::from(log) << 16)
    }

    /// Whether such events are possible.
    pub fn are_possible(&self) -> bool {
        self.queue.iter().all(|event| usize::from(event.0) < self.masked.len())
    }

    /// Notes that the host has read a log page.
    pub fn read(&mut self, log: u8) {
        match log {
            LOG_ERROR => self.masked[usize::from(TYPE_ERROR)] = false,
            LOG_HEALTH => self.masked[usize::from(TYPE_HEALTH)] = false,
            _ => {}
        }
    }
}
