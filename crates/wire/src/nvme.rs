//! NVMe as the trace shows it.

use crate::model::{ALWAYS, Declaration, Form, Member, Part, Register, names, registers};
use crate::named_numbers;
use crate::split::Flow;

named_numbers! {
    /// How a command described its data.
    pub enum DataPointer {
        /// The command moves no data.
        None = 0 "none",
        /// Physical region pages.
        Prp = 1 "prp",
        /// A scatter-gather list.
        Sgl = 2 "sgl",
    }
}

/// The controller's part of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// The starting LBA, 0 for a command that has none.
    pub slba: u64,
    /// How the data is described.
    pub pointer: DataPointer,
    /// The first address of the data pointer: PRP1, or that of the first SGL descriptor.
    pub data: u64,
}

const SLBA: Member = Member { name: "slba", form: Form::Number, low: 32, width: 64, is_there: |queue, _| queue != 0 };
const POINTER: Member =
    Member { name: "pointer", form: Form::Name(&["none", "prp", "sgl"]), low: 0, width: 2, is_there: ALWAYS };
const DATA: Member =
    Member { name: "data", form: Form::Hex, low: 96, width: 64, is_there: |_, part| POINTER.get(part) != 0 };

impl From<Command> for Part {
    fn from(Command { slba, pointer, data }: Command) -> Part {
        Part { detail: (pointer as u8).into(), words: [slba, data] }
    }
}

impl From<Part> for Command {
    fn from(part: Part) -> Command {
        let pointer = DataPointer::from_number(POINTER.get(&part) as u8).unwrap_or(DataPointer::None);
        Command { slba: SLBA.get(&part), pointer, data: DATA.get(&part) }
    }
}

/// What the trace knows of the model. A state is the registers CC and CSTS.
pub const DECLARATION: Declaration = Declaration {
    opcodes: |queue| if queue == 0 { ADMIN } else { IO },
    command: &[SLBA, POINTER, DATA],
    addresses: &[DATA.name],
    tag: |queue, id| Some(Flow::NVME.tag(u64::from(queue) << 16 | id)),
    state: &[
        Member { name: "cc", form: Form::Hex, low: 32, width: 32, is_there: ALWAYS },
        Member { name: "csts", form: Form::Hex, low: 64, width: 32, is_there: ALWAYS },
    ],
    registers: REGISTERS,
    register_names: &names::<{ REGISTERS.len() }>(REGISTERS),
};

/// The controller's registers, and the doorbells of these queues.
macro_rules! registers_and_doorbells {
    ({ $($registers:tt)* } $($queue:literal)*) => {
        registers! {
            $($registers)* ;
            $(
                Register::new(concat!("SQ", $queue, "TDBL"), 0x1000 + 8 * $queue, 4),
                Register::new(concat!("CQ", $queue, "HDBL"), 0x1004 + 8 * $queue, 4)
            ),*
        }
    };
}

// The names and places are those of the NVMe base specification, section 3.1.
registers_and_doorbells! {
    {
        /// Controller capabilities.
        CAP 0x00 8,
        /// Version.
        VS 0x08 4,
        /// Interrupt mask set.
        INTMS 0x0c 4,
        /// Interrupt mask clear.
        INTMC 0x10 4,
        /// Controller configuration.
        CC 0x14 4,
        /// Controller status.
        CSTS 0x1c 4,
        /// NVM subsystem reset.
        NSSR 0x20 4,
        /// Admin queue attributes.
        AQA 0x24 4,
        /// Admin submission queue base address.
        ASQ 0x28 8,
        /// Admin completion queue base address.
        ACQ 0x30 8,
        /// Controller memory buffer location.
        CMBLOC 0x38 4,
        /// Controller memory buffer size.
        CMBSZ 0x3c 4
    }
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
    40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64
}

/// Linux's `enum nvme_admin_opcode` without the prefix: what queue 0 takes.
pub const ADMIN: &[(u8, &str)] = &[
    (0x00, "delete_sq"),
    (0x01, "create_sq"),
    (0x02, "get_log_page"),
    (0x04, "delete_cq"),
    (0x05, "create_cq"),
    (0x06, "identify"),
    (0x08, "abort_cmd"),
    (0x09, "set_features"),
    (0x0a, "get_features"),
    (0x0c, "async_event"),
    (0x0d, "ns_mgmt"),
    (0x10, "activate_fw"),
    (0x11, "download_fw"),
    (0x14, "dev_self_test"),
    (0x15, "ns_attach"),
    (0x18, "keep_alive"),
    (0x19, "directive_send"),
    (0x1a, "directive_recv"),
    (0x1c, "virtual_mgmt"),
    (0x1d, "nvme_mi_send"),
    (0x1e, "nvme_mi_recv"),
    (0x7c, "dbbuf"),
    (0x80, "format_nvm"),
    (0x81, "security_send"),
    (0x82, "security_recv"),
    (0x84, "sanitize_nvm"),
    (0x86, "get_lba_status"),
];

/// Linux's `enum nvme_opcode` without the prefix: what the other queues take.
pub const IO: &[(u8, &str)] = &[
    (0x00, "flush"),
    (0x01, "write"),
    (0x02, "read"),
    (0x04, "write_uncor"),
    (0x05, "compare"),
    (0x08, "write_zeroes"),
    (0x09, "dsm"),
    (0x0c, "verify"),
    (0x0d, "resv_register"),
    (0x0e, "resv_report"),
    (0x11, "resv_acquire"),
    (0x15, "resv_release"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_its_part() {
        for pointer in DataPointer::ALL {
            let command = Command { slba: u64::MAX, pointer: *pointer, data: 0x1234_5678_9abc_def0 };
            assert_eq!(Command::from(Part::from(command)), command);
        }
        let names: Vec<_> = DataPointer::ALL.iter().map(|pointer| pointer.name()).collect();
        assert!(matches!(POINTER.form, Form::Name(found) if found == names));
    }
}
