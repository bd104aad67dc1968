//! Adaptive polling: whether a worker polls for more entries before it sleeps.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// How long to poll before sleeping: as long as a driver takes to handle the completions of a batch, before it begins
/// to map the next.
pub(super) const SPIN: Duration = Duration::from_millis(1);
/// The most spins that may find nothing before polling stops.
const SPINS_MAX: u32 = 32;
/// A worker that yields and is away for longer than this has lost the CPU to a task that computes.
const AWAY: Duration = Duration::from_millis(1);
/// The shortest and the longest time without polling after that.
const REST: RangeInclusive<Duration> = Duration::from_millis(2)..=Duration::from_millis(100);
/// A worker that has yielded for this long in total, and was back at once each time, does not share its CPU with a task
/// that computes all the time.
const ALONE: Duration = Duration::from_millis(2);

/// Decides whether to poll. Polling burns a CPU, so a worker polls only while recent polls found work, or would have
/// found it, often enough. It stops when another task wants the CPU, since that task would delay the work for longer
/// than a wake-up takes. A task that wants the CPU only briefly, now and then, does not stop the polling for long.
pub(super) struct AdaptivePolling {
    /// The number of spins that may still find nothing.
    left: u32,
    /// The length of the last rest.
    rest: Duration,
    /// When the last rest ends.
    over: Option<Instant>,
    /// The total time of all yields since the last rest began.
    yielded: Duration,
}

impl Default for AdaptivePolling {
    fn default() -> Self {
        AdaptivePolling { left: SPINS_MAX / 2, rest: *REST.start(), over: None, yielded: ALONE }
    }
}

impl AdaptivePolling {
    /// Whether to start a spin now.
    pub fn worth_it(&self, now: Instant) -> bool {
        self.left > 0 && self.over.is_none_or(|over| over <= now)
    }

    /// Notes that a spin found something, or would have found it.
    pub fn paid(&mut self) {
        self.left = (self.left + 2).min(SPINS_MAX);
    }

    /// Notes that a spin found nothing.
    pub fn wasted(&mut self) {
        self.left = self.left.saturating_sub(1);
    }

    /// Notes a yield from `begun` to `now`. Returns whether to go on spinning.
    pub fn yielded(&mut self, begun: Instant, now: Instant) -> bool {
        let away = now - begun;
        if away <= AWAY {
            self.yielded += away;
            return true;
        }
        self.rest = if self.yielded < ALONE { (self.rest * 2).min(*REST.end()) } else { *REST.start() };
        self.over = Some(now + self.rest);
        self.yielded = Duration::ZERO;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Yields as briefly as without another task on the CPU, for `long` in total. Returns the time at the end.
    fn undisturbed(polling: &mut AdaptivePolling, mut now: Instant, long: Duration) -> Instant {
        let end = now + long;
        while now < end {
            assert!(polling.yielded(now, now + MS / 100));
            now += MS / 100;
        }
        now
    }

    /// Loses the CPU for `away`, and rests. Returns the length of the rest, and its end.
    fn disturbed(polling: &mut AdaptivePolling, now: Instant, away: Duration) -> (Duration, Instant) {
        assert!(polling.worth_it(now));
        let back = now + away;
        assert!(!polling.yielded(now, back));
        assert!(!polling.worth_it(back));
        let over = polling.over.unwrap();
        assert!(!polling.worth_it(over - MS / 100) && polling.worth_it(over));
        (over - back, over)
    }

    #[test]
    fn a_task_that_computes_all_the_time_gets_the_cpu() {
        // Regardless of how long it keeps the CPU, and of how seldom the worker polls.
        for away in [2 * MS, 4 * MS, 90 * MS] {
            for pause in [Duration::ZERO, 20 * MS] {
                let (mut polling, mut now) = (AdaptivePolling::default(), Instant::now());
                let rests: Vec<_> = (0..10)
                    .map(|_| {
                        let (rest, over) = disturbed(&mut polling, now, away);
                        now = over + pause;
                        rest
                    })
                    .collect();
                assert_eq!(rests[0], 2 * MS);
                assert!(rests.is_sorted() && rests[9] == 100 * MS, "{rests:?}");
            }
        }
    }

    #[test]
    fn a_task_that_wants_the_cpu_now_and_then_costs_a_short_rest() {
        let (mut polling, mut now) = (AdaptivePolling::default(), Instant::now());
        for _ in 0..10 {
            let (rest, over) = disturbed(&mut polling, now, 2 * MS);
            assert_eq!(rest, 2 * MS);
            now = undisturbed(&mut polling, over, 10 * MS);
        }
    }

    #[test]
    fn polling_stops_after_spins_in_vain_until_one_would_have_paid() {
        let (mut polling, now) = (AdaptivePolling::default(), Instant::now());
        (0..SPINS_MAX).for_each(|_| polling.wasted());
        assert!(!polling.worth_it(now));
        polling.paid();
        assert!(polling.worth_it(now));
    }
}
