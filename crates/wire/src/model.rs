//! The device models as the trace knows them: their numbers, the names of their operations, and what of their commands
//! and states is their own.

use crate::{ioat, named_numbers, nvme};

named_numbers! {
    /// A device model.
    pub enum Model {
        /// An NVMe controller.
        Nvme = 0 "nvme",
        /// An I/OAT DMA engine.
        Ioat = 1 "ioat",
    }
}

impl Model {
    /// Where the register begins that an offset of a BAR is in; the offset itself where none is known.
    pub fn register(self, bar: u8, offset: u32) -> u32 {
        if bar != 0 {
            return offset;
        }
        let registers = self.declaration().registers;
        let behind = registers.partition_point(|register| register.offset <= offset);
        let before = behind.checked_sub(1).map(|at| registers[at]);
        let found = before.filter(|register| offset - register.offset < register.width.into());
        found.map_or(offset, |register| register.offset)
    }

    /// What the model declares.
    pub fn declaration(self) -> &'static Declaration {
        match self {
            Model::Nvme => &nvme::DECLARATION,
            Model::Ioat => &ioat::DECLARATION,
        }
    }
}

/// What a model declares of itself.
pub struct Declaration {
    /// The operations that a queue takes, by their numbers.
    pub opcodes: fn(queue: u32) -> &'static [(u8, &'static str)],
    /// The model's part of a command.
    pub command: &'static [Member],
    /// The names of those members of `command` that are first addresses of its data.
    pub addresses: &'static [&'static str],
    /// The tag that a driver gives what it maps for a command, by the command's queue and id, if tags are made of these.
    pub tag: fn(queue: u32, id: u64) -> Option<u64>,
    /// What its state is made of.
    pub state: &'static [Member],
    /// The registers of its first BAR, in the order of their offsets; none overlaps another.
    pub registers: &'static [Register],
    /// What they are called, by their offsets: [`names`] of `registers`.
    pub register_names: &'static [(u32, &'static str)],
}

/// A register, or a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// What specifications and drivers call it.
    pub name: &'static str,
    /// Its first byte in the BAR.
    pub offset: u32,
    /// Its bytes, 1 to 8.
    pub width: u8,
}

impl Register {
    /// A declaration.
    pub const fn new(name: &'static str, offset: u32, width: u8) -> Register {
        Register { name, offset, width }
    }
}

/// Declares registers, each as a constant of its name, and `REGISTERS` with all of them and with those after the semicolon.
macro_rules! registers {
    ($($(#[$about:meta])* $id:ident $offset:literal $width:literal),* ; $($more:expr),*) => {
        $($(#[$about])* pub const $id: Register = Register::new(stringify!($id), $offset, $width);)*

        const REGISTERS: &[Register] = &[$($id,)* $($more,)*];
    };
}
pub(crate) use registers;

/// The names of all `N` registers by their offsets.
pub const fn names<const N: usize>(registers: &[Register]) -> [(u32, &'static str); N] {
    let mut names = [(0, ""); N];
    let mut at = 0;
    while at < N {
        names[at] = (registers[at].offset, registers[at].name);
        at += 1;
    }
    names
}

/// What of an event is the model's own: 160 bits, of which the first 32 are `detail`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Bits 0 to 31.
    pub detail: u32,
    /// Bits 32 to 95, and 96 to 159.
    pub words: [u64; 2],
}

/// How a member's value is written.
#[derive(Clone, Copy, Debug)]
pub enum Form {
    /// In decimal.
    Number,
    /// In hexadecimal: an address or a bit mask.
    Hex,
    /// By its name, if it has one; numbers begin with 0.
    Name(&'static [&'static str]),
}

/// One value of a part. It lies in one word.
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// How it is written.
    pub form: Form,
    /// The first of its bits.
    pub low: u32,
    /// How many bits it has.
    pub width: u32,
    /// Whether an event has it.
    pub is_there: fn(queue: u32, part: &Part) -> bool,
}

/// For a [`Member`] that every event has.
pub const ALWAYS: fn(u32, &Part) -> bool = |_, _| true;

impl Member {
    /// Its value.
    pub fn get(&self, part: &Part) -> u64 {
        match self.low {
            low @ 0..32 => u64::from(part.detail) >> low & self.mask(),
            low @ 32..96 => part.words[0] >> (low - 32) & self.mask(),
            low => part.words[1] >> (low - 96) & self.mask(),
        }
    }

    /// Sets its value, which was 0; a larger one than fits is cut.
    pub fn set(&self, part: &mut Part, value: u64) {
        let value = value & self.mask();
        match self.low {
            low @ 0..32 => part.detail |= (value << low) as u32,
            low @ 32..96 => part.words[0] |= value << (low - 32),
            low => part.words[1] |= value << (low - 96),
        }
    }

    const fn mask(&self) -> u64 {
        if self.width == 64 { u64::MAX } else { (1 << self.width) - 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_a_part_do_not_overlap() {
        for model in Model::ALL {
            let Declaration { command, state, .. } = model.declaration();
            for members in [*command, *state] {
                let mut all = Part::default();
                for member in members {
                    let mut part = Part::default();
                    member.set(&mut part, u64::MAX);
                    assert_eq!(member.get(&part), member.mask(), "{}", member.name);
                    assert_eq!(member.get(&all), 0, "{} lies where another does", member.name);
                    member.set(&mut all, u64::MAX);
                }
            }
        }
    }

    #[test]
    fn registers_are_in_the_order_of_their_offsets_and_have_distinct_names() {
        for model in Model::ALL {
            let registers = model.declaration().registers;
            assert!(registers.is_sorted_by(|one, other| one.offset + u32::from(one.width) <= other.offset));
            for (n, Register { name, offset, width }) in registers.iter().enumerate() {
                assert!((1..=8).contains(width), "{name}");
                assert_eq!(model.register(0, offset + u32::from(*width) - 1), *offset);
                assert!(registers[..n].iter().all(|other| other.name != *name), "{name}");
                assert_eq!(model.declaration().register_names[n], (*offset, *name));
            }
            assert_eq!(model.declaration().register_names.len(), registers.len());
        }
    }

    #[test]
    fn bytes_between_registers_and_other_bars_have_no_name() {
        let register = |bar, offset| Model::Nvme.register(bar, offset);
        assert_eq!((register(0, 0x07), register(0, 0x1a), register(0, 0x800)), (0, 0x1a, 0x800));
        assert_eq!(register(1, 0x07), 0x07);
    }
}
