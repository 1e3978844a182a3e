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

/// How long controllers have for their Welcome. One behind a slow store may need longer than another one should be kept
/// waiting for, and a claim that is given up lands all the same and ends the session that stands meanwhile: once every
/// controller has been silent in turn, each has twice as long.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Patience {
    silent: u32,
}

impl Patience {
    /// At first.
    pub(crate) const FIRST: Duration = Duration::from_secs(3);
    /// At most.
    const LONGEST: Duration = Duration::from_secs(12);

    /// With so many controllers.
    pub(crate) fn now(self, controllers: usize) -> Duration {
        let rounds = self.silent / u32::try_from(controllers.max(1)).unwrap_or(u32::MAX);
        Self::FIRST.saturating_mul(1 << rounds.min(16)).min(Self::LONGEST)
    }

    /// One had its time and did not answer.
    pub(crate) fn silent(&mut self) {
        self.silent = self.silent.saturating_add(1);
    }

    /// One has answered.
    pub(crate) fn answered(&mut self) {
        self.silent = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_when_all_were_silent() {
        let mut patience = Patience::default();
        let mut waits = Vec::new();
        for _ in 0..7 {
            waits.push(patience.now(2).as_secs());
            patience.silent();
        }
        assert_eq!(waits, [3, 3, 6, 6, 12, 12, 12]);
        assert_eq!(patience.now(0).as_secs(), 12, "no controllers");
        patience.answered();
        assert_eq!(patience.now(2), Patience::FIRST);
    }

    #[test]
    fn waits_grow_to_the_cap_and_differ() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(waits[0] <= Duration::from_millis(100) && waits[0] >= Duration::from_millis(50));
        assert!(waits[6..].iter().all(|w| *w >= Backoff::CAP / 2 && *w <= Backoff::CAP));
        assert!(waits[6..].windows(2).any(|pair| pair[0] != pair[1]));
    }
}
