//! What a claim of another machine, a cut cable or a pause leads to (pure).

use std::time::{Duration, Instant};

use super::LIFETIME;

/// A link that is cut for longer may come back to a network in which another machine has the address.
const CUT: Duration = Duration::from_secs(2);
/// A keeper that was not run for longer than this may have lost address and lease: it ticks each second.
const LAPSE: Duration = Duration::from_secs(3);
/// Between two announcements in defence (RFC 5227 §2.4 (c) wants 10 s from a host that may be wrong; this one has been
/// told by a controller that it is right).
const DEFENCE: Duration = Duration::from_secs(1);
/// Between two lines about the same conflict, and how long one is thought to go on.
const ALERT: Duration = Duration::from_secs(10);
/// How often others are asked for the address while there is reason to, and otherwise.
const PROBE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// When the neighbours are told, after the address was raised.
const ANNOUNCEMENTS: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// What to do about a claim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Answer {
    /// Announce again; the flag says that people are told.
    Defend {
        /// Once a while.
        alert: bool,
    },
    /// Defended a moment ago.
    Ignore,
    /// Find out whether this relay is still the owner.
    Ask,
}

/// The claims of others.
#[derive(Debug, Default)]
pub(super) struct Conflicts {
    last: Option<Instant>,
    defended: Option<Instant>,
    alerted: Option<Instant>,
    confirmed: Option<Instant>,
}

impl Conflicts {
    /// Another machine claims an address. Only an owner that was confirmed a moment ago defends it.
    pub(super) fn claimed(&mut self, connected: bool, now: Instant) -> Answer {
        self.last = Some(now);
        if !connected || is_over(self.confirmed, ALERT, now) {
            return Answer::Ask;
        }
        if !is_over(self.defended, DEFENCE, now) {
            return Answer::Ignore;
        }
        self.defended = Some(now);
        Answer::Defend { alert: self.alert(now) }
    }

    /// A controller has just confirmed that this relay is the owner.
    pub(super) fn confirmed(&mut self, now: Instant) {
        self.confirmed = Some(now);
    }

    /// Whether people are told, now.
    pub(super) fn alert(&mut self, now: Instant) -> bool {
        let due = is_over(self.alerted, ALERT, now);
        if due {
            self.alerted = Some(now);
        }
        due
    }

    /// Whether one went on a moment ago.
    pub(super) fn goes_on(&self, now: Instant) -> bool {
        !is_over(self.last, ALERT, now)
    }
}

fn is_over(since: Option<Instant>, after: Duration, now: Instant) -> bool {
    since.is_none_or(|since| now.saturating_duration_since(since) >= after)
}

/// Whether what is believed still holds.
#[derive(Debug)]
pub(super) struct Doubt {
    /// Time since boot of the last tick.
    ticked: Duration,
    /// Whether a pause matters: another machine may have been given the address.
    moves: bool,
    cut_since: Option<Instant>,
    /// The owner has to be asked for anew before anything is served.
    doubted: bool,
}

impl Doubt {
    pub(super) fn new(since_boot: Duration, moves: bool) -> Self {
        Self { ticked: since_boot, moves, cut_since: None, doubted: false }
    }

    /// A second has passed, or more: a process that stood still doubts everything, if its address may have moved.
    pub(super) fn tick(&mut self, since_boot: Duration) {
        let before = std::mem::replace(&mut self.ticked, since_boot);
        self.doubted |= self.moves && since_boot.saturating_sub(before) > LAPSE;
    }

    /// Whether the interface has a carrier.
    pub(super) fn carrier(&mut self, there: bool, now: Instant) {
        if there {
            self.cut_since = None;
        } else {
            let since = *self.cut_since.get_or_insert(now);
            self.doubted |= now.saturating_duration_since(since) >= CUT;
        }
    }

    /// Somebody else saw a reason.
    pub(super) fn raise(&mut self) {
        self.doubted = true;
    }

    /// Whether the address must not be served, and not be on this machine: a network it comes back to may have it
    /// elsewhere.
    pub(super) fn is_raised(&self) -> bool {
        self.doubted
    }

    /// Whether there is anybody to ask.
    pub(super) fn can_ask(&self) -> bool {
        self.cut_since.is_none()
    }
}

/// When neighbours are told and asked.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    raised: Option<Instant>,
    told: usize,
    probed: Option<Instant>,
}

impl Schedule {
    /// The address was raised.
    pub(super) fn begin(&mut self, now: Instant) {
        *self = Self { raised: Some(now), told: 0, probed: Some(now) };
    }

    /// The address is no longer here.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }

    /// Whether the address is raised.
    pub(super) fn has_begun(&self) -> bool {
        self.raised.is_some()
    }

    /// When the neighbours are told next.
    pub(super) fn next(&self) -> Option<Instant> {
        Some(self.raised? + *ANNOUNCEMENTS.get(self.told)?)
    }

    /// Whether they are told now; one announcement stands for all that are due.
    pub(super) fn announces(&mut self, now: Instant) -> bool {
        let before = self.told;
        while self.next().is_some_and(|at| at <= now) {
            self.told += 1;
        }
        self.told > before
    }

    /// Whether others are asked for the address now: each second after it was raised, while a claim goes on, and while
    /// no controller vouches for this relay.
    pub(super) fn probes(&mut self, worried: bool, now: Instant) -> bool {
        let Some(raised) = self.raised else { return false };
        let worried = worried || now.saturating_duration_since(raised) < ALERT;
        let due = is_over(self.probed, if worried { PROBE.0 } else { PROBE.1 }, now);
        if due {
            self.probed = Some(now);
        }
        due
    }
}

const _: () = assert!(LAPSE.as_secs() < LIFETIME.as_secs(), "a pause is doubted before the address has gone");

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn only_a_confirmed_owner_defends_and_not_too_often() {
        let (mut conflicts, now) = (Conflicts::default(), Instant::now());
        assert_eq!(conflicts.claimed(true, now), Answer::Ask, "not confirmed yet");
        conflicts.confirmed(now);
        assert_eq!(conflicts.claimed(false, now), Answer::Ask, "nobody vouches");
        assert_eq!(conflicts.claimed(true, now), Answer::Defend { alert: true });
        assert_eq!(conflicts.claimed(true, now + SECOND / 2), Answer::Ignore);
        assert_eq!(conflicts.claimed(true, now + SECOND), Answer::Defend { alert: false });
        assert!(conflicts.goes_on(now + SECOND * 10));
        assert!(!conflicts.goes_on(now + SECOND * 11));
        assert_eq!(conflicts.claimed(true, now + SECOND * 10), Answer::Ask, "confirmed long ago");
    }

    #[test]
    fn a_pause_and_a_cut_are_doubted() {
        let now = Instant::now();
        let mut doubt = Doubt::new(SECOND, true);
        for seconds in 2..10 {
            doubt.tick(SECOND * seconds);
            doubt.carrier(true, now);
        }
        assert!(!doubt.is_raised());
        doubt.tick(SECOND * 12 + SECOND / 2);
        assert!(doubt.is_raised(), "3.5 s without a tick");
        let mut fixed = Doubt::new(SECOND, false);
        fixed.tick(SECOND * 60);
        assert!(!fixed.is_raised(), "nobody else is given an address that moves nowhere");

        let mut doubt = Doubt::new(SECOND, true);
        doubt.carrier(false, now);
        doubt.carrier(false, now + SECOND);
        assert!(!doubt.is_raised() && !doubt.can_ask());
        doubt.carrier(true, now + SECOND);
        doubt.carrier(false, now + SECOND * 2);
        doubt.carrier(false, now + SECOND * 3);
        assert!(!doubt.is_raised(), "cuts do not add up");
        doubt.carrier(false, now + SECOND * 4);
        assert!(doubt.is_raised() && !doubt.can_ask());
        doubt.carrier(true, now + SECOND * 9);
        assert!(doubt.is_raised() && doubt.can_ask(), "the cable is back, the doubt stays");
    }

    #[test]
    fn neighbours_are_told_several_times_and_asked_for_a_while() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        assert!(!schedule.announces(start) && !schedule.probes(true, start) && schedule.next().is_none());
        schedule.begin(start);
        let mut told = Vec::new();
        let mut asked = Vec::new();
        for ms in (0..30_000).step_by(50) {
            let now = start + Duration::from_millis(ms);
            if schedule.announces(now) {
                told.push(ms);
            }
            if schedule.probes(false, now) {
                asked.push(ms / 1000);
            }
        }
        assert_eq!(told, [0, 100, 400, 1000, 2000, 4000]);
        assert_eq!(asked, [1, 2, 3, 4, 5, 6, 7, 8, 9, 19, 29]);
        assert!(schedule.probes(true, start + SECOND * 30));
        schedule.end();
        assert!(schedule.next().is_none() && !schedule.probes(true, start + SECOND * 60));
    }
}
