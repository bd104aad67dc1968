//! Pausing a model, saving its state, and loading the state into another instance.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pci::Function;

/// The operations of every model in addition to those of a function.
pub trait Lifecycle: Function {
    /// Brings the model to rest at the next point from which it can go on as if nothing had happened. After that there
    /// is no DMA and no interrupt until [`Lifecycle::resume`]. Registers may still be read and written, and a reset
    /// takes effect at once. Does nothing to a model at rest.
    fn quiesce(&mut self);

    /// Ends the rest. Does nothing to a model that is not at rest.
    fn resume(&mut self);

    /// The state that a driver can observe. The model must be at rest.
    fn save(&self) -> SavedState;

    /// Replaces the state by a saved one. The model must be at rest, and stays at rest.
    ///
    /// # Errors
    /// The state is of another model or version, or is impossible. The model is then as after a reset.
    fn load(&mut self, state: &SavedState) -> Result<(), LoadError>;
}

/// A model's saved state. It can be serialized, and every version of the model can tell whether it can read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// The name of the model.
    model: String,
    /// The version of the model's serialized form.
    version: u32,
    value: Value,
}

/// Why a state cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("The state is one of {found}, version {version}; {expected}, version {expected_version}, was expected")]
    Other { found: String, version: u32, expected: &'static str, expected_version: u32 },
    #[error("The state cannot be read: {0}")]
    Form(#[from] serde_json::Error),
    #[error("{model} cannot be in this state: {what}")]
    Impossible { model: &'static str, what: &'static str },
}

impl SavedState {
    /// A state of `model` in version `version` of its form.
    ///
    /// # Panics
    /// If `T` cannot be serialized as JSON, which is a mistake in the model.
    pub fn new<T: Serialize>(model: &'static str, version: u32, state: &T) -> Self {
        let value = serde_json::to_value(state).unwrap_or_else(|error| panic!("The state of {model}: {error}"));
        SavedState { model: model.to_owned(), version, value }
    }

    /// The state, if it is of this model and version.
    ///
    /// # Errors
    /// It is of another model or version, or cannot be read.
    pub fn read<T: DeserializeOwned>(&self, model: &'static str, version: u32) -> Result<T, LoadError> {
        if (self.model.as_str(), self.version) != (model, version) {
            return Err(LoadError::Other {
                found: self.model.clone(),
                version: self.version,
                expected: model,
                expected_version: version,
            });
        }
        Ok(T::deserialize(&self.value)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_by_its_own_model_and_version_alone() {
        let kept = serde_json::to_string(&SavedState::new("null", 2, &[1, 2])).unwrap();
        let state: SavedState = serde_json::from_str(&kept).unwrap();
        assert_eq!(state.read::<[u8; 2]>("null", 2).unwrap(), [1, 2]);
        let refused = |model, version| state.read::<[u8; 2]>(model, version).unwrap_err().to_string();
        assert_eq!(refused("null", 3), "The state is one of null, version 2; null, version 3, was expected");
        assert_eq!(refused("nvme", 2), "The state is one of null, version 2; nvme, version 2, was expected");
        assert!(state.read::<[u8; 3]>("null", 2).unwrap_err().to_string().starts_with("The state cannot be read: "));
    }
}
