//! How long to wait before the next try.

use std::time::Duration;

/// Doubles from 100 ms to [`Backoff::CAP`], and takes a random half of it off, so that a cluster of relays does not
/// come back in step.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    tries: u32,
}

impl Backoff {
    /// The longest wait.
    pub(crate) const CAP: Duration = Duration::from_secs(3);
    const FIRST: Duration = Duration::from_millis(100);

    pub(crate) fn next(&mut self) -> Duration {
        let whole = Self::FIRST.saturating_mul(1 << self.tries.min(16)).min(Self::CAP);
        self.tries = self.tries.saturating_add(1);
        // Without randomness relays come back in step, no worse.
        let random = getrandom::u32().unwrap_or(u32::MAX);
        whole.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_differ() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(waits[0] <= Duration::from_millis(100) && waits[0] >= Duration::from_millis(50));
        assert!(waits[6..].iter().all(|w| *w >= Backoff::CAP / 2 && *w <= Backoff::CAP));
        assert!(waits[6..].windows(2).any(|pair| pair[0] != pair[1]));
    }
}
