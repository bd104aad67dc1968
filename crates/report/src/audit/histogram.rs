//! Distributions of times and sizes.

/// Buckets of an octave: a quantile is at most an eighth too high.
const STEPS: u32 = 8;

/// How often values occurred. Each bucket has an eighth of an octave; values below 16 are counted apart.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: u64,
    max: u64,
}

impl Histogram {
    /// Counts a value.
    pub fn add(&mut self, value: u64) {
        let bucket = bucket_of(value);
        if bucket >= self.buckets.len() {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        self.max = self.max.max(value);
    }

    /// How many values there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// Their sum, saturated.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The value that `percent` per cent of all do not exceed, at most an eighth too high; 0 if there are none.
    pub fn quantile(&self, percent: u64) -> u64 {
        let rank = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return last_of(bucket).min(self.max);
            }
        }
        0
    }

    /// The counts by powers of two: of values from the first number to twice that. Those that are 0 are left out.
    pub fn octaves(&self) -> Vec<(u64, u64)> {
        let mut octaves: Vec<(u64, u64)> = Vec::new();
        for (bucket, &count) in self.buckets.iter().enumerate().filter(|(_, count)| **count > 0) {
            let last = last_of(bucket);
            let from = if last == 0 { 0 } else { 1 << last.ilog2() };
            match octaves.last_mut() {
                Some((same, sum)) if *same == from => *sum += count,
                _ => octaves.push((from, count)),
            }
        }
        octaves
    }
}

fn bucket_of(value: u64) -> usize {
    match value {
        0..16 => value as usize,
        _ => {
            let octave = value.ilog2();
            let step = (value >> (octave - STEPS.ilog2())) - u64::from(STEPS);
            (16 + (octave - 4) * STEPS) as usize + step as usize
        }
    }
}

/// The largest value of a bucket.
fn last_of(bucket: usize) -> u64 {
    match bucket {
        0..16 => bucket as u64,
        _ => {
            let (octave, step) = ((bucket as u32 - 16) / STEPS + 4, (bucket as u32 - 16) % STEPS);
            let width = 1_u64 << (octave - STEPS.ilog2());
            (u64::from(STEPS + step) * width).saturating_add(width - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_ends_less_than_an_eighth_above_its_values(value in prop_oneof![0..100_u64, any::<u64>()]) {
            let last = last_of(bucket_of(value));
            prop_assert!(last >= value && u128::from(last) * 8 < u128::from(value) * 9 + 8, "{value} {last}");
            prop_assert_eq!(bucket_of(last), bucket_of(value));
        }

        #[test]
        fn quantiles_are_those_of_the_sorted_values(mut values in prop::collection::vec(0..1_000_000_u64, 1..200)) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|value| histogram.add(*value));
            values.sort_unstable();
            for percent in [1, 50, 99, 100] {
                let exact = values[((values.len() * percent).div_ceil(100) - 1).min(values.len() - 1)];
                let found = histogram.quantile(percent as u64);
                prop_assert!(found >= exact && found * 8 <= exact * 9 + 8, "{percent}: {found}, {exact}");
            }
            prop_assert_eq!(histogram.octaves().iter().map(|(_, count)| count).sum::<u64>(), values.len() as u64);
            prop_assert_eq!(histogram.quantile(100), histogram.max());
        }
    }
}
