//! A device model as the rest of the program sees it, which knows none by name.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, Deserializer};

use super::kit::Lifecycle;
use crate::pci::FunctionContext;

/// A device model: an entry in [`super::MODELS`].
pub struct Model {
    /// Its name in topologies: `[[name]]` in a file, `name,KEY=VALUE,...` as an option.
    pub name: &'static str,
    /// The name of its endpoints that have none of their own, to which a number is appended.
    pub endpoint_name: &'static str,
    /// The keys that an endpoint must have, with example values: `KEY=VALUE,...`.
    pub example: &'static str,
    /// Its own keys in a topology, in addition to those of all models.
    pub keys: &'static [Key],
    /// Reads its own keys of the endpoint with the given name.
    pub configure: fn(KeyTable<'_>, &str) -> Configured,
}

/// The configuration that is made of an endpoint's table.
pub type Configured = Result<Arc<dyn Configuration>, KeyError>;

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// One of a model's own keys in a topology.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The kind of its value.
    pub kind: KeyKind,
}

/// The kind of a key's value, for values that are given as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// Text.
    Text,
    /// A number of bytes; the text says which numbers are expected.
    Bytes(&'static str),
}

/// The configuration of an endpoint, as its topology gives it.
pub trait Configuration: fmt::Debug + Send + Sync {
    /// The file that no other endpoint may use, if there is one.
    fn own_file(&self) -> Option<OwnFile<'_>> {
        None
    }

    /// Opens what the endpoint needs as long as it exists. If `create` is given, a file that does not exist is made
    /// with that many bytes.
    ///
    /// # Errors
    /// Something cannot be opened. The error says what, and what to do.
    fn open(&self, create: Option<u64>) -> Result<Arc<dyn Device>, Box<dyn Error + Send + Sync>>;
}

/// A file that only one endpoint may use.
#[derive(Clone, Debug)]
pub struct OwnFile<'c> {
    /// The key that names it.
    pub key: &'static str,
    /// Where the topology names it, in bytes.
    pub span: Range<usize>,
    /// The file, relative to the working directory.
    pub path: &'c Path,
}

/// What an endpoint has as long as it exists. It outlives the functions that clients find in it, and their resets.
pub trait Device: Send + Sync {
    /// Makes a function in its power-on state.
    fn make(&self, context: FunctionContext) -> Box<dyn Lifecycle>;

    /// The file that it has open, if there is one.
    fn file(&self) -> Option<&Path> {
        None
    }

    /// The statistics of all its functions so far.
    fn stats(&self) -> DeviceStats {
        DeviceStats::default()
    }
}

/// An endpoint that needs nothing but the function that makes its functions.
#[derive(Clone, Copy, Debug)]
pub struct Plain(pub fn(FunctionContext) -> Box<dyn Lifecycle>);

impl Configuration for Plain {
    fn open(&self, _create: Option<u64>) -> Result<Arc<dyn Device>, Box<dyn Error + Send + Sync>> {
        Ok(Arc::new(*self))
    }
}

impl Device for Plain {
    fn make(&self, context: FunctionContext) -> Box<dyn Lifecycle> {
        (self.0)(context)
    }
}

/// The statistics of an endpoint's functions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// The number of I/O commands that completed.
    pub io_count: u64,
    /// The number of bytes that they moved.
    pub io_bytes: u64,
}

/// A model's own keys in an endpoint's table, with their places in the topology.
pub struct KeyTable<'i>(Spanned<DeTable<'i>>);

impl<'i> KeyTable<'i> {
    /// A table of keys that the model has.
    pub(crate) fn new(keys: Spanned<DeTable<'i>>) -> Self {
        KeyTable(keys)
    }

    /// Reads the keys. A [`Spanned`] value knows where it was found.
    ///
    /// # Errors
    /// A value does not fit `T`, or a key is missing.
    pub fn read<T: DeserializeOwned>(self) -> Result<T, KeyError> {
        Ok(T::deserialize(Deserializer::from(self.0))?)
    }
}

/// An error in a topology.
#[derive(Debug)]
pub struct KeyError {
    /// Where it is, in bytes; `None` if the value is a default, which the text does not have.
    pub span: Option<Range<usize>>,
    /// The key whose value is wrong.
    pub key: Option<&'static str>,
    /// What was found, and what was expected.
    pub what: String,
}

impl KeyError {
    /// A wrong value of `key`. `span` is the value's place, or 0..0 if it is a default.
    pub fn new(key: &'static str, span: Range<usize>, what: impl Into<String>) -> KeyError {
        KeyError { span: Some(span).filter(|span| *span != (0..0)), key: Some(key), what: what.into() }
    }
}

impl From<toml::de::Error> for KeyError {
    fn from(error: toml::de::Error) -> Self {
        KeyError { span: error.span(), key: None, what: error.message().trim_end().to_string() }
    }
}
