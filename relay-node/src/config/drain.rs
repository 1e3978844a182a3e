//! How a relay ends and when it has enough to do: `drain_deadline` and the table `[overload]`.

use std::time::Duration;

use serde::Deserialize;

use super::ConfigError;

/// The longest `drain_deadline`, seconds.
const A_DAY: u32 = 86_400;
/// The longest `overload.seconds`.
const LONGEST: u16 = 3600;

/// When new clients are sent to other relays because this one has enough to do; 0 looks away.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct WrittenOverload {
    /// Whether new clients are sent elsewhere at all.
    pub redirect: bool,
    /// From this share of `max_allocations` on, percent, 0..=100.
    pub allocations_percent: u8,
    /// From this use of the busiest worker's core on, thousandths, 0..=1000, for `seconds`.
    pub cpu_permille: u16,
    /// How long the core must be busy, and how long it must be well below both bounds before new clients are taken
    /// again, 1..=3600.
    pub seconds: u16,
}

impl Default for WrittenOverload {
    fn default() -> Self {
        Self { redirect: true, allocations_percent: 90, cpu_permille: 900, seconds: 10 }
    }
}

/// The checked form; a bound that is none is not looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Overload {
    /// Allocations.
    pub allocations: Option<u64>,
    /// Thousandths of a core.
    pub cpu_permille: Option<u32>,
    /// How long either has to last.
    pub time: Duration,
}

impl WrittenOverload {
    pub(super) fn check(self, max_allocations: u32) -> Result<Overload, ConfigError> {
        let wrong = |key: &str, problem: String| Err(ConfigError::new(format!("overload.{key}"), problem));
        if self.allocations_percent > 100 {
            return wrong("allocations_percent", format!("{} is not in 0..=100", self.allocations_percent));
        }
        if self.cpu_permille > 1000 {
            return wrong("cpu_permille", format!("{} is not in 0..=1000", self.cpu_permille));
        }
        if !(1..=LONGEST).contains(&self.seconds) {
            return wrong("seconds", format!("{} is not in 1..={LONGEST}", self.seconds));
        }
        let share = u64::from(max_allocations) * u64::from(self.allocations_percent) / 100;
        Ok(Overload {
            allocations: (self.redirect && share > 0).then_some(share),
            cpu_permille: (self.redirect && self.cpu_permille > 0).then_some(self.cpu_permille.into()),
            time: Duration::from_secs(self.seconds.into()),
        })
    }
}

/// How long a relay that is told to stop goes on with the calls it has.
pub(super) fn deadline(seconds: u32) -> Result<Duration, ConfigError> {
    if seconds > A_DAY {
        let problem = format!("{seconds} is more than {A_DAY}; it is in seconds, 0 ends at once");
        return Err(ConfigError::new("drain_deadline", problem));
    }
    Ok(Duration::from_secs(seconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_of_what_is_configured() {
        let overload = WrittenOverload::default().check(1000).expect("good");
        assert_eq!((overload.allocations, overload.cpu_permille), (Some(900), Some(900)));
        // Without a limit there is no share of it.
        assert_eq!(WrittenOverload::default().check(0).expect("good").allocations, None);
        let off = WrittenOverload { redirect: false, ..WrittenOverload::default() }.check(1000).expect("good");
        assert_eq!((off.allocations, off.cpu_permille), (None, None));
    }

    #[test]
    fn mistakes_name_their_key() {
        type Spoil = fn(&mut WrittenOverload);
        let cases: &[(Spoil, &str)] = &[
            (|o| o.allocations_percent = 101, "overload.allocations_percent: 101 is not in 0..=100"),
            (|o| o.cpu_permille = 1001, "overload.cpu_permille: 1001 is not in 0..=1000"),
            (|o| o.seconds = 0, "overload.seconds: 0 is not in 1..=3600"),
        ];
        for (spoil, expected) in cases {
            let mut written = WrittenOverload::default();
            spoil(&mut written);
            assert_eq!(written.check(1).map_err(|error| error.to_string()), Err((*expected).to_owned()));
        }
        let error = deadline(90_000).expect_err("too long").to_string();
        assert_eq!(error, "drain_deadline: 90000 is more than 86400; it is in seconds, 0 ends at once");
    }
}
