//! Tests of the orders in which a driver and the executor can act.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::super::registers::TRANSFER_LOG2;
use super::*;
use zerocopy::FromBytes;

const RESET: u8 = Command::RESET.bits();
const SUSPEND: u8 = Command::SUSPEND.bits();
const RESUME: u8 = Command::RESUME.bits();

fn channel() -> Channel {
    let mut channel = Channel::default();
    channel.interrupt.write_control(1);
    channel
}

fn descriptor(flags: Flags, next: u64) -> Result<Descriptor, Errors> {
    let mut words = [0u64; 8];
    words[0] = u64::from(flags.bits()) << 32 | 1 << TRANSFER_LOG2;
    words[3] = next;
    Ok(Descriptor::read_from_bytes(words.map(u64::to_le_bytes).as_flattened()).unwrap())
}

/// Executes all descriptors that are ready, as of a ring of four. Returns their indexes.
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
fn a_failure_of_the_executor_halts_or_ends_the_reset() {
    let mut channel = started(1);
    channel.take_job().unwrap();
    channel.fail();
    assert_eq!((channel.busy, channel.errors()), (false, Errors::UNAFFILIATED));
    let mut channel = started(1);
    channel.take_job().unwrap();
    channel.reset();
    channel.fail();
    assert_eq!((channel.busy, channel.errors()), (false, Errors::empty()));
}

proptest::proptest! {
    /// Whatever software does, the executor has one job at most, and a reset always ends.
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
            proptest::prop_assert_eq!(channel.busy, job.is_some());
            proptest::prop_assert!(job.is_none() || channel.take_job().is_none());
            if !channel.errors().is_empty() {
                proptest::prop_assert_eq!(channel.chansts() & 7 == Status::Halted as u64, true);
            }
            if !channel.busy {
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
