//! Whether a worker looks for more entries before it sleeps.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// How long to look for new entries before sleeping: as long as a driver takes to see to the completions of a batch
/// before it begins to map the next.
pub(super) const SPIN: Duration = Duration::from_millis(1);
/// The most spins in vain before the next ones are left out.
const SPINS_MAX: u32 = 32;
/// Who is away for so long when it lets others go first has lost the processor to one that computes.
const AWAY: Duration = Duration::from_millis(1);
/// How long not to spin after that, at least and at most.
const REST: RangeInclusive<Duration> = Duration::from_millis(2)..=Duration::from_millis(100);
/// Who has let others go first for so long altogether, and was back at once each time, shares the processor with nobody
/// who computes all the time.
const ALONE: Duration = Duration::from_millis(2);

/// Polling burns a CPU. A worker polls only while recent polls found work, or would have, often enough; and it stops when
/// another task wants the CPU, which would delay what it finds for longer than a wake-up does. A task that wants the CPU
/// now and then, for a moment, is no reason to stop for long.
pub(super) struct AdaptivePolling {
    /// Spins in vain until it is over.
    left: u32,
    /// How long the last rest was, and when it is over.
    rest: Duration,
    over: Option<Instant>,
    /// What letting others go first took since then.
    yielded: Duration,
}

impl Default for AdaptivePolling {
    fn default() -> Self {
        AdaptivePolling { left: SPINS_MAX / 2, rest: *REST.start(), over: None, yielded: ALONE }
    }
}

impl AdaptivePolling {
    /// Whether to begin to spin.
    pub fn worth_it(&self, now: Instant) -> bool {
        self.left > 0 && self.over.is_none_or(|over| over <= now)
    }

    /// A spin found something, or would have.
    pub fn paid(&mut self) {
        self.left = (self.left + 2).min(SPINS_MAX);
    }

    /// A spin found nothing.
    pub fn wasted(&mut self) {
        self.left = self.left.saturating_sub(1);
    }

    /// Others went first from `begun` to `now`. Returns whether to go on.
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

    /// Yields as short as when nobody else wants the processor, for `long` altogether. Returns when they end.
    fn undisturbed(polling: &mut AdaptivePolling, mut now: Instant, long: Duration) -> Instant {
        let end = now + long;
        while now < end {
            assert!(polling.yielded(now, now + MS / 100));
            now += MS / 100;
        }
        now
    }

    /// Loses the processor for `away`, and rests. Returns for how long, and when that is over.
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
    fn who_computes_all_the_time_gets_the_processor() {
        // However long it keeps it, and however seldom there is something to look for.
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
    fn who_wants_the_processor_now_and_then_costs_a_short_rest() {
        let (mut polling, mut now) = (AdaptivePolling::default(), Instant::now());
        for _ in 0..10 {
            let (rest, over) = disturbed(&mut polling, now, 2 * MS);
            assert_eq!(rest, 2 * MS);
            now = undisturbed(&mut polling, over, 10 * MS);
        }
    }

    #[test]
    fn spins_in_vain_are_left_out_until_one_would_have_paid() {
        let (mut polling, now) = (AdaptivePolling::default(), Instant::now());
        (0..SPINS_MAX).for_each(|_| polling.wasted());
        assert!(!polling.worth_it(now));
        polling.paid();
        assert!(polling.worth_it(now));
    }
}
