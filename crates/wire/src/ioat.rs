//! I/OAT as the trace shows it.

use crate::model::{ALWAYS, Declaration, Form, Member, Part, Register, names, registers};

/// The engine's part of a command: a descriptor's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Where it reads.
    pub source: u64,
    /// Where it writes.
    pub destination: u64,
}

impl From<Command> for Part {
    fn from(Command { source, destination }: Command) -> Part {
        Part { detail: 0, words: [source, destination] }
    }
}

/// What the trace knows of the model. A state is that of CHANSTS (0 active, 2 suspended, 3 halted; a channel that is done
/// stays active here), and CHANERR.
pub const DECLARATION: Declaration = Declaration {
    opcodes: |_| OPERATIONS,
    command: &[
        Member { name: "src", form: Form::Hex, low: 32, width: 64, is_there: ALWAYS },
        Member { name: "dst", form: Form::Hex, low: 96, width: 64, is_there: ALWAYS },
    ],
    addresses: &["src", "dst"],
    tag: |_, _| None,
    state: &[
        Member { name: "chansts", form: Form::Hex, low: 32, width: 32, is_there: ALWAYS },
        Member { name: "chanerr", form: Form::Hex, low: 64, width: 32, is_there: ALWAYS },
    ],
    registers: REGISTERS,
    register_names: &names::<{ REGISTERS.len() }>(REGISTERS),
};

/// The operation types that stand in bits 31..24 of a descriptor's control word.
pub const OPERATIONS: &[(u8, &str)] =
    &[(0x00, "copy"), (0x01, "fill"), (0x87, "xor"), (0x88, "xor_val"), (0x89, "pq"), (0x8a, "pq_val")];

// The names are those of Intel's data sheets ("DMA engine", "Intel QuickData Technology").
registers! {
    /// Channel count.
    CHANCNT 0x00 1,
    /// Transfer capacity.
    XFERCAP 0x01 1,
    /// General control.
    GENCTRL 0x02 1,
    /// Interrupt control.
    INTRCTRL 0x03 1,
    /// Attention status.
    ATTNSTATUS 0x04 4,
    /// Version.
    CBVER 0x08 1,
    /// Channel control.
    CHANCTRL 0x80 2,
    /// DMA compatibility: which older programming interfaces the channel has.
    DMA_COMP 0x82 2,
    /// Channel command.
    CHANCMD 0x84 1,
    /// Descriptor count.
    DMACOUNT 0x86 2,
    /// Channel status.
    CHANSTS 0x88 8,
    /// Descriptor chain address.
    CHAINADDR 0x90 8,
    /// Completion address.
    CHANCMP 0x98 8,
    /// Channel errors.
    CHANERR 0xa8 4,
    /// Channel error mask.
    CHANERRMSK 0xac 4;
}
