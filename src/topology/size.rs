//! Numbers of bytes, as QEMU writes them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};
use viommu_wire::size::{self, UNITS};

/// A number of bytes, not 0, written with or without a suffix K, M, G or T (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

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
        match size::parse(text)? {
            0 => Err(format!("{text:?} is not a size; a number like \"512M\" or \"1G\" was expected")),
            bytes => Ok(Size(bytes)),
        }
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
        for bad in ["", "0", "0K", "1X"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}
