//! What a device model is to the rest of the program, which knows none by name.

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
    /// What topologies call it: `[[name]]` in a file, `name,KEY=VALUE,...` as an option.
    pub name: &'static str,
    /// What its endpoints are called that have no name of their own, with a number behind it.
    pub endpoint_name: &'static str,
    /// Its own keys with the values of an example, `KEY=VALUE,...`: those that an endpoint must have.
    pub example: &'static str,
    /// Its own keys in a topology, beside those that all models have.
    pub keys: &'static [Key],
    /// Reads its own keys of the endpoint of this name.
    pub configure: fn(Table<'_>, &str) -> Configured,
}

/// What is made of an endpoint's table.
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
    /// What its value is.
    pub kind: Kind,
}

/// What a key's value is, for who gives it as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// A number of bytes; which ones are expected.
    Bytes(&'static str),
}

/// How an endpoint is to be, as its topology says.
pub trait Configuration: fmt::Debug + Send + Sync {
    /// The file that no other endpoint may have.
    fn own_file(&self) -> Option<OwnFile<'_>> {
        None
    }

    /// Opens what the endpoint needs for all of its life; a file that does not exist is made with `create` bytes, if that
    /// is given.
    ///
    /// # Errors
    /// What cannot be opened, and what to do.
    fn open(&self, create: Option<u64>) -> Result<Arc<dyn Device>, Box<dyn Error + Send + Sync>>;
}

/// A file that one endpoint alone may have.
#[derive(Clone, Debug)]
pub struct OwnFile<'c> {
    /// The key that names it.
    pub key: &'static str,
    /// Where it is named in the topology.
    pub span: Range<usize>,
    /// The file, relative to the working directory.
    pub path: &'c Path,
}

/// What an endpoint has for all of its life, over all functions that clients find in it and all their resets.
pub trait Device: Send + Sync {
    /// A function in its power-on state.
    fn make(&self, context: FunctionContext) -> Box<dyn Lifecycle>;

    /// The file that it has open.
    fn file(&self) -> Option<&Path> {
        None
    }

    /// What its functions did so far.
    fn stats(&self) -> DeviceStats {
        DeviceStats::default()
    }
}

/// An endpoint that needs nothing but what makes its functions.
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

/// What an endpoint's functions did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// I/O commands completed.
    pub io_count: u64,
    /// Bytes that these commands moved.
    pub io_bytes: u64,
}

/// A model's own keys of an endpoint's table, which know where they are in the topology.
pub struct Table<'i>(Spanned<DeTable<'i>>);

impl<'i> Table<'i> {
    /// Of keys that the model has.
    pub(crate) fn new(keys: Spanned<DeTable<'i>>) -> Self {
        Table(keys)
    }

    /// Reads the keys; a [`Spanned`] value knows where it was found.
    ///
    /// # Errors
    /// A value is not what `T` takes, or a key is missing.
    pub fn read<T: DeserializeOwned>(self) -> Result<T, KeyError> {
        Ok(T::deserialize(Deserializer::from(self.0))?)
    }
}

/// Something in the text of a topology that cannot be used.
#[derive(Debug)]
pub struct KeyError {
    /// Where; `None` where the text does not say it, but a default does.
    pub span: Option<Range<usize>>,
    /// The key that it is the value of.
    pub key: Option<&'static str>,
    /// What was found and what was expected.
    pub what: String,
}

impl KeyError {
    /// A problem with the value of `key`, which is at `span`: 0..0 if it is a default.
    pub fn new(key: &'static str, span: Range<usize>, what: impl Into<String>) -> KeyError {
        KeyError { span: Some(span).filter(|span| *span != (0..0)), key: Some(key), what: what.into() }
    }
}

impl From<toml::de::Error> for KeyError {
    fn from(error: toml::de::Error) -> Self {
        KeyError { span: error.span(), key: None, what: error.message().trim_end().to_string() }
    }
}
