//! The smallest model, to be copied for new ones.
//!
//! The driver writes an address to ADDRESS and a number to DOORBELL. The device writes the number to that address, four
//! bytes little-endian, gives the result in STATUS, and sends its interrupt. The driver acknowledges the interrupt by
//! writing a one to bit 0 of STATUS.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::devices::kit::registers::{Register, RegisterAccess, RegisterMap, RegisterWrite};
use crate::devices::kit::{Engine, Executor, SharedMachine, StateMachine, ThreadContext};
use crate::devices::model::{Model, Plain};
use crate::pci::{Bar, Identity};
use viommu_wire::model;

/// The model.
pub const MODEL: Model = Model {
    name: State::NAME,
    endpoint_name: "null",
    example: "",
    keys: &[],
    configure: |_, _| Ok(Arc::new(Plain(|context| Box::new(Engine::<State>::new(context))))),
};

#[derive(Clone, Copy)]
enum Id {
    Address,
    Status,
    Doorbell,
}

/// The value of STATUS.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Status {
    /// There is nothing to do.
    #[default]
    Idle,
    /// A number is being written. A doorbell is ignored.
    Busy,
    /// The number was written.
    Done,
    /// The number could not be written.
    Failed,
}

#[derive(Default, Serialize, Deserialize)]
struct State {
    address: u64,
    number: u32,
    status: Status,
    /// Whether the interrupt is to be sent.
    interrupt: bool,
}

impl State {
    fn finish(&mut self, status: Status) {
        (self.status, self.interrupt) = (status, true);
    }
}

impl StateMachine for State {
    type Register = Id;
    /// An address, and the number to write there.
    type Job = (u64, u32);
    type Executor = Writer;

    const NAME: &'static str = "null";
    const VERSION: u32 = 1;
    const IDENTITY: Identity = Identity {
        // Next to the ids of QEMU's own example, edu. No driver binds to them.
        vendor: 0x1234,
        device: 0x11e9,
        subsystem_vendor: 0x1234,
        subsystem: 0x0000,
        // Other system peripheral.
        class: 0x08_80_00,
        revision: 0,
        bars: &[Bar::registers(0, 4096)],
        capabilities: &[],
        vectors: 1,
        integrated: false,
    };
    const REGISTERS: RegisterMap<Id> = RegisterMap::new(&[
        Register::new(Id::Address, model::Register::new("ADDRESS", 0x00, 8), RegisterAccess::ReadWrite),
        Register::new(Id::Status, model::Register::new("STATUS", 0x08, 4), RegisterAccess::WriteOne),
        Register::new(Id::Doorbell, model::Register::new("DOORBELL", 0x0c, 4), RegisterAccess::WriteOnly).doorbell(),
    ]);

    fn read(&mut self, register: Id) -> u64 {
        match register {
            Id::Address => self.address,
            Id::Status => self.status as u64,
            Id::Doorbell => 0,
        }
    }

    fn write(&mut self, write: &RegisterWrite<'_, Id>) {
        match write.id() {
            Id::Address => self.address = write.over(self.address),
            Id::Status if self.reasons() != 0 && write.over(0) & 1 != 0 => self.status = Status::Idle,
            Id::Doorbell if self.status != Status::Busy => {
                (self.number, self.status) = (write.over(0) as u32, Status::Busy);
            }
            Id::Status | Id::Doorbell => {}
        }
    }

    fn take_job(&mut self) -> Option<(u64, u32)> {
        (self.status == Status::Busy).then_some((self.address, self.number))
    }

    fn fail(&mut self) {
        self.finish(Status::Failed);
    }

    fn take_interrupts(&mut self) -> u32 {
        std::mem::take(&mut self.interrupt).into()
    }

    fn reasons(&self) -> u32 {
        matches!(self.status, Status::Done | Status::Failed).into()
    }
}

#[derive(Default)]
struct Writer;

impl Executor<State> for Writer {
    fn execute(&mut self, (address, number): (u64, u32), state: &SharedMachine<State>, thread: &mut ThreadContext) {
        let written = thread.dma.write(address, &number.to_le_bytes());
        state.change(|state| state.finish(if written.is_ok() { Status::Done } else { Status::Failed }));
    }
}
