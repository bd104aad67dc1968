//! Numbers of bytes, as QEMU writes them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// A number of bytes, written with or without a suffix K, M, G or T (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift) {
            Some((suffix, shift)) => write!(f, "{}{suffix}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let unit = UNITS.iter().find(|(suffix, _)| text.ends_with([*suffix, suffix.to_ascii_lowercase()]));
            let (digits, shift) = match unit {
                Some((_, shift)) => (text.get(..text.len() - 1)?, *shift),
                None => (text, 0),
            };
            digits.parse::<u64>().ok().filter(|n| *n != 0)?.checked_mul(1 << shift).map(Size)
        };
        parse().ok_or_else(|| format!("{text:?} is not a size; a number like \"512M\" or \"1G\" was expected"))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!("512M".parse(), Ok(Size(512 << 20)));
        assert_eq!("3g".parse(), Ok(Size(3 << 30)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        assert_eq!(Size(3 << 30).to_string(), "3G");
        assert_eq!(Size(1000).to_string(), "1000");
        for bad in ["", "M", "0", "1X", "-1", "99999999999T", "1.5G", "é"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}
