//! What is wrong with a topology, and how that is said.

use std::fmt::Write;
use std::ops::Range;

/// Something in the text of a topology that cannot be used.
#[derive(Debug)]
pub(super) struct Problem {
    /// Where; empty where the text does not say it, but a default does.
    span: Range<usize>,
    /// The key that it is the value of.
    key: Option<&'static str>,
    /// What was found and what was expected.
    what: String,
}

impl Problem {
    /// A problem with the value of `key`, which is at `span`.
    pub fn of(key: &'static str, span: Range<usize>, what: impl Into<String>) -> Problem {
        Problem { span, key: Some(key), what: what.into() }
    }

    /// A problem with all of it.
    pub fn of_all(what: impl Into<String>) -> Problem {
        Problem { span: 0..0, key: None, what: what.into() }
    }

    /// For the reader of a file: line, column, the line itself, key, and what is wrong.
    pub fn in_file(&self, text: &str) -> String {
        let mut message = String::new();
        if !self.span.is_empty() {
            let before = text.get(..self.span.start).unwrap_or_default();
            let line = before.matches('\n').count();
            let column = before.len() - before.rfind('\n').map_or(0, |at| at + 1);
            let source = text.lines().nth(line).unwrap_or_default();
            let number = line + 1;
            let margin = " ".repeat(number.to_string().len());
            let mark = "^".repeat(self.span.len().min(source.len().saturating_sub(column)).max(1));
            let _ = write!(
                message,
                "line {number}, column {}\n{margin} |\n{number} | {source}\n{margin} | {}{mark}\n",
                column + 1,
                " ".repeat(column),
            );
        }
        if let Some(key) = self.key {
            let _ = write!(message, "key `{key}`: ");
        }
        message + &self.what
    }

    /// For who gave the keys as an option, which became a line of `text` each: the key, and what is wrong.
    pub fn in_option(&self, text: &str) -> String {
        let line = text.get(..self.span.start).unwrap_or_default().matches('\n').count();
        let key = || text.lines().nth(line)?.split_once(" = ").map(|(key, _)| key);
        match self.key.or_else(key) {
            Some(key) => format!("key `{key}`: {}", self.what),
            None => self.what.clone(),
        }
    }
}

impl From<toml::de::Error> for Problem {
    fn from(error: toml::de::Error) -> Self {
        Problem { span: error.span().unwrap_or(0..0), key: None, what: error.message().trim_end().to_string() }
    }
}
