//! The difference between the host's clock and the guest's, from pairs of events whose order is known.
//!
//! Each pair bounds the difference at one moment, from above or from below. The guest measures its clock's frequency
//! itself, so its clock runs a little faster or slower than the host's, and a bound loosens by [`DRIFT_PPM`] with the
//! distance in time. At each moment the difference lies between the tightest bounds. The offset is the middle between
//! them, and its error is half their distance.
//!
//! If no difference satisfies all bounds, the clocks drifted faster than that, or one of them was set or stood still,
//! as that of a paused guest does. Then a new piece begins, with bounds of its own.

/// How much faster or slower than the host's clock the guest's may run, in parts per million.
pub const DRIFT_PPM: u64 = 1000;

/// The bound that one pair gives: at the guest's time `at` (ns), host time - guest time is at least or at most `offset`
/// (ns).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    pub at: u64,
    pub side: Side,
    pub offset: i64,
}

/// Which side of the offset a bound is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The guest's event came after the host's.
    AtLeast,
    /// The guest's event came before the host's.
    AtMost,
}

/// The offset at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// Host time - guest time, ns.
    pub value: i64,
    /// How far it may be from the truth, ns; `None` if it is bounded from one side only.
    pub error: Option<u64>,
}

/// The smallest and the largest offset that the bounds allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    pub least: Option<i64>,
    pub most: Option<i64>,
}

impl Interval {
    /// Nothing is known.
    pub const ALL: Self = Self { least: None, most: None };

    /// The offsets that one bound allows at its moment.
    pub fn of(bound: &Bound) -> Self {
        match bound.side {
            Side::AtLeast => Self { least: Some(bound.offset), most: None },
            Side::AtMost => Self { least: None, most: Some(bound.offset) },
        }
    }

    /// The interval that this one implies `distance` ns earlier or later: wider by the possible drift.
    pub fn away(self, distance: u64) -> Self {
        let slack = slack(distance);
        Self {
            least: self.least.map(|least| least.saturating_sub(slack)),
            most: self.most.map(|most| most.saturating_add(slack)),
        }
    }

    /// The intersection of both.
    pub fn and(self, other: Self) -> Self {
        let tighter = |one: Option<i64>, other: Option<i64>, choose: fn(i64, i64) -> i64| match (one, other) {
            (Some(one), Some(other)) => Some(choose(one, other)),
            (one, other) => one.or(other),
        };
        Self { least: tighter(self.least, other.least, i64::max), most: tighter(self.most, other.most, i64::min) }
    }

    /// Whether no offset is allowed.
    pub fn is_empty(self) -> bool {
        matches!((self.least, self.most), (Some(least), Some(most)) if least > most)
    }

    fn offset(self) -> Option<Offset> {
        match (self.least, self.most) {
            (None, None) => None,
            (Some(least), Some(most)) => {
                let width = least.abs_diff(most);
                Some(Offset { value: least.saturating_add_unsigned(width / 2), error: Some(width.div_ceil(2)) })
            }
            (one, other) => one.or(other).map(|value| Offset { value, error: None }),
        }
    }
}

/// How far the clocks may drift apart in `distance` ns.
fn slack(distance: u64) -> i64 {
    i64::try_from(u128::from(distance) * u128::from(DRIFT_PPM) / 1_000_000).unwrap_or(i64::MAX)
}

/// The offset in the course of a trace.
#[derive(Clone, Debug)]
pub struct Clock {
    pieces: Vec<Piece>,
}

/// A period in which all bounds agree: the moments of its bounds in order, each with the offsets that all bounds allow
/// there.
#[derive(Clone, Debug)]
struct Piece {
    knots: Vec<(u64, Interval)>,
}

impl Clock {
    /// Combines bounds, which may come in any order; `None` if there are none.
    pub fn new(mut bounds: Vec<Bound>) -> Option<Self> {
        bounds.sort_by_key(|bound| bound.at);
        let mut pieces: Vec<Piece> = Vec::new();
        for bound in &bounds {
            let alone = Interval::of(bound);
            let agrees = pieces.last_mut().is_some_and(|piece| piece.add(bound.at, alone));
            if !agrees {
                pieces.push(Piece { knots: vec![(bound.at, alone)] });
            }
        }
        pieces.iter_mut().for_each(Piece::look_back);
        (!pieces.is_empty()).then_some(Self { pieces })
    }

    /// The offset at a time of the guest's clock, in ns. Before the first bound and after the last the error grows with
    /// the distance.
    pub fn offset(&self, at: u64) -> Offset {
        let after = self.pieces.partition_point(|piece| piece.start() <= at);
        let interval = self.pieces.get(after.saturating_sub(1)).map_or(Interval::ALL, |piece| piece.interval(at));
        interval.offset().unwrap_or(Offset { value: 0, error: None })
    }

    /// The start of each piece but the first, in ns of the guest's clock.
    pub fn breaks(&self) -> impl Iterator<Item = u64> {
        self.pieces.iter().skip(1).map(Piece::start)
    }
}

impl Piece {
    fn start(&self) -> u64 {
        self.knots.first().map_or(0, |(at, _)| *at)
    }

    /// Adds a bound that is no earlier than the others, tightened by them. Returns false, and adds nothing, if it
    /// contradicts them.
    fn add(&mut self, at: u64, alone: Interval) -> bool {
        let before = self.knots.last().map_or(Interval::ALL, |(last, interval)| interval.away(at - last));
        let interval = alone.and(before);
        if interval.is_empty() {
            return false;
        }
        self.knots.push((at, interval));
        true
    }

    /// Tightens the interval of each moment by the bounds after it.
    fn look_back(&mut self) {
        let mut next: Option<(u64, Interval)> = None;
        for (at, interval) in self.knots.iter_mut().rev() {
            if let Some((later, bounds)) = next {
                *interval = interval.and(bounds.away(later - *at));
            }
            next = Some((*at, *interval));
        }
    }

    fn interval(&self, at: u64) -> Interval {
        let after = self.knots.partition_point(|(knot, _)| *knot <= at);
        let before = after.checked_sub(1).and_then(|before| self.knots.get(before));
        let before = before.map_or(Interval::ALL, |(knot, interval)| interval.away(at - knot));
        before.and(self.knots.get(after).map_or(Interval::ALL, |(knot, interval)| interval.away(knot - at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at_least(at: u64, offset: i64) -> Bound {
        Bound { at, side: Side::AtLeast, offset }
    }

    fn at_most(at: u64, offset: i64) -> Bound {
        Bound { at, side: Side::AtMost, offset }
    }

    #[test]
    fn the_middle_is_taken_and_half_the_width_is_the_error() {
        let clock = Clock::new(vec![at_least(1000, 500), at_most(1000, 601), at_least(1000, 400)]).unwrap();
        assert_eq!(clock.offset(1000), Offset { value: 550, error: Some(51) });
        // In a millisecond the clocks may drift by a microsecond.
        assert_eq!(clock.offset(1_001_000), Offset { value: 550, error: Some(1051) });
        assert_eq!(clock.breaks().count(), 0);
    }

    #[test]
    fn one_side_alone_has_no_error_to_state() {
        assert!(Clock::new(Vec::new()).is_none());
        let clock = Clock::new(vec![at_most(10, -7)]).unwrap();
        assert_eq!(clock.offset(10), Offset { value: -7, error: None });
    }

    #[test]
    fn a_step_begins_a_new_piece() {
        let second = 1_000_000_000;
        let bounds = [(1, 100), (2, 100), (3, 5_000_000_000), (4, 5_000_000_000)];
        let bounds =
            bounds.iter().flat_map(|&(at, offset)| [at_least(at * second, offset), at_most(at * second, offset)]);
        let clock = Clock::new(bounds.collect()).unwrap();
        assert_eq!(clock.breaks().collect::<Vec<_>>(), [3 * second]);
        assert_eq!(clock.offset(2 * second).value, 100);
        assert_eq!(clock.offset(4 * second), Offset { value: 5_000_000_000, error: Some(0) });
        // A moment between two pieces belongs to the earlier one, and its error grows with the distance.
        assert_eq!(clock.offset(2 * second + second / 2), Offset { value: 100, error: Some(500_000) });
    }

    /// A guest's clock, and pairs of events in a known order.
    #[derive(Clone, Debug)]
    struct World {
        start: i64,
        /// For each pair: the ns since the pair before, the clock's drift in that time (ppm), the ns between the pair's
        /// two events, and whether the guest's event comes first.
        steps: Vec<(u64, i64, u64, bool)>,
    }

    fn world() -> impl Strategy<Value = World> {
        let limit = DRIFT_PPM as i64 - 1;
        let step = (1..50_000_000_u64, -limit..=limit, 0..200_000_u64, any::<bool>());
        (-1_000_000_000_000..1_000_000_000_000_i64, prop::collection::vec(step, 1..60))
            .prop_map(|(start, steps)| World { start, steps })
    }

    impl World {
        /// Each pair's moment on the guest's clock, the true offset there, and the bound that follows.
        fn bounds(&self) -> Vec<(u64, i64, Bound)> {
            let (mut at, mut offset) = (1_000_000_000, self.start);
            let mut bounds = Vec::new();
            for &(wait, ppm, way, before) in &self.steps {
                at += wait;
                // Towards zero, so that rounding never makes it faster.
                offset += wait as i64 * ppm / 1_000_000;
                let bound = if before { at_most(at, offset + way as i64) } else { at_least(at, offset - way as i64) };
                bounds.push((at, offset, bound));
            }
            bounds
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// The true offset is always within the stated error, there is one piece, and no pair comes out in the wrong
        /// order.
        #[test]
        fn the_true_offset_is_within_the_error(world in world()) {
            let truth = world.bounds();
            let clock = Clock::new(truth.iter().map(|(_, _, bound)| *bound).collect()).unwrap();
            // Rounding of the slack to whole nanoseconds adds up to one for each step in between.
            let rounding = truth.len() as u64;
            prop_assert_eq!(clock.breaks().count(), 0);
            for (at, offset, bound) in truth {
                let found = clock.offset(at);
                if let Some(error) = found.error {
                    prop_assert!(found.value.abs_diff(offset) <= error + rounding, "{:?} at {}, truly {}", found, at, offset);
                }
                match bound.side {
                    Side::AtLeast => prop_assert!(found.value >= bound.offset),
                    Side::AtMost => prop_assert!(found.value <= bound.offset),
                }
            }
        }

        /// Within a piece, a later event of the guest never comes before an earlier one.
        #[test]
        fn order_on_the_guest_s_clock_is_kept(world in world(), offsets in prop::collection::vec(0..3_000_000_000_u64, 2..40)) {
            let clock = Clock::new(world.bounds().into_iter().map(|(_, _, bound)| bound).collect()).unwrap();
            prop_assume!(clock.offset(0).error.is_some());
            let mut moments = offsets;
            moments.sort_unstable();
            let mapped: Vec<i64> = moments.iter().map(|at| *at as i64 + clock.offset(*at).value).collect();
            prop_assert!(mapped.is_sorted());
        }

        /// A step that is larger than the pairs' uncertainty is found, and the times on both sides of it are right.
        #[test]
        fn a_step_is_found(world in world(), step in 1_000_000_000..1_000_000_000_000_i64, negative in any::<bool>()) {
            let mut truth = world.bounds();
            let half = truth.len() / 2;
            let step = if negative { -step } else { step };
            for (_, offset, bound) in &mut truth[half..] {
                *offset += step;
                bound.offset += step;
            }
            let clock = Clock::new(truth.iter().map(|(_, _, bound)| *bound).collect()).unwrap();
            // The step shows if a bound before it contradicts one after it.
            let sides = if negative { (Side::AtLeast, Side::AtMost) } else { (Side::AtMost, Side::AtLeast) };
            let shows = truth[..half].iter().any(|(_, _, bound)| bound.side == sides.0)
                && truth[half..].iter().any(|(_, _, bound)| bound.side == sides.1);
            prop_assert_eq!(clock.breaks().count() > 0, shows);
            for (at, _, bound) in truth {
                let found = clock.offset(at).value;
                let right = if bound.side == Side::AtLeast { found >= bound.offset } else { found <= bound.offset };
                prop_assert!(right, "{:?} at {}: {}", bound, at, found);
            }
        }
    }
}
