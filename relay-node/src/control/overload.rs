//! Whether a relay has enough to do (pure), with hysteresis: it turns neither way for a moment's sake.

use std::time::Instant;

use crate::config::Overload;

/// A load is well below a bound at this share of it, percent.
const WELL_BELOW: u64 = 90;

/// What one second looked like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) allocations: u64,
    /// Of the busiest worker's core, thousandths.
    pub(super) cpu_permille: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Detector {
    bounds: Overload,
    overloaded: bool,
    /// Since when the core has been busy; once overloaded, since when everything has been well below its bound.
    since: Option<Instant>,
}

impl Detector {
    pub(super) fn new(bounds: Overload) -> Self {
        Self { bounds, overloaded: false, since: None }
    }

    /// Takes a sample and says how it is.
    pub(super) fn sample(&mut self, now: Instant, sample: Sample) -> bool {
        let Sample { allocations, cpu_permille } = sample;
        let reached =
            |bound: Option<u64>, value: u64, percent| bound.is_some_and(|bound| 100 * value >= percent * bound);
        let (full, busy) = (self.bounds.allocations, self.bounds.cpu_permille.map(u64::from));
        // Allocations stay for minutes: there is nothing to wait for.
        if !self.overloaded && reached(full, allocations, 100) {
            (self.overloaded, self.since) = (true, None);
        }
        let turning = if self.overloaded {
            !reached(full, allocations, WELL_BELOW) && !reached(busy, cpu_permille.into(), WELL_BELOW)
        } else {
            reached(busy, cpu_permille.into(), 100)
        };
        if !turning {
            self.since = None;
        } else if now.saturating_duration_since(*self.since.get_or_insert(now)) >= self.bounds.time {
            (self.overloaded, self.since) = (!self.overloaded, None);
        }
        self.overloaded
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A detector and its seconds: what it says of (allocations, thousandths), one after the other.
    fn says(samples: &[(u64, u32)]) -> Vec<bool> {
        let start = Instant::now();
        let bounds = Overload { allocations: Some(100), cpu_permille: Some(800), time: Duration::from_secs(3) };
        let mut detector = Detector::new(bounds);
        let mut at = start;
        samples
            .iter()
            .map(|(allocations, cpu_permille)| {
                at += Duration::from_secs(1);
                detector.sample(at, Sample { allocations: *allocations, cpu_permille: *cpu_permille })
            })
            .collect()
    }

    #[test]
    fn a_busy_core_counts_once_it_lasts() {
        assert_eq!(says(&[(0, 900), (0, 900), (0, 900), (0, 900)]), [false, false, false, true]);
        assert_eq!(says(&[(0, 900), (0, 900), (0, 700), (0, 900), (0, 900), (0, 900)]), [false; 6]);
    }

    #[test]
    fn allocations_count_at_once() {
        assert_eq!(says(&[(99, 0), (100, 0)]), [false, true]);
    }

    #[test]
    fn it_is_over_when_both_have_been_well_below_for_a_while() {
        let mut samples = vec![(100, 0), (95, 0), (95, 0), (95, 0), (95, 0)];
        assert_eq!(says(&samples), [true; 5], "between the two bounds nothing changes");
        samples.extend([(89, 0), (89, 730), (89, 0), (89, 719), (89, 0)]);
        assert_eq!(says(&samples)[5..], [true; 5]);
        samples.push((89, 0));
        assert!(!says(&samples)[10]);
    }

    #[test]
    fn what_is_not_bounded_is_not_looked_at() {
        let bounds = Overload { allocations: None, cpu_permille: None, time: Duration::from_secs(1) };
        let mut detector = Detector::new(bounds);
        let now = Instant::now();
        for second in 0..5 {
            let sample = Sample { allocations: u64::MAX / 200, cpu_permille: 1000 };
            assert!(!detector.sample(now + Duration::from_secs(second), sample));
        }
    }
}
