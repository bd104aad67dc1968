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

/// The composite temperature, in kelvins: it never changes.
pub(super) const TEMPERATURE: u16 = 303;
/// Above it the controller warns.
pub(super) const WARNING_TEMPERATURE: u16 = 343;
/// Above it the controller would not go on.
pub(super) const CRITICAL_TEMPERATURE: u16 = 353;

/// SMART health critical warnings that are to be events, in the asynchronous event configuration.
const EVENT_TEMPERATURE: u32 = 1 << 1;

/// Save, in command dword 10 of Set Features.
const SAVE: u32 = 1 << 31;

/// Attributes of a supported feature (Get Features, Select 3): none can be saved.
const CHANGEABLE: u32 = 1 << 2;
const NAMESPACE_SPECIFIC: u32 = 1 << 1;

/// What the host set since the last reset.
#[derive(Debug, Default)]
pub(super) struct Features {
    /// By identifier and selector: the vector or the threshold's type, where there are several.
    values: BTreeMap<(u8, u32), u32>,
    timestamp: Option<(u64, Instant)>,
    host_behavior: Option<Box<[u8; 512]>>,
}

/// The same, to be kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedFeatures {
    values: Vec<(u8, u32, u32)>,
    /// Milliseconds, as they are now.
    timestamp: Option<u64>,
    host_behavior: Option<Vec<u8>>,
}

/// What Get Features gives.
pub(super) enum Value {
    /// Dword 0 of the completion.
    Dword(u32),
    /// Data.
    Data(Vec<u8>),
}

/// How many bytes Set Features has to fetch for a feature.
pub(super) fn data_len(sqe: &Sqe) -> usize {
    match sqe.cdw10.get() as u8 {
        id::TIMESTAMP => 8,
        id::HOST_BEHAVIOR => 512,
        _ => 0,
    }
}

impl Features {
    /// The value that holds now, or the default.
    pub fn value(&self, feature: u8, selector: u32) -> u32 {
        self.values.get(&(feature, selector)).copied().unwrap_or_else(|| default(feature, selector))
    }

    /// Get Features. The number of queues is not here.
    pub fn get(&self, sqe: &Sqe, vectors: u16) -> Result<Value, Status> {
        let feature = sqe.cdw10.get() as u8;
        let selector = selector(feature, sqe.cdw11.get(), vectors)?;
        match sqe.cdw10.get() >> 8 & 7 {
            0 => match feature {
                id::TIMESTAMP => Ok(Value::Data(self.timestamp().to_vec())),
                id::HOST_BEHAVIOR => {
                    Ok(Value::Data(self.host_behavior.as_deref().map_or_else(|| vec![0; 512], |data| data.to_vec())))
                }
                _ => Ok(Value::Dword(self.value(feature, selector))),
            },
            // None is saved, so the saved value is the default one.
            1 | 2 => Ok(match data_len(sqe) {
                0 => Value::Dword(default(feature, selector)),
                len => Value::Data(vec![0; len]),
            }),
            3 => {
                let specific = if feature == id::ERROR_RECOVERY { NAMESPACE_SPECIFIC } else { 0 };
                Ok(Value::Dword(CHANGEABLE | specific))
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Set Features with the data that it came with. The number of queues is not here.
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
            // There is one power state, number 0.
            id::POWER_MANAGEMENT if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            _ => {
                self.values.insert((feature, selector), value);
            }
        }
        Ok(())
    }

    /// Whether the temperature is past a threshold, and the host wants to be told.
    pub fn temperature_event(&self) -> bool {
        let over = self.value(id::TEMPERATURE_THRESHOLD, 0) as u16;
        let under = self.value(id::TEMPERATURE_THRESHOLD, UNDER) as u16;
        let wanted = self.value(id::ASYNC_EVENT_CONFIGURATION, 0) & EVENT_TEMPERATURE != 0;
        wanted && (TEMPERATURE >= over || TEMPERATURE <= under)
    }

    /// Whether a temperature threshold is passed: a critical warning in the SMART log page.
    pub fn temperature_warning(&self) -> bool {
        let over = self.value(id::TEMPERATURE_THRESHOLD, 0) as u16;
        let under = self.value(id::TEMPERATURE_THRESHOLD, UNDER) as u16;
        TEMPERATURE >= over || TEMPERATURE <= under
    }

    /// Whether writes need not be durable at once.
    pub fn write_cache(&self) -> bool {
        self.value(id::VOLATILE_WRITE_CACHE, 0) & 1 != 0
    }

    /// What they are to go on from.
    pub fn save(&self) -> SavedFeatures {
        SavedFeatures {
            values: self.values.iter().map(|(&(feature, selector), &value)| (feature, selector, value)).collect(),
            timestamp: self.timestamp.map(|(base, since)| base.wrapping_add(since.elapsed().as_millis() as u64)),
            host_behavior: self.host_behavior.as_deref().map(|data| data.to_vec()),
        }
    }

    /// Those that go on from there; `None` if there are no such.
    pub fn load(saved: &SavedFeatures) -> Option<Self> {
        let host_behavior = saved.host_behavior.as_ref().map(|data| data.as_slice().try_into().map(Box::new));
        Some(Features {
            values: saved.values.iter().map(|&(feature, selector, value)| ((feature, selector), value)).collect(),
            timestamp: saved.timestamp.map(|base| (base, Instant::now())),
            host_behavior: host_behavior.transpose().ok()?,
        })
    }

    /// Milliseconds in 48 bits, and where they come from: the host, or the time since the reset.
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

/// The selector of the temperature threshold that is a lower bound.
const UNDER: u32 = 1 << 20;

/// What besides the identifier says which value is meant.
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
            // There is the composite sensor only; 0xf means all.
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
        // No limit to the burst.
        id::ARBITRATION => 7,
        id::TEMPERATURE_THRESHOLD if selector == 0 => u32::from(WARNING_TEMPERATURE),
        id::VOLATILE_WRITE_CACHE => 1,
        id::INTERRUPT_VECTOR_CONFIGURATION => selector,
        _ => 0,
    }
}
