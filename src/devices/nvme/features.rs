//! Set Features and Get Features (sections 5.14 and 5.21).

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::spec::{Sqe, Status};

#[allow(missing_docs, reason = "the names are the specification's")]
pub(super) mod id {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    pub const INTERRUPT_VECTOR_CONFIGURATION: u8 = 0x09;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENT_CONFIGURATION: u8 = 0x0b;
    pub const TIMESTAMP: u8 = 0x0e;
    pub const HOST_BEHAVIOR: u8 = 0x16;
}

/// The composite temperature in kelvins, which never changes.
pub(super) const TEMPERATURE: u16 = 303;
/// The warning composite temperature threshold in kelvins.
pub(super) const WARNING_TEMPERATURE: u16 = 343;
/// The critical composite temperature threshold in kelvins.
pub(super) const CRITICAL_TEMPERATURE: u16 = 353;

/// The temperature's bit among the critical warnings that cause an event, in Asynchronous Event Configuration.
const EVENT_TEMPERATURE: u32 = 1 << 1;

/// Save, in command dword 10 of Set Features.
const SAVE: u32 = 1 << 31;

/// Attributes of a supported feature (Get Features, Select 3). None can be saved.
const CHANGEABLE: u32 = 1 << 2;
const NAMESPACE_SPECIFIC: u32 = 1 << 1;

/// The features that the host has set since the last reset.
#[derive(Debug, Default)]
pub(super) struct Features {
    /// The values by identifier and selector. The selector is the vector or the type of threshold, for features with
    /// several values.
    values: BTreeMap<(u8, u32), u32>,
    timestamp: Option<(u64, Instant)>,
    host_behavior: Option<Box<[u8; 512]>>,
}

/// The same, in a form to save.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedFeatures {
    values: Vec<(u8, u32, u32)>,
    /// The current timestamp in milliseconds.
    timestamp: Option<u64>,
    host_behavior: Option<Vec<u8>>,
}

/// The result of Get Features.
pub(super) enum FeatureValue {
    /// Dword 0 of the completion.
    Dword(u32),
    /// Data.
    Data(Vec<u8>),
}

/// The number of bytes that Set Features needs from the host for a feature.
pub(super) fn data_len(sqe: &Sqe) -> usize {
    match sqe.cdw10.get() as u8 {
        id::TIMESTAMP => 8,
        id::HOST_BEHAVIOR => 512,
        _ => 0,
    }
}

impl Features {
    /// The current value, or the default.
    pub fn value(&self, feature: u8, selector: u32) -> u32 {
        self.values.get(&(feature, selector)).copied().unwrap_or_else(|| default(feature, selector))
    }

    /// Executes Get Features for all features but Number of Queues.
    pub fn get(&self, sqe: &Sqe, vectors: u16) -> Result<FeatureValue, Status> {
        let feature = sqe.cdw10.get() as u8;
        let selector = selector(feature, sqe.cdw11.get(), vectors)?;
        match sqe.cdw10.get() >> 8 & 7 {
            0 => match feature {
                id::TIMESTAMP => Ok(FeatureValue::Data(self.timestamp().to_vec())),
                id::HOST_BEHAVIOR => Ok(FeatureValue::Data(
                    self.host_behavior.as_deref().map_or_else(|| vec![0; 512], |data| data.to_vec()),
                )),
                _ => Ok(FeatureValue::Dword(self.value(feature, selector))),
            },
            // No value is ever saved, so the saved value is the default.
            1 | 2 => Ok(match data_len(sqe) {
                0 => FeatureValue::Dword(default(feature, selector)),
                len => FeatureValue::Data(vec![0; len]),
            }),
            3 => {
                let specific = if feature == id::ERROR_RECOVERY { NAMESPACE_SPECIFIC } else { 0 };
                Ok(FeatureValue::Dword(CHANGEABLE | specific))
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Executes Set Features for all features but Number of Queues. `data` came with the command.
    pub fn set(&mut self, sqe: &Sqe, data: &[u8], vectors: u16) -> Result<(), Status> {
        let feature = sqe.cdw10.get() as u8;
        let value = sqe.cdw11.get();
        let selector = selector(feature, value, vectors)?;
        if sqe.cdw10.get() & SAVE != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        match feature {
            id::TIMESTAMP => {
                let mut bytes = [0; 8];
                bytes[..6].copy_from_slice(data.get(..6).ok_or(Status::INVALID_FIELD)?);
                self.timestamp = Some((u64::from_le_bytes(bytes), Instant::now()));
            }
            id::HOST_BEHAVIOR => {
                self.host_behavior = Some(Box::new(data.try_into().map_err(|_| Status::INVALID_FIELD)?));
            }
            // The only power state is number 0.
            id::POWER_MANAGEMENT if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            _ => {
                self.values.insert((feature, selector), value);
            }
        }
        Ok(())
    }

    /// Whether the temperature is past a threshold, and the host wants an event for that.
    pub fn temperature_event(&self) -> bool {
        let over = self.value(id::TEMPERATURE_THRESHOLD, 0) as u16;
        let under = self.value(id::TEMPERATURE_THRESHOLD, UNDER) as u16;
        let wanted = self.value(id::ASYNC_EVENT_CONFIGURATION, 0) & EVENT_TEMPERATURE != 0;
        wanted && (TEMPERATURE >= over || TEMPERATURE <= under)
    }

    /// Whether the temperature is past a threshold, for the critical warning in the SMART log page.
    pub fn temperature_warning(&self) -> bool {
        let over = self.value(id::TEMPERATURE_THRESHOLD, 0) as u16;
        let under = self.value(id::TEMPERATURE_THRESHOLD, UNDER) as u16;
        TEMPERATURE >= over || TEMPERATURE <= under
    }

    /// Whether writes need not be durable at once.
    pub fn write_cache(&self) -> bool {
        self.value(id::VOLATILE_WRITE_CACHE, 0) & 1 != 0
    }

    /// The state to save.
    pub fn save(&self) -> SavedFeatures {
        SavedFeatures {
            values: self.values.iter().map(|(&(feature, selector), &value)| (feature, selector, value)).collect(),
            timestamp: self.timestamp.map(|(base, since)| base.wrapping_add(since.elapsed().as_millis() as u64)),
            host_behavior: self.host_behavior.as_deref().map(|data| data.to_vec()),
        }
    }

    /// The features of a saved state; `None` if it is not possible.
    pub fn load(saved: &SavedFeatures) -> Option<Self> {
        let host_behavior = saved.host_behavior.as_ref().map(|data| data.as_slice().try_into().map(Box::new));
        Some(Features {
            values: saved.values.iter().map(|&(feature, selector, value)| ((feature, selector), value)).collect(),
            timestamp: saved.timestamp.map(|base| (base, Instant::now())),
            host_behavior: host_behavior.transpose().ok()?,
        })
    }

    /// The Timestamp data structure: milliseconds in 48 bits, and their origin. Zero if the host has set none.
    fn timestamp(&self) -> [u8; 8] {
        let Some((base, since)) = self.timestamp else { return [0; 8] };
        let now = base.wrapping_add(since.elapsed().as_millis() as u64);
        let mut bytes = now.to_le_bytes();
        // Origin: initialized by Set Features.
        bytes[6] = 1 << 1;
        bytes[7] = 0;
        bytes
    }
}

/// The selector of the under temperature threshold.
const UNDER: u32 = 1 << 20;

/// The selector of the value that a command means.
///
/// # Errors
/// The feature is not supported, or has no such value.
fn selector(feature: u8, cdw11: u32, vectors: u16) -> Result<u32, Status> {
    match feature {
        id::ARBITRATION
        | id::POWER_MANAGEMENT
        | id::ERROR_RECOVERY
        | id::VOLATILE_WRITE_CACHE
        | id::INTERRUPT_COALESCING
        | id::WRITE_ATOMICITY
        | id::ASYNC_EVENT_CONFIGURATION
        | id::TIMESTAMP
        | id::HOST_BEHAVIOR => Ok(0),
        id::INTERRUPT_VECTOR_CONFIGURATION => {
            let vector = cdw11 & 0xffff;
            if vector < u32::from(vectors) { Ok(vector) } else { Err(Status::INVALID_FIELD) }
        }
        id::TEMPERATURE_THRESHOLD => match (cdw11 >> 16 & 0xf, cdw11 >> 20 & 3) {
            // The composite sensor is the only one; 0xf means all sensors.
            (0 | 0xf, 0) => Ok(0),
            (0 | 0xf, 1) => Ok(UNDER),
            _ => Err(Status::INVALID_FIELD),
        },
        _ => Err(Status::INVALID_FIELD),
    }
}

/// The value after a reset.
fn default(feature: u8, selector: u32) -> u32 {
    match feature {
        // No limit to the arbitration burst.
        id::ARBITRATION => 7,
        id::TEMPERATURE_THRESHOLD if selector == 0 => u32::from(WARNING_TEMPERATURE),
        id::VOLATILE_WRITE_CACHE => 1,
        id::INTERRUPT_VECTOR_CONFIGURATION => selector,
        _ => 0,
    }
}
