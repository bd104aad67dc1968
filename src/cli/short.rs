//! Text that somebody else may make as long as they like.

use std::fmt::{Display, Write};

/// Bytes of a text that are passed on.
const LIMIT: usize = 1024;

/// The beginning of a text, and how much of it is missing if that is not all. What is missing takes no memory.
pub fn short(text: &impl Display) -> String {
    let mut beginning = Beginning::default();
    // Only what is formatted can fail, and then it ends there.
    let _ = write!(beginning, "{text}");
    let Beginning { mut kept, cut } = beginning;
    if cut > 0 {
        kept += &format!("... ({cut} bytes more)");
    }
    kept
}

/// Keeps [`LIMIT`] bytes of what is written, and counts the rest.
#[derive(Default)]
struct Beginning {
    kept: String,
    cut: usize,
}

impl Write for Beginning {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        // What follows a gap would be misread.
        let room = if self.cut == 0 { LIMIT - self.kept.len() } else { 0 };
        let fits = |at: &usize| text.is_char_boundary(*at);
        let end = if text.len() <= room { text.len() } else { (0..=room).rev().find(fits).unwrap_or(0) };
        self.kept += &text[..end];
        self.cut += text.len() - end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters_and_says_so() {
        assert_eq!(short(&"a".repeat(LIMIT)), "a".repeat(LIMIT));
        assert_eq!(short(&"a".repeat(LIMIT + 7)), format!("{}... (7 bytes more)", "a".repeat(LIMIT)));
        // Three bytes each.
        assert_eq!(short(&"€".repeat(342)), format!("{}... (3 bytes more)", "€".repeat(341)));
        let pieces = format_args!("{}{}{}", "€".repeat(341), "€", "b").to_string();
        assert_eq!(short(&format_args!("{}{}{}", "€".repeat(341), "€", "b")), short(&pieces));
    }
}
