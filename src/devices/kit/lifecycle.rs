//! Pausing a model, and moving its state into another one.

use serde::Serialize;
use serde::de::DeserializeOwned;
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

/// A model's state, in a form that a later version of the model can still tell from its own.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedState {
    /// Whose it is.
    model: &'static str,
    /// What of the model's forms it has.
    version: u32,
    value: Value,
}

/// Why a state cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("The state is one of {found}, version {version}; {expected}, version {expected_version}, was expected")]
    Other { found: &'static str, version: u32, expected: &'static str, expected_version: u32 },
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
        SavedState { model, version, value }
    }

    /// The state, if it is one of this model and form.
    ///
    /// # Errors
    /// It is not, or cannot be read.
    pub fn read<T: DeserializeOwned>(&self, model: &'static str, version: u32) -> Result<T, LoadError> {
        if (self.model, self.version) != (model, version) {
            return Err(LoadError::Other {
                found: self.model,
                version: self.version,
                expected: model,
                expected_version: version,
            });
        }
        Ok(T::deserialize(&self.value)?)
    }
}
