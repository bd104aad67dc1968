//! I/OAT as the trace shows it.

use crate::model::{ALWAYS, Declaration, Form, Member, Part, Register, names};

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
    registers: &REGISTERS,
    register_names: &names(&REGISTERS),
};

/// The operation types that stand in bits 31..24 of a descriptor's control word.
pub const OPERATIONS: &[(u8, &str)] =
    &[(0x00, "copy"), (0x01, "fill"), (0x87, "xor"), (0x88, "xor_val"), (0x89, "pq"), (0x8a, "pq_val")];

// The names are those of Intel's data sheets ("DMA engine", "Intel QuickData Technology").

/// Channel count.
pub const CHANCNT: Register = Register::new("CHANCNT", 0x00, 1);
/// Transfer capacity.
pub const XFERCAP: Register = Register::new("XFERCAP", 0x01, 1);
/// General control.
pub const GENCTRL: Register = Register::new("GENCTRL", 0x02, 1);
/// Interrupt control.
pub const INTRCTRL: Register = Register::new("INTRCTRL", 0x03, 1);
/// Attention status.
pub const ATTNSTATUS: Register = Register::new("ATTNSTATUS", 0x04, 4);
/// Version.
pub const CBVER: Register = Register::new("CBVER", 0x08, 1);
/// Channel control.
pub const CHANCTRL: Register = Register::new("CHANCTRL", 0x80, 2);
/// DMA compatibility: which older programming interfaces the channel has.
pub const DMA_COMP: Register = Register::new("DMA_COMP", 0x82, 2);
/// Channel command.
pub const CHANCMD: Register = Register::new("CHANCMD", 0x84, 1);
/// Descriptor count.
pub const DMACOUNT: Register = Register::new("DMACOUNT", 0x86, 2);
/// Channel status.
pub const CHANSTS: Register = Register::new("CHANSTS", 0x88, 8);
/// Descriptor chain address.
pub const CHAINADDR: Register = Register::new("CHAINADDR", 0x90, 8);
/// Completion address.
pub const CHANCMP: Register = Register::new("CHANCMP", 0x98, 8);
/// Channel errors.
pub const CHANERR: Register = Register::new("CHANERR", 0xa8, 4);
/// Channel error mask.
pub const CHANERRMSK: Register = Register::new("CHANERRMSK", 0xac, 4);

const REGISTERS: [Register; 15] = [
    CHANCNT, XFERCAP, GENCTRL, INTRCTRL, ATTNSTATUS, CBVER, CHANCTRL, DMA_COMP, CHANCMD, DMACOUNT, CHANSTS, CHAINADDR,
    CHANCMP, CHANERR, CHANERRMSK,
];
