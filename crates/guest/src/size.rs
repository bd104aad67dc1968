//! Sizes as people write them: `4k`, `128K`, `64M`, `1G`.

/// Parses a size in bytes with an optional binary suffix (k, M, G).
///
/// # Errors
/// A message for the command line.
pub fn parse(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("wanted a size such as 4k, 128k or 64M, found {text:?}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} does not fit in 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn suffixes_are_binary() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("4k"), Ok(4096));
        assert_eq!(parse("64M"), Ok(64 << 20));
        assert_eq!(parse("1G"), Ok(1 << 30));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(parse("").is_err());
        assert!(parse("k").is_err());
        assert!(parse("4kk").is_err());
        assert!(parse("99999999999999999999G").is_err());
        assert!(parse("17179869184G").is_err());
    }
}
