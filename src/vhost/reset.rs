//! What a stop and a start of the queues mean: a pause, a driver's reset or a reset of the machine.
//!
//! vhost-user does not say which. A driver that resets the device and a machine that is paused look the same: both
//! queues are stopped with GET_VRING_BASE. So the state is kept, and the next event decides:
//!
//! * The queues start at the index where they stopped: it was a pause, and all state is still valid.
//! * A queue starts at another index, which is 0: it was a reset, and the next driver must find nothing.
//! * A PCI function is reset while the queues are stopped, or the user's QMP socket reports a reset: it was a reset of
//!   the machine, and firmware is about to use devices with the boot-time `bypass`. While QMP says that the machine is
//!   paused, only QMP can report this: QEMU also resets a function that is plugged into a paused machine.
//!
//! One case is ambiguous: a queue stopped at index 0, because it never moved or moved by exactly 2^16. Then the other
//! queue decides. If that one is at 0 too, QMP decides, and without a word from QMP it counts as a reset. The state is
//! kept until the other queue starts too. A request that is served before that was left in the queue by a pause, since
//! a new driver has both queues started before it can add any request.

use super::QUEUES;

/// The action that an event demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing: the queues go on where they stopped.
    Resume,
    /// The driver has reset the device.
    DeviceReset,
    /// The machine was reset.
    SystemReset,
}

/// Follows the queues.
#[derive(Debug, Default)]
pub(super) struct Lifecycle {
    running: [bool; QUEUES],
    /// Where a queue stopped, if it has not started again.
    stopped_at: [Option<u16>; QUEUES],
    /// Whether the kept state is valid is not decided yet.
    undecided: bool,
    /// QMP says that the machine is paused now.
    paused: bool,
    /// QMP has said that the machine was paused while the queues were stopped.
    by_pause: bool,
    /// A queue started since power-on or the last reset of the machine.
    used: bool,
}

impl Lifecycle {
    /// A queue was stopped at this index of the available ring. Returns whether it was running.
    pub(super) fn stopped(&mut self, queue: usize, index: u16) -> bool {
        let was_running = std::mem::take(&mut self.running[queue]);
        if was_running {
            self.stopped_at[queue] = Some(index);
            self.undecided = true;
            self.by_pause |= self.paused;
        }
        was_running
    }

    /// A queue was started at this index of the available ring.
    pub(super) fn started(&mut self, queue: usize, base: u16) -> Option<Action> {
        self.running[queue] = true;
        self.used = true;
        // Nobody starts a queue of a paused machine. QMP's RESUME may come late, or may have been missed.
        self.paused = false;
        let stopped_at = self.stopped_at[queue].take()?;
        if !self.undecided {
            return None;
        }
        let action = if stopped_at != base {
            Action::DeviceReset
        } else if base != 0 || self.by_pause {
            Action::Resume
        } else if self.stopped_at.iter().all(Option::is_none) {
            Action::DeviceReset
        } else {
            return None;
        };
        self.undecided = false;
        self.by_pause = false;
        Some(action)
    }

    /// A PCI function was reset over vfio-user. While the queues are stopped, this means a reset of the machine. While
    /// the machine is paused it does not: a function that is plugged in is reset too.
    pub(super) fn function_reset(&mut self) -> Option<Action> {
        let held = self.stopped_at.iter().any(Option::is_some);
        (held && !self.paused && !self.is_running()).then(|| self.reset_machine())
    }

    /// QMP says that the machine was reset. The message may come late, so it does not disturb a driver that already
    /// runs.
    pub(super) fn machine_reset(&mut self) -> Option<Action> {
        (self.used && !self.is_running()).then(|| self.reset_machine())
    }

    /// QMP says that the machine was paused. Returns false if that was known already.
    pub(super) fn machine_paused(&mut self) -> bool {
        self.by_pause |= !self.is_running();
        !std::mem::replace(&mut self.paused, true)
    }

    /// QMP says that the machine goes on. The queues may start before or after.
    pub(super) fn machine_resumed(&mut self) {
        self.paused = false;
    }

    fn is_running(&self) -> bool {
        self.running.contains(&true)
    }

    fn reset_machine(&mut self) -> Action {
        *self = Lifecycle { paused: self.paused, ..Lifecycle::default() };
        Action::SystemReset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lifecycle of a device whose driver ran and whose queues stopped at these indexes.
    fn stopped_at(requests: u16, events: u16) -> Lifecycle {
        let mut lifecycle = Lifecycle::default();
        assert_eq!(lifecycle.started(0, 0), None);
        assert_eq!(lifecycle.started(1, 0), None);
        lifecycle.stopped(0, requests);
        lifecycle.stopped(1, events);
        lifecycle
    }

    #[test]
    fn the_same_index_is_a_pause() {
        let mut lifecycle = stopped_at(40, 2);
        assert_eq!(lifecycle.started(0, 40), Some(Action::Resume));
        assert_eq!(lifecycle.started(1, 2), None);
    }

    #[test]
    fn index_0_is_a_reset() {
        let mut lifecycle = stopped_at(40, 2);
        assert_eq!(lifecycle.started(0, 0), Some(Action::DeviceReset));
        assert_eq!(lifecycle.started(1, 0), None);
        lifecycle.stopped(0, 5);
        lifecycle.stopped(1, 0);
        assert_eq!(lifecycle.started(0, 5), Some(Action::Resume));
    }

    #[test]
    fn an_event_queue_that_never_moved_does_not_make_a_pause_a_reset() {
        let mut lifecycle = stopped_at(40, 0);
        assert_eq!(lifecycle.started(1, 0), None);
        assert_eq!(lifecycle.started(0, 40), Some(Action::Resume));
    }

    #[test]
    fn a_wrapped_request_queue_is_decided_by_the_event_queue() {
        let mut paused = stopped_at(0, 3);
        assert_eq!(paused.started(0, 0), None);
        assert_eq!(paused.started(1, 3), Some(Action::Resume));
        let mut reset = stopped_at(0, 3);
        assert_eq!(reset.started(0, 0), None);
        assert_eq!(reset.started(1, 0), Some(Action::DeviceReset));
    }

    #[test]
    fn two_queues_at_0_are_decided_by_qmp() {
        let mut reset = stopped_at(0, 0);
        assert_eq!(reset.started(0, 0), None);
        assert_eq!(reset.started(1, 0), Some(Action::DeviceReset));
        let mut paused = stopped_at(0, 0);
        assert!(paused.machine_paused());
        paused.machine_resumed();
        assert_eq!(paused.started(0, 0), Some(Action::Resume));
        assert_eq!(paused.started(1, 0), None);
    }

    #[test]
    fn a_pause_that_is_known_before_the_queues_stop_counts() {
        let mut lifecycle = Lifecycle::default();
        lifecycle.started(0, 0);
        lifecycle.machine_paused();
        lifecycle.stopped(0, 0);
        assert_eq!(lifecycle.started(0, 0), Some(Action::Resume));
    }

    #[test]
    fn a_pause_does_not_hide_a_later_reset() {
        let mut lifecycle = stopped_at(40, 2);
        lifecycle.machine_paused();
        assert_eq!(lifecycle.started(0, 0), Some(Action::DeviceReset));
    }

    #[test]
    fn a_function_reset_is_the_machines_only_while_the_queues_are_stopped() {
        let mut lifecycle = Lifecycle::default();
        assert_eq!(lifecycle.function_reset(), None);
        lifecycle.started(0, 0);
        lifecycle.started(1, 0);
        assert_eq!(lifecycle.function_reset(), None);
        lifecycle.stopped(0, 40);
        assert_eq!(lifecycle.function_reset(), None);
        lifecycle.stopped(1, 0);
        assert_eq!(lifecycle.function_reset(), Some(Action::SystemReset));
        // The other functions of the machine and QMP report the same reset again.
        assert_eq!(lifecycle.function_reset(), None);
        assert_eq!(lifecycle.machine_reset(), None);
        assert_eq!(lifecycle.started(0, 0), None);
    }

    #[test]
    fn a_function_that_is_plugged_into_a_paused_machine_does_not_reset_it() {
        let mut lifecycle = stopped_at(40, 2);
        lifecycle.machine_paused();
        assert_eq!(lifecycle.function_reset(), None);
        lifecycle.machine_resumed();
        assert_eq!(lifecycle.started(0, 40), Some(Action::Resume));
        assert_eq!(lifecycle.started(1, 2), None);
        // QMP reports a reset of the paused machine.
        lifecycle.machine_paused();
        lifecycle.stopped(0, 50);
        lifecycle.stopped(1, 2);
        assert_eq!(lifecycle.function_reset(), None);
        assert_eq!(lifecycle.machine_reset(), Some(Action::SystemReset));
        lifecycle.machine_resumed();
        assert_eq!(lifecycle.started(0, 0), None);
    }

    #[test]
    fn a_resume_that_qmp_never_tells_is_known_by_the_queues() {
        let mut lifecycle = stopped_at(40, 2);
        lifecycle.machine_paused();
        assert_eq!(lifecycle.started(0, 40), Some(Action::Resume));
        assert_eq!(lifecycle.started(1, 2), None);
        lifecycle.stopped(0, 50);
        lifecycle.stopped(1, 2);
        assert_eq!(lifecycle.function_reset(), Some(Action::SystemReset));
    }

    #[test]
    fn a_reset_that_qmp_tells_late_does_not_disturb_the_next_driver() {
        let mut lifecycle = stopped_at(40, 2);
        assert_eq!(lifecycle.started(0, 0), Some(Action::DeviceReset));
        assert_eq!(lifecycle.machine_reset(), None);
    }

    #[test]
    fn qmp_alone_resets() {
        let mut lifecycle = stopped_at(40, 2);
        assert_eq!(lifecycle.machine_reset(), Some(Action::SystemReset));
        assert_eq!(lifecycle.machine_reset(), None);
    }

    #[test]
    fn a_queue_that_never_ran_does_not_count() {
        let mut lifecycle = Lifecycle::default();
        lifecycle.stopped(0, 0);
        lifecycle.stopped(1, 0);
        assert_eq!(lifecycle.function_reset(), None);
        assert_eq!(lifecycle.started(0, 7), None);
    }
}
