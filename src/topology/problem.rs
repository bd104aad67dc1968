//! What is wrong with a topology, and how that is said.

use std::fmt::Write;
use std::ops::Range;

use crate::devices::model::KeyError;

/// Something in the text of a topology that cannot be used.
#[derive(Debug)]
pub(super) struct Problem(KeyError);

impl Problem {
    /// A problem with the value of `key`, which is at `span`: 0..0 if it is a default.
    pub fn of(key: &'static str, span: Range<usize>, what: impl Into<String>) -> Problem {
        Problem(KeyError::new(key, span, what))
    }

    /// A problem with what is at `span`.
    pub fn at(span: Range<usize>, what: impl Into<String>) -> Problem {
        Problem(KeyError { span: Some(span), key: None, what: what.into() })
    }

    /// A problem with all of it.
    pub fn of_all(what: impl Into<String>) -> Problem {
        Problem(KeyError { span: None, key: None, what: what.into() })
    }

    /// For the reader of a file: line, column, the line itself, key, and what is wrong.
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

    /// For who gave the keys as an option, which became a line of `text` each: the key, and what is wrong.
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

/// The key of the value that comes after this part of a line.
fn key_of(before: &str) -> Option<&str> {
    before.split_once('=').map(|(key, _)| key.trim()).filter(|key| !key.is_empty())
}
