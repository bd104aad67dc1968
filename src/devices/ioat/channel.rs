//! The channel's state: its registers, and the order in which descriptors are executed.
//!
//! This module does no DMA. The executor takes a [`Job`], executes it without holding the channel's lock, and returns
//! the outcome.

use serde::{Deserialize, Serialize};

use super::descriptor::{Descriptor, Flags};
use super::interrupt::Interrupt;
use super::registers::{Command, Control, Errors};

/// The channel's state, as the low bits of CHANSTS and of a completion have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Status {
    /// There are descriptors to execute.
    Active = 0,
    /// All descriptors have been executed.
    Done = 1,
    /// Software suspended the channel.
    Suspended = 2,
    /// No descriptor was started since the last reset, or an error stopped the channel.
    Halted = 3,
}

/// A descriptor that the executor is to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its address.
    pub address: u64,
    /// Whether it is the first of its chain.
    pub first: bool,
    /// The number of descriptors of its chain before it, modulo 2^16.
    pub index: u16,
    /// The number of its chain.
    chain: u64,
}

/// A completion: 8 bytes to write to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The completion address.
    pub address: u64,
    /// The address of a descriptor and a [`Status`].
    pub value: u64,
}

/// What happens when the descriptor in progress ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Suspend,
    Reset,
}

/// The channel.
#[derive(Serialize, Deserialize)]
pub struct Channel {
    /// The interrupt.
    pub interrupt: Interrupt,
    /// CHAINADDR. The next write of DMACOUNT starts the new chain.
    chain_address: u64,
    chain_address_is_new: bool,
    completion_address: u64,
    control: Control,
    errors: Errors,
    error_mask: u32,
    count: u16,
    status: Status,
    completed: u64,
    /// The next descriptor to execute.
    next: Job,
    /// Whether the executor has a job.
    #[serde(skip)]
    busy: bool,
    #[serde(skip)]
    order: Option<Order>,
}

impl Default for Channel {
    /// The state after a reset.
    fn default() -> Self {
        Channel {
            interrupt: Interrupt::default(),
            chain_address: 0,
            chain_address_is_new: false,
            completion_address: 0,
            control: Control::empty(),
            errors: Errors::empty(),
            error_mask: 0,
            count: 0,
            status: Status::Halted,
            completed: 0,
            next: Job { address: 0, first: true, index: 0, chain: 0 },
            busy: false,
            order: None,
        }
    }
}

impl Channel {
    /// CHANSTS.
    pub fn chansts(&self) -> u64 {
        self.completed | self.status as u64
    }

    /// Its state.
    pub fn status(&self) -> Status {
        self.status
    }

    /// CHANERR.
    pub fn errors(&self) -> Errors {
        self.errors
    }

    /// Writes CHANERR.
    pub fn clear_errors(&mut self, errors: Errors) {
        self.errors.remove(errors);
    }

    /// CHANERRMSK.
    pub fn error_mask(&self) -> u32 {
        self.error_mask
    }

    /// Writes CHANERRMSK.
    pub fn set_error_mask(&mut self, mask: u32) {
        self.error_mask = mask;
    }

    /// CHANCTRL.
    pub fn control(&self) -> Control {
        let mut control = self.control;
        control.set(Control::INTERRUPT_DISABLE, self.interrupt.is_disarmed());
        control
    }

    /// Writes CHANCTRL.
    pub fn set_control(&mut self, control: Control) {
        self.control = control.difference(Control::INTERRUPT_DISABLE);
        if control.contains(Control::INTERRUPT_DISABLE) {
            self.interrupt.arm();
        }
    }

    /// CHAINADDR.
    pub fn chain_address(&self) -> u64 {
        self.chain_address
    }

    /// Writes CHAINADDR.
    pub fn set_chain_address(&mut self, address: u64) {
        self.chain_address = address;
        self.chain_address_is_new = true;
    }

    /// CHANCMP.
    pub fn completion_address(&self) -> u64 {
        self.completion_address
    }

    /// Writes CHANCMP, whose low three bits are always zero.
    pub fn set_completion_address(&mut self, address: u64) {
        self.completion_address = address & !7;
    }

    /// DMACOUNT.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Writes DMACOUNT: the descriptors up to this count are ready. After an error none is executed until software has
    /// cleared CHANERR.
    pub fn set_count(&mut self, count: u16) {
        self.count = count;
        if std::mem::take(&mut self.chain_address_is_new) {
            let chain = self.next.chain.wrapping_add(1);
            self.next = Job { address: self.chain_address, first: true, index: 0, chain };
        }
        if self.errors.is_empty() {
            self.go_on();
        }
    }

    /// CHANCMD.
    pub fn pending_command(&self) -> Command {
        if self.order == Some(Order::Reset) { Command::RESET } else { Command::empty() }
    }

    /// Writes CHANCMD.
    pub fn command(&mut self, command: u8) {
        if self.order == Some(Order::Reset) {
            return;
        }
        match Command::from_bits(command) {
            Some(command) if command.is_empty() => {}
            Some(Command::RESET) => self.reset(),
            Some(Command::SUSPEND) => self.suspend(),
            Some(Command::RESUME) if self.status == Status::Suspended => self.go_on(),
            Some(Command::RESUME) => self.order = None,
            _ => self.halt(Errors::COMMAND),
        }
    }

    /// Resets the channel: now, or when the executor returns its job.
    fn reset(&mut self) {
        if self.busy {
            self.order = Some(Order::Reset);
            return;
        }
        let mut interrupt = std::mem::take(&mut self.interrupt);
        interrupt.reset_channel();
        let chain = self.next.chain;
        *self = Channel { interrupt, ..Channel::default() };
        self.next.chain = chain;
    }

    fn suspend(&mut self) {
        match self.status {
            Status::Active if self.busy => self.order = Some(Order::Suspend),
            Status::Active | Status::Done => self.status = Status::Suspended,
            Status::Suspended | Status::Halted => {}
        }
    }

    fn go_on(&mut self) {
        if self.order == Some(Order::Suspend) {
            self.order = None;
        }
        self.status = if self.next.index == self.count { Status::Done } else { Status::Active };
    }

    fn halt(&mut self, errors: Errors) {
        self.errors |= errors;
        self.status = Status::Halted;
        if self.order == Some(Order::Suspend) {
            self.order = None;
        }
        if self.control.contains(Control::ERROR_INTERRUPT) && errors.bits() & !self.error_mask != 0 {
            self.interrupt.raise();
        }
    }

    /// Takes the next descriptor for the executor, if there is one to execute.
    pub fn take_job(&mut self) -> Option<Job> {
        if self.busy || self.status != Status::Active {
            return None;
        }
        self.busy = true;
        Some(self.next)
    }

    /// The completion to write before a job ends, if there is one.
    pub fn completion(&self, job: &Job, outcome: &Result<Descriptor, Errors>) -> Option<Completion> {
        if self.order == Some(Order::Reset) {
            return None;
        }
        let value = match outcome {
            Ok(descriptor) => {
                let last = job.index.wrapping_add(1) == self.count;
                let status = if last { Status::Done } else { Status::Active };
                descriptor.flags().contains(Flags::COMPLETION).then_some(job.address | status as u64)
            }
            Err(_) => {
                self.control.contains(Control::ERROR_COMPLETION).then_some(self.completed | Status::Halted as u64)
            }
        }?;
        Some(Completion { address: self.completion_address, value })
    }

    /// Ends the executor's job with this outcome.
    pub fn finish(&mut self, job: &Job, outcome: &Result<Descriptor, Errors>) {
        self.busy = false;
        if self.order == Some(Order::Reset) {
            self.order = None;
            self.reset();
            return;
        }
        match outcome {
            Err(errors) => self.halt(*errors),
            Ok(descriptor) => {
                self.completed = job.address;
                // Software may have begun another chain meanwhile.
                if self.next.chain == job.chain {
                    let index = job.index.wrapping_add(1);
                    self.next = Job { address: descriptor.next(), first: false, index, ..*job };
                }
                self.proceed();
                if descriptor.flags().contains(Flags::INTERRUPT) {
                    self.interrupt.raise();
                }
            }
        }
    }

    /// The executor failed, and its job is over.
    pub fn fail(&mut self) {
        self.busy = false;
        match self.order.take() {
            Some(Order::Reset) => self.reset(),
            _ => self.halt(Errors::UNAFFILIATED),
        }
    }

    /// Checks that this state is possible while no descriptor is in progress.
    ///
    /// # Errors
    /// The state is not possible. The error says why.
    pub fn check(&self) -> Result<(), &'static str> {
        if !self.errors.is_empty() && self.status != Status::Halted {
            return Err("a channel with an error is not halted");
        }
        if self.status == Status::Active && self.next.index == self.count {
            return Err("it is active, but has no descriptor to execute");
        }
        if !self.interrupt.is_possible() || self.control.contains(Control::INTERRUPT_DISABLE) {
            return Err("its interrupt registers have impossible bits");
        }
        if !self.completion_address.is_multiple_of(8) {
            return Err("its completion address is not a multiple of 8");
        }
        Ok(())
    }

    /// Goes on after a descriptor was executed.
    fn proceed(&mut self) {
        match self.order.take() {
            Some(Order::Suspend) => self.status = Status::Suspended,
            _ if self.status == Status::Active => self.go_on(),
            // A wrong command halted the channel meanwhile.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
