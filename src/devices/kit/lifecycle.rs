//! Pausing a model, and moving its state into another one.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pci::Function;

/// What every model can do beside being a function.
pub trait Lifecycle: Function {
    /// Comes to rest at the next point from which it can go on as if nothing had happened. After that there is no DMA and
    /// no interrupt until [`Lifecycle::resume`]; registers may be read and written in between, and a reset is done at
    /// once. Does nothing at rest.
    fn quiesce(&mut self);

    /// Goes on. Does nothing to a model that is not at rest.
    fn resume(&mut self);

    /// All that the driver could notice the lack of. The model is at rest.
    fn save(&self) -> SavedState;

    /// Takes the state of another one over. The model is at rest, and stays so.
    ///
    /// # Errors
    /// The state is of another model or version, or none that a model can be in. The model is as after a reset then.
    fn load(&mut self, state: &SavedState) -> Result<(), LoadError>;
}

/// A model's state, in a form that can be kept, and that another version of the model can still tell from its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// Whose it is.
    model: String,
    /// What of the model's forms it has.
    version: u32,
    value: Value,
}

/// Why a state cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("The state is one of {found}, version {version}; {expected}, version {expected_version}, was expected")]
    Other { found: String, version: u32, expected: &'static str, expected_version: u32 },
    #[error("The state cannot be read: {0}")]
    Form(#[from] serde_json::Error),
    #[error("The state is none that {model} can be in: {what}")]
    Impossible { model: &'static str, what: &'static str },
}

impl SavedState {
    /// A state of `model`, in its form `version`.
    ///
    /// # Panics
    /// If `T` is no value of JSON's: a mistake in the model.
    pub fn new<T: Serialize>(model: &'static str, version: u32, state: &T) -> Self {
        let value = serde_json::to_value(state).unwrap_or_else(|error| panic!("The state of {model}: {error}"));
        SavedState { model: model.to_owned(), version, value }
    }

    /// The state, if it is one of this model and form.
    ///
    /// # Errors
    /// It is not, or cannot be read.
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
