//! The controller's registers (section 3.1), and what a write to them asks for. This module does no DMA and knows no
//! thread.

use serde::{Deserialize, Serialize};

use super::spec::{Cc, MPS_MAX, QUEUE_ENTRIES_MAX, VERSION};
use crate::devices::kit::registers::{Register, RegisterAccess, RegisterMap};
use crate::devices::kit::ring::{CommandRing, CompletionRing};
use viommu_wire::nvme;

/// The offset of the doorbells. From there, submission queue y's tail is at 8y, and completion queue y's head at 8y +
/// 4.
pub(super) const DOORBELLS: u64 = 0x1000;

/// How long the host should wait for CSTS.RDY to change, in units of 500 ms.
const READY_TIMEOUT: u64 = 60;

/// Identifies a register, by its name in the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub(super) enum Id {
    Cap,
    Vs,
    Intms,
    Intmc,
    Cc,
    Csts,
    Aqa,
    Asq,
    Acq,
}

/// All registers except the doorbells.
pub(super) const REGISTERS: RegisterMap<Id> = RegisterMap::new(&[
    Register::new(Id::Cap, nvme::CAP, RegisterAccess::ReadOnly),
    Register::new(Id::Vs, nvme::VS, RegisterAccess::ReadOnly),
    Register::new(Id::Intms, nvme::INTMS, RegisterAccess::WriteOne),
    Register::new(Id::Intmc, nvme::INTMC, RegisterAccess::WriteOne),
    Register::new(Id::Cc, nvme::CC, RegisterAccess::ReadWrite),
    Register::new(Id::Csts, nvme::CSTS, RegisterAccess::ReadOnly),
    Register::new(Id::Aqa, nvme::AQA, RegisterAccess::ReadWrite),
    Register::new(Id::Asq, nvme::ASQ, RegisterAccess::ReadWrite),
    Register::new(Id::Acq, nvme::ACQ, RegisterAccess::ReadWrite),
]);

/// The values that the host wrote last. CSTS is not included, since the controller's threads write it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub cc: Cc,
    /// Admin queue attributes and addresses, which a reset by CC.EN keeps.
    aqa: u32,
    asq: u64,
    acq: u64,
    /// Vectors that are masked, a bit each (sections 3.1.3 and 3.1.4).
    pub interrupt_mask: u32,
}

/// What a write to a register asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RegisterRequest {
    /// The interrupt mask was written.
    pub mask: bool,
    /// A controller reset, before anything else.
    pub disable: bool,
    /// Enable the controller.
    pub enable: bool,
    /// A shutdown, with the value of CC.SHN.
    pub shutdown: Option<u8>,
}

/// The admin queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AdminQueues {
    pub sq: CommandRing,
    pub cq: CompletionRing,
}

impl Registers {
    /// The value of a register. `csts` is the value of CSTS.
    pub fn read(&self, id: Id, csts: u32) -> u64 {
        match id {
            Id::Cap => capabilities(),
            Id::Vs => VERSION.into(),
            Id::Intms | Id::Intmc => self.interrupt_mask.into(),
            Id::Cc => self.cc.0.into(),
            Id::Csts => csts.into(),
            Id::Aqa => self.aqa.into(),
            Id::Asq => self.asq,
            Id::Acq => self.acq,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, id: Id, value: u64) -> RegisterRequest {
        match id {
            Id::Intms => return self.set_mask(self.interrupt_mask | value as u32),
            Id::Intmc => return self.set_mask(self.interrupt_mask & !(value as u32)),
            Id::Cc => return self.set_cc(Cc(value as u32)),
            Id::Aqa => self.aqa = value as u32 & 0x0fff_0fff,
            Id::Asq => self.asq = value & !0xfff,
            Id::Acq => self.acq = value & !0xfff,
            Id::Cap | Id::Vs | Id::Csts => {}
        }
        RegisterRequest::default()
    }

    fn set_mask(&mut self, mask: u32) -> RegisterRequest {
        self.interrupt_mask = mask;
        RegisterRequest { mask: true, ..RegisterRequest::default() }
    }

    /// Writes CC. While the controller is enabled, fields that the host must not change then (section 3.1.5) keep their
    /// values.
    fn set_cc(&mut self, mut cc: Cc) -> RegisterRequest {
        let before = self.cc;
        let (was, is) = (before.en(), cc.en());
        if was && is {
            cc.0 = cc.0 & !Cc::FIXED | before.0 & Cc::FIXED;
        }
        self.cc = cc;
        let shutdown = cc.shn() != 0 && before.shn() == 0;
        RegisterRequest { mask: false, disable: was && !is, enable: is && !was, shutdown: shutdown.then_some(cc.shn()) }
    }

    /// The admin queues with which to enable the controller; `None` if they are not possible, or if CC has an
    /// unsupported command set, page size or arbitration.
    pub fn admin_queues(&self) -> Option<AdminQueues> {
        let (sq_size, cq_size) = ((self.aqa & 0xfff) + 1, (self.aqa >> 16) + 1);
        let page = self.page_size();
        let aligned = self.asq.is_multiple_of(page) && self.acq.is_multiple_of(page);
        let queues =
            AdminQueues { sq: CommandRing::new(self.asq, sq_size)?, cq: CompletionRing::new(self.acq, cq_size)? };
        (self.is_supported() && aligned).then_some(queues)
    }

    /// Whether the controller supports the command set, page size and arbitration in CC.
    pub fn is_supported(&self) -> bool {
        self.cc.css() == 0 && self.cc.mps() <= MPS_MAX && self.cc.ams() == 0
    }

    /// CC.EN.
    pub fn is_enabled(&self) -> bool {
        self.cc.en()
    }

    /// The memory page size in bytes.
    pub fn page_size(&self) -> u64 {
        self.cc.page_size()
    }

    /// Resets the registers at a function-level reset. For a controller reset, [`Registers::write`] does all that is
    /// needed.
    pub fn reset(&mut self) {
        *self = Registers::default();
    }
}

fn capabilities() -> u64 {
    const CONTIGUOUS_QUEUES: u64 = 1 << 16;
    const NVM_COMMAND_SET: u64 = 1 << 37;
    u64::from(QUEUE_ENTRIES_MAX - 1)
        | CONTIGUOUS_QUEUES
        | READY_TIMEOUT << 24
        | NVM_COMMAND_SET
        | u64::from(MPS_MAX) << 52
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const NONE: RegisterRequest = RegisterRequest { mask: false, disable: false, enable: false, shutdown: None };

    #[test]
    fn a_write_of_cc_asks_for_enable_disable_or_shutdown() {
        let mut registers = Registers::default();
        assert_eq!(registers.write(Id::Cc, 0x0046_0000), NONE);
        assert_eq!(registers.write(Id::Cc, 0x0046_0001), RegisterRequest { enable: true, ..NONE });
        // The page size stays while the controller is enabled.
        assert_eq!(registers.write(Id::Cc, 0x0046_0081), NONE);
        assert_eq!(registers.cc, Cc(0x0046_0001));
        assert_eq!(registers.write(Id::Cc, 0x0046_4001), RegisterRequest { shutdown: Some(1), ..NONE });
        assert_eq!(registers.write(Id::Cc, 0x0046_8001), NONE, "it goes on already");
        assert_eq!(registers.write(Id::Cc, 0), RegisterRequest { disable: true, ..NONE });
        assert_eq!(registers.write(Id::Cc, 0x8000), RegisterRequest { shutdown: Some(2), ..NONE });
    }

    #[test]
    fn admin_queues_must_be_possible() {
        let mut registers = Registers::default();
        assert_eq!(registers.admin_queues(), None, "queues of one entry");
        registers.write(Id::Aqa, 0xf01f_f007);
        registers.write(Id::Asq, 0x1234);
        registers.write(Id::Acq, 0x2000);
        let queues =
            AdminQueues { sq: CommandRing::new(0x1000, 8).unwrap(), cq: CompletionRing::new(0x2000, 32).unwrap() };
        assert_eq!(registers.admin_queues(), Some(queues));
        for (cc, usable) in [(0x80, false), (0x10, false), (0x800, false), (0x0046_0000, true)] {
            registers.write(Id::Cc, cc);
            assert_eq!(registers.admin_queues().is_some(), usable, "{cc:#x}");
        }
    }

    #[test]
    fn masks_are_set_and_cleared_by_ones() {
        let mut registers = Registers::default();
        assert_eq!(registers.write(Id::Intms, 0b101), RegisterRequest { mask: true, ..NONE });
        assert_eq!(registers.write(Id::Intmc, 0b100), RegisterRequest { mask: true, ..NONE });
        assert_eq!(registers.read(Id::Intms, 0), 1);
        assert_eq!(registers.read(Id::Csts, 5), 5);
    }
}
