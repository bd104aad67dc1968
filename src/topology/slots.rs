//! PCI slots, and the functions in them.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;

use super::address::Address;
use super::problem::Problem;

/// The functions that are plugged so far, by the root port that they are behind and their address.
#[derive(Default)]
pub(super) struct Slots(BTreeMap<(Option<usize>, Address), Taken>);

struct Taken {
    owner: String,
    span: Range<usize>,
}

impl Slots {
    /// Notes that `owner` is at `address`, behind the root port with this index or on the root bus.
    pub fn take(&mut self, behind: Option<usize>, address: &Spanned<Address>, owner: &str) -> Result<(), Problem> {
        let at = *address.get_ref();
        if behind.is_some() && at.device != 0 {
            let what = "a root port has one slot only; an address of 00.0 to 00.7 was expected";
            return Err(Problem::of("address", address.span(), what));
        }
        if behind.is_none() && (at.device == 0 || at.device == 31) {
            let what = format!("{at} belongs to the q35 chipset; a device from 01 to 1e was expected");
            return Err(Problem::of("address", address.span(), what));
        }
        let taken = Taken { owner: owner.to_string(), span: address.span() };
        match self.0.insert((behind, at), taken) {
            Some(other) => Err(Problem::of("address", address.span(), format!("{at} is taken by {:?}", other.owner))),
            None => Ok(()),
        }
    }

    /// Checks that each slot with functions has function 0, since software learns from it whether there are others (PCI
    /// Express base specification, section 7.5.1.1.9).
    pub fn check_first_functions(&self) -> Result<(), Problem> {
        let is_found = |&(behind, at): &(Option<usize>, Address)| {
            self.0.contains_key(&(behind, Address { device: at.device, function: 0 }))
        };
        let Some(((_, at), taken)) = self.0.iter().find(|(place, _)| !is_found(place)) else { return Ok(()) };
        let what = format!(
            "nothing is at {:02x}.0, so no guest looks for {:?} at {at}; give one of the slot's functions that address",
            at.device, taken.owner
        );
        Err(Problem::of("address", taken.span.clone(), what))
    }
}
