//! I/OAT as the trace shows it.

use crate::model::{ALWAYS, Declaration, Form, Member, Part};

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
    state: &[
        Member { name: "chansts", form: Form::Hex, low: 32, width: 32, is_there: ALWAYS },
        Member { name: "chanerr", form: Form::Hex, low: 64, width: 32, is_there: ALWAYS },
    ],
    registers: REGISTERS,
};

/// The operation types that stand in bits 31..24 of a descriptor's control word.
pub const OPERATIONS: &[(u8, &str)] =
    &[(0x00, "copy"), (0x01, "fill"), (0x87, "xor"), (0x88, "xor_val"), (0x89, "pq"), (0x8a, "pq_val")];

/// The names of Intel's data sheets ("DMA engine", "Intel QuickData Technology").
const REGISTERS: &[(u32, &str)] = &[
    (0x00, "CHANCNT"),
    (0x01, "XFERCAP"),
    (0x02, "GENCTRL"),
    (0x03, "INTRCTRL"),
    (0x04, "ATTNSTATUS"),
    (0x08, "CBVER"),
    (0x80, "CHANCTRL"),
    (0x82, "DMA_COMP"),
    (0x84, "CHANCMD"),
    (0x86, "DMACOUNT"),
    (0x88, "CHANSTS"),
    (0x90, "CHAINADDR"),
    (0x98, "CHANCMP"),
    (0xa8, "CHANERR"),
    (0xac, "CHANERRMSK"),
];
