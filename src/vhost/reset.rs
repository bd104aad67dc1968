//! What a stop and a start of the queues mean: a pause, a driver's reset or the machine's.
//!
//! vhost-user does not say which. A driver that resets the device and a machine that is paused look the same: both
//! queues are stopped with GET_VRING_BASE. So the state is kept, and what follows decides:
//!
//! * the queues start at the index where they stopped: it was a pause, and all state is still right;
//! * a queue starts at another index, which is 0: it was a reset, and the next driver must find nothing;
//! * a PCI function is reset while the queues are stopped, or the user's QMP socket says so: it was a reset of the
//!   machine, and firmware is about to use devices with the boot-time `bypass`. While QMP says that the machine is
//!   paused, only QMP can say that: QEMU also resets a function that is plugged into a paused machine.
//!
//! One case is open: a queue that stopped at index 0, as it never moved or moved by exactly 2^16. The other queue
//! decides; if it is at 0 too, QMP does; else it is taken for a reset. Until the other queue starts too, the state is
//! kept: a request that is served before then was left in the queue by a pause, as a driver that begins has both queues
//! started before it can add any.

use super::QUEUES;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The queues go on where they were; nothing is to be done.
    Resume,
    /// The driver had reset the device.
    DeviceReset,
    /// The machine was reset.
    SystemReset,
}

/// Follows the queues.
#[derive(Debug, Default)]
pub(super) struct Lifecycle {
    running: [bool; QUEUES],
    /// Where a queue stopped that did not start again yet.
    stopped_at: [Option<u16>; QUEUES],
    /// The state that is kept is neither confirmed nor dropped yet.
    undecided: bool,
    /// QMP says that the machine is paused now.
    paused: bool,
    /// QMP said that the machine was paused while the queues were stopped.
    by_pause: bool,
    /// A queue started since power-on or the last reset of the machine.
    used: bool,
}

impl Lifecycle {
    /// A queue was stopped and is at this index of the available ring. Returns whether it was running.
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
        // Nobody starts a queue of a machine that is paused. QMP's RESUME may be late, or was missed.
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

    /// A PCI function was reset over vfio-user. While the queues are stopped, that is what a reset of the machine does;
    /// but while the machine is paused, so does a function that is plugged in.
    pub(super) fn function_reset(&mut self) -> Option<Action> {
        let held = self.stopped_at.iter().any(Option::is_some);
        (held && !self.paused && !self.is_running()).then(|| self.reset_machine())
    }

    /// QMP says that the machine was reset. The message may come late: a driver that runs already is not disturbed.
    pub(super) fn machine_reset(&mut self) -> Option<Action> {
        (self.used && !self.is_running()).then(|| self.reset_machine())
    }

    /// QMP says that the machine was paused. Returns false if that was known.
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

    /// A device whose driver ran and whose queues stopped at these indexes.
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
        // The other functions of the machine, and QMP, say the same once more.
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
        // A reset of the paused machine is told by QMP.
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
