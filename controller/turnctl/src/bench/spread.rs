//! Latencies, counted in buckets of 1/16 of their power of two: below 7 % wrong, from 1 ns on.

use std::time::Duration;

/// Steps of a power of two.
const STEPS: u64 = 16;

/// A histogram.
#[derive(Clone, Debug)]
pub struct Spread {
    buckets: Box<[u64]>,
    count: u64,
}

impl Spread {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { buckets: vec![0; 64 * 16].into_boxed_slice(), count: 0 }
    }

    /// Enters one.
    pub fn enter(&mut self, nanoseconds: u64) {
        self.buckets[Self::bucket(nanoseconds)] += 1;
        self.count += 1;
    }

    /// How many were entered.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The value that `permille` thousandths of all do not exceed; nothing when there is none.
    pub fn quantile(&self, permille: u64) -> Option<Duration> {
        let mut rank = (self.count * permille).div_ceil(1000).max(1);
        for (index, count) in self.buckets.iter().enumerate() {
            if *count >= rank {
                return Some(Duration::from_nanos(Self::top(index as u64)));
            }
            rank -= count;
        }
        None
    }

    fn bucket(value: u64) -> usize {
        let value = value.max(1);
        let power = u64::from(value.ilog2());
        let step = if power >= 4 { (value >> (power - 4)) & (STEPS - 1) } else { (value << (4 - power)) & (STEPS - 1) };
        usize::try_from(power * STEPS + step).unwrap_or(0)
    }

    /// The upper end of a bucket.
    fn top(index: u64) -> u64 {
        let (power, step) = (index / STEPS, index % STEPS);
        if power >= 4 { ((STEPS + step + 1) << (power - 4)).wrapping_sub(1) } else { (STEPS + step) >> (4 - power) }
    }
}

impl Default for Spread {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near_what_was_entered() {
        let mut spread = Spread::new();
        assert_eq!(spread.quantile(500), None);
        for value in 1..=100_000 {
            spread.enter(value);
        }
        assert_eq!(spread.count(), 100_000);
        for (permille, expected) in [(1, 100.0), (500, 50_000.0), (990, 99_000.0), (1000, 100_000.0)] {
            let found = spread.quantile(permille).expect("some").as_nanos() as f64;
            assert!((found / expected - 1.0).abs() < 0.07, "{permille}: {found}");
        }
    }

    #[test]
    fn a_value_is_in_its_bucket() {
        for value in (0..63).flat_map(|power| [1_u64 << power, (1 << power) + (1 << power) / 3]) {
            let top = Spread::top(Spread::bucket(value) as u64);
            assert!(top >= value && top as f64 <= value as f64 * 1.07 + 1.0, "{value}: {top}");
        }
    }
}
