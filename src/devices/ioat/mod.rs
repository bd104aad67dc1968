//! A DMA engine: register-compatible with version 3.3 of Intel's I/OAT ("QuickData"), one channel that copies memory.
//!
//! Linux's `ioatdma`, SPDK and the kernel's VFIO selftests drive it. Software puts descriptors in memory, each with the
//! address of the next. It writes the first one's address to CHAINADDR and their number to DMACOUNT. To add descriptors
//! later, it writes a higher count. An address that cannot be accessed halts the channel and sets a bit in CHANERR. The
//! bytes before that address are copied.
//!
//! * `registers`: the registers and their bits;
//! * `channel`: the channel's state, without any DMA;
//! * `interrupt`: the channel's interrupt;
//! * `descriptor`: a descriptor's format and execution;
//! * `executor`: the thread that executes descriptors.
//!
//! Other features of the hardware are neither implemented nor advertised: XOR and RAID operations, fill, CRC, page
//! breaks, direct cache access, interrupt coalescing, and the copies of CHANERR in configuration space, which read as
//! zero.

mod channel;
mod descriptor;
mod executor;
mod interrupt;
mod registers;

use std::sync::Arc;

use channel::{Channel, Job, Status};
use executor::Descriptors;
use registers::{CHANNELS, COMPATIBLE_V2, Control, Errors, Id, REGISTERS, TRANSFER_LOG2, VERSION};

use super::kit::registers::{RegisterMap, RegisterWrite};
use super::kit::{Engine, Lifecycle, StateMachine};
use super::model::{Model, Plain};
use crate::pci::{Bar, FunctionContext, Identity};
use viommu_wire::model;

/// The model.
pub const MODEL: Model = Model {
    name: Channel::NAME,
    endpoint_name: "dma",
    example: "",
    keys: &[],
    configure: |_, _| Ok(Arc::new(Plain(make))),
};

/// An engine in its power-on state: the channel is halted.
pub fn make(context: FunctionContext) -> Box<dyn Lifecycle> {
    Box::new(Engine::<Channel>::new(context))
}

impl StateMachine for Channel {
    type Register = Id;
    type Job = Job;
    type Executor = Descriptors;

    const NAME: &'static str = "dma-engine";
    const VERSION: u32 = 1;
    const TRACED_AS: Option<model::Model> = Some(model::Model::Ioat);
    const IDENTITY: Identity = Identity {
        vendor: 0x8086,
        device: 0x2021,
        subsystem_vendor: 0x8086,
        subsystem: 0x0000,
        class: 0x08_80_00,
        revision: 4,
        bars: &[Bar::registers(0, registers::BAR_SIZE)],
        capabilities: &[],
        vectors: CHANNELS as u16,
        integrated: true,
    };
    const REGISTERS: RegisterMap<Id> = REGISTERS;

    fn read(&mut self, register: Id) -> u64 {
        match register {
            Id::ChannelCount => CHANNELS.into(),
            Id::TransferCapacity => TRANSFER_LOG2.into(),
            Id::InterruptControl => {
                let value = self.interrupt.control();
                self.interrupt.control_was_read();
                value.into()
            }
            Id::AttentionStatus => {
                let value = self.interrupt.attention();
                self.interrupt.attention_was_read();
                value.into()
            }
            Id::Version => VERSION.into(),
            Id::Compatibility => COMPATIBLE_V2.into(),
            Id::ChannelControl => self.control().bits().into(),
            Id::ChannelCommand => self.pending_command().bits().into(),
            Id::DescriptorCount => self.count().into(),
            Id::ChannelStatus => self.chansts(),
            Id::ChainAddress => self.chain_address(),
            Id::CompletionAddress => self.completion_address(),
            Id::ChannelErrors => self.errors().bits().into(),
            Id::ErrorMask => self.error_mask().into(),
        }
    }

    fn write(&mut self, write: &RegisterWrite<'_, Id>) {
        match write.id() {
            Id::InterruptControl => self.interrupt.write_control(write.over(0) as u8),
            Id::ChannelControl => {
                // The interrupt disable bit reads as one when writing a one would arm the interrupt. So its old value
                // must not be written back.
                let before = self.control().difference(Control::INTERRUPT_DISABLE).bits();
                self.set_control(Control::from_bits_truncate(write.over(before.into()) as u16));
            }
            Id::ChannelCommand => self.command(write.over(0) as u8),
            Id::DescriptorCount => self.set_count(write.over(self.count().into()) as u16),
            Id::ChainAddress => self.set_chain_address(write.over(self.chain_address())),
            Id::CompletionAddress => self.set_completion_address(write.over(self.completion_address())),
            Id::ChannelErrors => self.clear_errors(Errors::from_bits_truncate(write.over(0) as u32)),
            Id::ErrorMask => self.set_error_mask(write.over(self.error_mask().into()) as u32),
            Id::ChannelCount
            | Id::TransferCapacity
            | Id::AttentionStatus
            | Id::Version
            | Id::Compatibility
            | Id::ChannelStatus => {}
        }
    }

    fn take_job(&mut self) -> Option<Job> {
        Channel::take_job(self)
    }

    fn fail(&mut self) {
        Channel::fail(self);
    }

    fn take_interrupts(&mut self) -> u32 {
        self.interrupt.take_message().into()
    }

    fn reasons(&self) -> u32 {
        self.interrupt.pin().into()
    }

    /// The state in CHANSTS, and CHANERR. A channel that is done counts as active, since it alternates between the two
    /// with each piece of work.
    fn traced(&self) -> u64 {
        let status = match self.status() {
            Status::Done => Status::Active,
            other => other,
        };
        u64::from(self.errors().bits()) << 32 | status as u64
    }

    fn check(&self) -> Result<(), &'static str> {
        Channel::check(self)
    }
}
