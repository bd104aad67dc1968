//! Errors in a topology, and how they are reported.

use std::fmt::Write;
use std::ops::Range;

use crate::devices::model::KeyError;

/// An error in the text of a topology.
#[derive(Debug)]
pub(super) struct Problem(KeyError);

impl Problem {
    /// A problem with the value of `key`, which is at `span`, or 0..0 for a default.
    pub fn of(key: &'static str, span: Range<usize>, what: impl Into<String>) -> Problem {
        Problem(KeyError::new(key, span, what))
    }

    /// A problem with the text at `span`.
    pub fn at(span: Range<usize>, what: impl Into<String>) -> Problem {
        Problem(KeyError { span: Some(span), key: None, what: what.into() })
    }

    /// A problem with the topology as a whole.
    pub fn of_all(what: impl Into<String>) -> Problem {
        Problem(KeyError { span: None, key: None, what: what.into() })
    }

    /// The message for the user of a file: line, column, the line itself, the key, and what is wrong.
    pub fn in_file(&self, text: &str) -> String {
        let mut message = String::new();
        let mut key = self.0.key;
        if let Some(span) = &self.0.span {
            let before = text.get(..span.start).unwrap_or_default();
            let line = before.matches('\n').count();
            let column = before.len() - before.rfind('\n').map_or(0, |at| at + 1);
            let source = text.lines().nth(line).unwrap_or_default();
            let number = line + 1;
            let margin = " ".repeat(number.to_string().len());
            let mark = "^".repeat(span.len().min(source.len().saturating_sub(column)).max(1));
            let _ = write!(
                message,
                "line {number}, column {}\n{margin} |\n{number} | {source}\n{margin} | {}{mark}\n",
                column + 1,
                " ".repeat(column),
            );
            key = key.or_else(|| key_of(source.get(..column)?));
        }
        if let Some(key) = key {
            let _ = write!(message, "key `{key}`: ");
        }
        message + &self.0.what
    }

    /// The message for the user of an option, of which each key became a line of `text`: the key, and what is wrong.
    pub fn in_option(&self, text: &str) -> String {
        let start = self.0.span.as_ref().map_or(0, |span| span.start);
        let line = text.get(..start).unwrap_or_default().matches('\n').count();
        let key = || text.lines().nth(line)?.split_once(" = ").map(|(key, _)| key);
        match self.0.key.or_else(key) {
            Some(key) => format!("key `{key}`: {}", self.0.what),
            None => self.0.what.clone(),
        }
    }
}

impl<E: Into<KeyError>> From<E> for Problem {
    fn from(error: E) -> Self {
        Problem(error.into())
    }
}

/// The key of the value that follows this part of a line.
fn key_of(before: &str) -> Option<&str> {
    before.split_once('=').map(|(key, _)| key.trim()).filter(|key| !key.is_empty())
}
