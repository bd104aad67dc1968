//! The places of fields in a record.

use viommu_wire::Named;
use viommu_wire::model::{Model, Part};

use crate::event::{Access, Answer, Channel, LossPlace, ResetKind, Route, StateItem};
use crate::record::{NO_ENDPOINT, WORDS};

/// Bits of a record: `width` of them, from bit `low` of the 64-bit word `word` on.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The index of the word.
    pub word: usize,
    /// The first bit.
    pub low: u32,
    /// The number of bits. Only a [`Part`] has bits of more than one word.
    pub width: u32,
}

impl Place {
    /// The bits `low..high` of this place.
    pub const fn bits(self, low: u32, high: u32) -> Place {
        Place { low: self.low + low, width: high - low, ..self }
    }

    #[inline]
    const fn mask(self) -> u64 {
        if self.width >= 64 { u64::MAX } else { (1 << self.width) - 1 }
    }
}

/// The words of a record that fields lie in, as `docs/trace.md` names them.
#[allow(non_upper_case_globals, reason = "names of the format")]
pub mod word {
    use super::Place;

    pub const s0: Place = Place { word: 2, low: 16, width: 8 };
    pub const s1: Place = Place { word: 2, low: 24, width: 8 };
    pub const endpoint: Place = Place { word: 2, low: 32, width: 32 };
    pub const a0: Place = arg(0);
    pub const a1: Place = arg(1);
    pub const a2: Place = arg(2);
    pub const a3: Place = arg(3);
    pub const a4: Place = arg(4);
    pub const a5: Place = arg(5);

    const fn arg(n: usize) -> Place {
        Place { word: 3 + n, low: 0, width: 64 }
    }
}

/// A type that a record can hold.
pub trait Stored: Sized {
    /// The value of a field that is not there.
    fn blank() -> Self;

    /// Stores the value in a place that is 0.
    fn store(self, place: Place, words: &mut [u64; WORDS]);

    /// Loads the value.
    ///
    /// # Errors
    /// The number, if no value of the type has it.
    fn load(place: Place, words: &[u64; WORDS]) -> Result<Self, u64>;
}

/// Stores a number. One that does not fit is stored as the largest that does.
#[inline]
fn store(value: u64, place: Place, words: &mut [u64; WORDS]) {
    words[place.word] |= value.min(place.mask()) << place.low;
}

#[inline]
fn load(place: Place, words: &[u64; WORDS]) -> u64 {
    words[place.word] >> place.low & place.mask()
}

macro_rules! stored {
    (numbers: $($number:ty),*; names: $($name:ty),*) => {
        $(impl Stored for $number {
            fn blank() -> Self {
                0
            }

            #[inline]
            fn store(self, place: Place, words: &mut [u64; WORDS]) {
                store(self.into(), place, words);
            }

            #[inline]
            fn load(place: Place, words: &[u64; WORDS]) -> Result<Self, u64> {
                Ok(load(place, words) as $number)
            }
        })*
        $(impl Stored for $name {
            fn blank() -> Self {
                <$name>::ALL[0]
            }

            #[inline]
            fn store(self, place: Place, words: &mut [u64; WORDS]) {
                store(self.number().into(), place, words);
            }

            #[inline]
            fn load(place: Place, words: &[u64; WORDS]) -> Result<Self, u64> {
                let number = load(place, words);
                <$name>::from_number(number as u8).ok_or(number)
            }
        })*
    };
}

stored! {
    numbers: u8, u16, u32, u64;
    names: Access, Answer, Channel, LossPlace, Model, ResetKind, Route, StateItem
}

impl Stored for bool {
    fn blank() -> Self {
        false
    }

    #[inline]
    fn store(self, place: Place, words: &mut [u64; WORDS]) {
        store(self.into(), place, words);
    }

    #[inline]
    fn load(place: Place, words: &[u64; WORDS]) -> Result<Self, u64> {
        Ok(load(place, words) != 0)
    }
}

/// The number, and a bit above it that says that there is one.
impl Stored for Option<u32> {
    fn blank() -> Self {
        None
    }

    #[inline]
    fn store(self, place: Place, words: &mut [u64; WORDS]) {
        store(self.map_or(0, |number| u64::from(number) | 1 << 32), place, words);
    }

    #[inline]
    fn load(place: Place, words: &[u64; WORDS]) -> Result<Self, u64> {
        let number = load(place, words);
        Ok((number >> 32 != 0).then_some(number as u32))
    }
}

/// The upper half of a word, and the two words after it.
impl Stored for Part {
    fn blank() -> Self {
        Part::default()
    }

    #[inline]
    fn store(self, place: Place, words: &mut [u64; WORDS]) {
        words[place.word] |= u64::from(self.detail) << place.low;
        words[place.word + 1] = self.words[0];
        words[place.word + 2] = self.words[1];
    }

    #[inline]
    fn load(place: Place, words: &[u64; WORDS]) -> Result<Self, u64> {
        let detail = (words[place.word] >> place.low) as u32;
        Ok(Part { detail, words: [words[place.word + 1], words[place.word + 2]] })
    }
}

/// The endpoint that an event is about.
pub trait About: Sized {
    /// The endpoint's id, if there is one.
    fn id(self) -> Option<u32>;

    /// The endpoint that a record's word stands for. With a condition, there is an endpoint exactly if the condition is
    /// true: the number is the guest's then, and may equal [`NO_ENDPOINT`].
    fn of(word: u32, condition: Option<bool>) -> Self;

    /// The endpoint that a line names; `None` if the event must have one, and the line names none.
    fn read(id: Option<u32>) -> Option<Self>;
}

impl About for u32 {
    #[inline]
    fn id(self) -> Option<u32> {
        Some(self)
    }

    #[inline]
    fn of(word: u32, _: Option<bool>) -> Self {
        word
    }

    fn read(id: Option<u32>) -> Option<Self> {
        id
    }
}

impl About for Option<u32> {
    #[inline]
    fn id(self) -> Option<u32> {
        self
    }

    #[inline]
    fn of(word: u32, condition: Option<bool>) -> Self {
        condition.unwrap_or(word != NO_ENDPOINT).then_some(word)
    }

    fn read(id: Option<u32>) -> Option<Self> {
        Some(id)
    }
}
