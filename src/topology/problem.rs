//! What is wrong with a topology, and how that is said.

use std::fmt::Write;
use std::ops::Range;

/// Something in the text of a topology that cannot be used.
#[derive(Debug)]
pub(super) struct Problem {
    /// Where; `None` where the text does not say it, but a default does.
    span: Option<Range<usize>>,
    /// The key that it is the value of.
    key: Option<&'static str>,
    /// What was found and what was expected.
    what: String,
}

impl Problem {
    /// A problem with the value of `key`, which is at `span`: 0..0 if it is a default.
    pub fn of(key: &'static str, span: Range<usize>, what: impl Into<String>) -> Problem {
        Problem { span: Some(span).filter(|span| *span != (0..0)), key: Some(key), what: what.into() }
    }

    /// A problem with all of it.
    pub fn of_all(what: impl Into<String>) -> Problem {
        Problem { span: None, key: None, what: what.into() }
    }

    /// For the reader of a file: line, column, the line itself, key, and what is wrong.
    pub fn in_file(&self, text: &str) -> String {
        let mut message = String::new();
        let mut key = self.key;
        if let Some(span) = &self.span {
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
        message + &self.what
    }

    /// For who gave the keys as an option, which became a line of `text` each: the key, and what is wrong.
    pub fn in_option(&self, text: &str) -> String {
        let start = self.span.as_ref().map_or(0, |span| span.start);
        let line = text.get(..start).unwrap_or_default().matches('\n').count();
        let key = || text.lines().nth(line)?.split_once(" = ").map(|(key, _)| key);
        match self.key.or_else(key) {
            Some(key) => format!("key `{key}`: {}", self.what),
            None => self.what.clone(),
        }
    }
}

impl From<toml::de::Error> for Problem {
    fn from(error: toml::de::Error) -> Self {
        Problem { span: error.span(), key: None, what: error.message().trim_end().to_string() }
    }
}

/// The key of the value that comes after this part of a line.
fn key_of(before: &str) -> Option<&str> {
    before.split_once('=').map(|(key, _)| key.trim()).filter(|key| !key.is_empty())
}
