//! The channel: its registers, and which descriptor is to be executed when.
//!
//! There is no DMA here. The worker takes a [`Job`], executes it without holding the channel, and brings the outcome back.

use super::descriptor::{Descriptor, Flags};
use super::interrupt::Interrupt;
use super::registers::{Command, Control, Errors};

/// The state in the low bits of CHANSTS and of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// There are descriptors to execute.
    Active = 0,
    /// All have been executed.
    Done = 1,
    /// Software suspended the channel.
    Suspended = 2,
    /// Nothing was started since the last reset, or an error stopped the channel.
    Halted = 3,
}

/// A descriptor that the worker is to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Where it is.
    pub address: u64,
    /// Whether it is the first of its chain.
    pub first: bool,
    /// How many of its chain were executed before, modulo 2^16.
    pub index: u16,
    /// Which chain it is of.
    chain: u64,
}

/// 8 bytes to write to the completion address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Where.
    pub address: u64,
    /// The address of a descriptor and a [`Status`].
    pub value: u64,
}

/// What the worker has to do at the end of the descriptor that it executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Suspend,
    Reset,
}

/// The channel.
pub struct Channel {
    /// The interrupt.
    pub interrupt: Interrupt,
    /// CHAINADDR; it counts from the next write of DMACOUNT on.
    chain_address: u64,
    chain_address_is_new: bool,
    completion_address: u64,
    control: Control,
    errors: Errors,
    error_mask: u32,
    count: u16,
    status: Status,
    completed: u64,
    /// The next one to execute.
    next: Job,
    /// The worker has a job.
    busy: bool,
    order: Option<Order>,
}

impl Channel {
    /// As it is after a reset.
    pub fn new(interrupt: Interrupt) -> Self {
        Channel {
            interrupt,
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

    /// Writes CHANCMP; the low three bits are not there.
    pub fn set_completion_address(&mut self, address: u64) {
        self.completion_address = address & !7;
    }

    /// DMACOUNT.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Writes DMACOUNT: the descriptors up to this count are ready. After an error nothing runs until software has
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

    /// Resets the channel: now, or when the worker has come back, which [`Channel::is_busy`] says.
    pub fn reset(&mut self) {
        if self.busy {
            self.order = Some(Order::Reset);
            return;
        }
        let mut interrupt = std::mem::take(&mut self.interrupt);
        interrupt.reset_channel();
        let chain = self.next.chain;
        *self = Channel::new(interrupt);
        self.next.chain = chain;
    }

    /// Whether the worker executes a descriptor.
    pub fn is_busy(&self) -> bool {
        self.busy
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

    /// Gives the worker the next descriptor, if there is one to execute.
    pub fn take_job(&mut self) -> Option<Job> {
        if self.busy || self.status != Status::Active {
            return None;
        }
        self.busy = true;
        Some(self.next)
    }

    /// What is to be written to memory before a job ends.
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

    /// Takes the worker's job back.
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
                // Unless software began another chain meanwhile.
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

    /// The worker failed: its job is over.
    pub fn fail(&mut self) {
        self.busy = false;
        match self.order.take() {
            Some(Order::Reset) => self.reset(),
            _ => self.halt(Errors::UNAFFILIATED),
        }
    }

    /// After a descriptor that was executed.
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
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::registers::TRANSFER_LOG2;
    use super::*;
    use zerocopy::FromBytes;

    const RESET: u8 = Command::RESET.bits();
    const SUSPEND: u8 = Command::SUSPEND.bits();
    const RESUME: u8 = Command::RESUME.bits();

    fn channel() -> Channel {
        let mut interrupt = Interrupt::default();
        interrupt.write_control(1);
        Channel::new(interrupt)
    }

    fn descriptor(flags: Flags, next: u64) -> Result<Descriptor, Errors> {
        let mut words = [0u64; 8];
        words[0] = u64::from(flags.bits()) << 32 | 1 << TRANSFER_LOG2;
        words[3] = next;
        Ok(Descriptor::read_from_bytes(words.map(u64::to_le_bytes).as_flattened()).unwrap())
    }

    /// Executes what there is to execute, as a ring of four descriptors; the indexes of what was.
    fn run(channel: &mut Channel) -> Vec<u16> {
        let mut ran = Vec::new();
        while let Some(job) = channel.take_job() {
            assert_eq!(channel.take_job(), None);
            channel.finish(&job, &descriptor(Flags::empty(), (job.address + 64) % 256));
            ran.push(job.index);
        }
        ran
    }

    fn started(count: u16) -> Channel {
        let mut channel = channel();
        channel.set_chain_address(0);
        channel.set_count(count);
        channel
    }

    #[test]
    fn the_count_is_one_of_descriptors_since_the_chain_began_and_wraps() {
        let mut channel = started(1);
        assert_eq!(run(&mut channel), [0]);
        assert_eq!(channel.status(), Status::Done);
        channel.set_count(1);
        assert!(run(&mut channel).is_empty());
        channel.set_count(3);
        assert_eq!(run(&mut channel), [1, 2]);
        assert_eq!(channel.chansts(), 128 | Status::Done as u64);
        channel.set_count(u16::MAX);
        run(&mut channel);
        channel.set_count(1);
        assert_eq!(run(&mut channel), [u16::MAX, 0]);
        channel.set_chain_address(64);
        channel.set_count(1);
        assert_eq!(run(&mut channel), [0]);
        assert_eq!(channel.chansts(), 64 | Status::Done as u64);
    }

    #[test]
    fn a_suspend_lets_the_descriptor_in_progress_end() {
        let mut channel = started(3);
        let job = channel.take_job().unwrap();
        channel.command(SUSPEND);
        assert_eq!(channel.status(), Status::Active);
        channel.finish(&job, &descriptor(Flags::empty(), 64));
        assert_eq!(channel.status(), Status::Suspended);
        assert!(run(&mut channel).is_empty());
        channel.command(RESUME);
        assert_eq!(run(&mut channel), [1, 2]);
        channel.command(SUSPEND);
        assert_eq!(channel.status(), Status::Suspended);
        channel.set_count(4);
        assert_eq!(run(&mut channel), [3]);
    }

    #[test]
    fn a_count_written_before_the_suspend_took_effect_goes_on() {
        let mut channel = started(1);
        let job = channel.take_job().unwrap();
        channel.command(SUSPEND);
        channel.set_count(2);
        channel.finish(&job, &descriptor(Flags::empty(), 64));
        assert_eq!(run(&mut channel), [1]);
    }

    #[test]
    fn a_reset_is_pending_until_the_descriptor_in_progress_has_ended_and_forgets_it() {
        let mut channel = started(3);
        channel.set_control(Control::ERROR_COMPLETION);
        channel.set_completion_address(0x1000);
        let job = channel.take_job().unwrap();
        channel.command(RESET);
        assert_eq!(channel.pending_command(), Command::RESET);
        let outcome = descriptor(Flags::COMPLETION | Flags::INTERRUPT, 64);
        assert_eq!(channel.completion(&job, &outcome), None);
        channel.set_count(9);
        channel.command(SUSPEND);
        assert_eq!(channel.take_job(), None);
        channel.finish(&job, &outcome);
        assert_eq!(channel.pending_command(), Command::empty());
        assert_eq!((channel.chansts(), channel.count()), (Status::Halted as u64, 0));
        assert_eq!((channel.control(), channel.completion_address()), (Control::empty(), 0));
        assert!(run(&mut channel).is_empty());
    }

    #[test]
    fn a_reset_of_an_idle_channel_is_done_at_once() {
        let mut channel = started(1);
        run(&mut channel);
        channel.command(RESET);
        assert_eq!(channel.pending_command(), Command::empty());
        assert_eq!(channel.chansts(), Status::Halted as u64);
        channel.command(SUSPEND);
        assert_eq!(channel.status(), Status::Halted);
    }

    #[test]
    fn a_chain_that_begins_during_a_descriptor_of_another_is_not_mixed_up_with_it() {
        let mut channel = started(2);
        let job = channel.take_job().unwrap();
        channel.set_chain_address(128);
        channel.set_count(1);
        channel.finish(&job, &descriptor(Flags::empty(), 64));
        let job = channel.take_job().unwrap();
        assert_eq!((job.address, job.first, job.index), (128, true, 0));
    }

    #[test]
    fn an_error_halts_until_it_is_cleared() {
        let mut channel = started(2);
        let job = channel.take_job().unwrap();
        channel.finish(&job, &descriptor(Flags::empty(), 64));
        let job = channel.take_job().unwrap();
        let error = Err(Errors::SOURCE_ADDRESS);
        assert_eq!(channel.completion(&job, &error), None);
        channel.set_control(Control::ERROR_COMPLETION);
        channel.set_completion_address(0x1007);
        let completion = Completion { address: 0x1000, value: Status::Halted as u64 };
        assert_eq!(channel.completion(&job, &error), Some(completion));
        channel.finish(&job, &error);
        assert!(!channel.interrupt.is_disarmed());
        assert_eq!(channel.chansts(), Status::Halted as u64);
        channel.set_count(3);
        assert!(run(&mut channel).is_empty());
        channel.clear_errors(Errors::DESTINATION_ADDRESS);
        assert_eq!(channel.errors(), Errors::SOURCE_ADDRESS);
        channel.clear_errors(Errors::SOURCE_ADDRESS);
        channel.set_count(3);
        assert_eq!(run(&mut channel), [1, 2]);
    }

    #[test]
    fn errors_interrupt_if_enabled_and_not_masked() {
        for (control, mask, sent) in [
            (Control::empty(), 0, false),
            (Control::ERROR_INTERRUPT, 0, true),
            (Control::ERROR_INTERRUPT, Errors::LENGTH.bits(), false),
        ] {
            let mut channel = started(1);
            channel.set_control(control);
            channel.set_error_mask(mask);
            let job = channel.take_job().unwrap();
            channel.finish(&job, &Err(Errors::LENGTH));
            assert_eq!(channel.interrupt.is_disarmed(), sent);
        }
    }

    #[test]
    fn completions_say_whether_there_is_more_to_do() {
        let mut channel = started(2);
        channel.set_completion_address(0x2000);
        let job = channel.take_job().unwrap();
        assert_eq!(channel.completion(&job, &descriptor(Flags::empty(), 64)), None);
        let outcome = descriptor(Flags::COMPLETION, 64);
        assert_eq!(channel.completion(&job, &outcome), Some(Completion { address: 0x2000, value: 0 }));
        channel.finish(&job, &outcome);
        let job = channel.take_job().unwrap();
        assert_eq!(channel.completion(&job, &outcome), Some(Completion { address: 0x2000, value: 64 | 1 }));
    }

    #[test]
    fn a_wrong_command_halts() {
        for command in [1, 2, 8, 0x80, SUSPEND | RESET] {
            let mut channel = started(2);
            let job = channel.take_job().unwrap();
            channel.command(command);
            assert_eq!((channel.status(), channel.errors()), (Status::Halted, Errors::COMMAND));
            channel.finish(&job, &descriptor(Flags::empty(), 64));
            assert_eq!(channel.take_job(), None);
        }
    }

    #[test]
    fn a_failure_of_the_worker_halts_or_ends_the_reset() {
        let mut channel = started(1);
        channel.take_job().unwrap();
        channel.fail();
        assert_eq!((channel.is_busy(), channel.errors()), (false, Errors::UNAFFILIATED));
        let mut channel = started(1);
        channel.take_job().unwrap();
        channel.reset();
        channel.fail();
        assert_eq!((channel.is_busy(), channel.errors()), (false, Errors::empty()));
    }

    proptest::proptest! {
        /// Whatever software does, the worker has one job at most, and a reset always comes to an end.
        #[test]
        fn any_order_of_events_keeps_the_channel_whole(
            steps in proptest::collection::vec((0u8..8, proptest::prelude::any::<u16>()), 1..80),
        ) {
            let mut channel = channel();
            let mut job: Option<Job> = None;
            for (step, value) in steps {
                match step {
                    0 => channel.set_count(value),
                    1 => channel.set_chain_address(u64::from(value) << 6),
                    2 => channel.command([RESET, SUSPEND, RESUME, RESUME, 0, 1][usize::from(value) % 6]),
                    3 => channel.set_control(Control::from_bits_truncate(value)),
                    4 => channel.clear_errors(Errors::all()),
                    5 if job.is_none() => job = channel.take_job(),
                    6 | 7 => if let Some(job) = job.take() {
                        let outcome = if value % 4 == 0 {
                            Err(Errors::SOURCE_ADDRESS)
                        } else {
                            descriptor(Flags::from_bits_truncate(value.into()), 64)
                        };
                        channel.completion(&job, &outcome);
                        channel.finish(&job, &outcome);
                    },
                    _ => {}
                }
                proptest::prop_assert_eq!(channel.is_busy(), job.is_some());
                proptest::prop_assert!(job.is_none() || channel.take_job().is_none());
                if !channel.errors().is_empty() {
                    proptest::prop_assert_eq!(channel.chansts() & 7 == Status::Halted as u64, true);
                }
                if !channel.is_busy() {
                    proptest::prop_assert_eq!(channel.pending_command(), Command::empty());
                }
            }
            channel.reset();
            if let Some(job) = job {
                channel.finish(&job, &descriptor(Flags::empty(), 64));
            }
            proptest::prop_assert_eq!(channel.chansts(), Status::Halted as u64);
            proptest::prop_assert_eq!(channel.take_job(), None);
        }
    }
}
