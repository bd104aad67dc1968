//! Numbers of bytes as QEMU writes them: `4k`, `128K`, `64M`, `1G`.

/// The units and their powers of two.
pub const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

/// The bytes that `text` says: a decimal number, with or without one of the [`UNITS`] as a suffix, upper or lower case.
///
/// # Errors
/// What was found and what was expected, when the text is no such number or does not fit in 64 bits.
pub fn parse(text: &str) -> Result<u64, String> {
    let unit = UNITS.iter().find(|(suffix, _)| text.ends_with([*suffix, suffix.to_ascii_lowercase()]));
    let (digits, shift) = match unit {
        Some((_, shift)) => (&text[..text.len() - 1], *shift),
        None => (text, 0),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("{text:?} is not a size below 16 EiB; a number like \"512M\" or \"1G\" was expected"))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4k", 4096), ("4K", 4096), ("64m", 64 << 20), ("3g", 3 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in ["", "k", "M", "4kk", "1X", "-1", "1.5G", "é", "16777216T", "99999999999999999999G"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
