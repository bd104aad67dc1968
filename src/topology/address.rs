//! PCI addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// Device and function on one bus, written as QEMU's `addr` does: `04.0`, hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{:x}", self.device, self.function)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (device, function) = text.split_once('.')?;
            let device = u8::from_str_radix(device, 16).ok().filter(|device| *device < 32)?;
            let function = u8::from_str_radix(function, 16).ok().filter(|function| *function < 8)?;
            Some(Address { device, function })
        };
        parse().ok_or_else(|| {
            format!(
                "{text:?} is not a PCI address; DEVICE.FUNCTION in hexadecimal, from \"00.0\" to \"1f.7\", was expected"
            )
        })
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Bus, device and function of segment 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// The bus number.
    pub bus: u8,
    /// Device and function.
    pub address: Address,
}

impl Bdf {
    /// The 16-bit requester id, which is also the endpoint id that the VIOT gives.
    pub fn id(self) -> u32 {
        u32::from(self.bus) << 8 | u32::from(self.address.device) << 3 | u32::from(self.address.function)
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:{:02x}:{}", self.bus, self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hexadecimal() {
        assert_eq!("1f.7".parse(), Ok(Address { device: 31, function: 7 }));
        assert_eq!(Bdf { bus: 1, address: Address { device: 2, function: 3 } }.id(), 0x113);
        for bad in ["", "4", "4.8", "20.0", "-1.0", "4.0.0", "x.0"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
