//! Whether a link lives (pure): a link that is asked and stays silent is left within a second, and trusted again only when
//! it has answered for a while, longer each time it fails again soon.

use std::time::{Duration, Instant};

/// How often a link that carries flows, or is not trusted, is asked.
const PROBE: Duration = Duration::from_millis(200);
/// How often an idle one is.
const PROBE_IDLE: Duration = Duration::from_secs(1);
/// Silence of this length after a question is suspect; or three round trips, where they take longer.
const SILENCE: Duration = Duration::from_millis(600);
/// How long a link answers without a pause before it is trusted again.
const FIRST_HOLD: Duration = Duration::from_secs(1);
/// The longest hold.
const LONGEST_HOLD: Duration = Duration::from_secs(16);
/// A link that fails this soon after it was trusted has its hold doubled; one that lasts longer begins anew.
const SOON: Duration = Duration::from_secs(60);

/// What is known of a link.
#[derive(Debug, Default)]
pub(super) struct Liveness {
    asked: Option<Instant>,
    /// The first question that nothing has come back for.
    open_since: Option<Instant>,
    /// First and last answer since it was silent; none while it is.
    answers: Option<(Instant, Instant)>,
    hold: Duration,
    trusted: bool,
    trusted_since: Option<Instant>,
}

impl Liveness {
    /// Whether it is time to ask.
    pub(super) fn is_due(&self, now: Instant, carries_flows: bool) -> bool {
        let every = if carries_flows || !self.trusted { PROBE } else { PROBE_IDLE };
        // Looks come at intervals of their own: one that is a little early is in time.
        self.asked.is_none_or(|asked| now.saturating_duration_since(asked) + PROBE / 10 >= every)
    }

    /// It was asked.
    pub(super) fn asked(&mut self, now: Instant) {
        self.asked = Some(now);
        self.open_since.get_or_insert(now);
    }

    /// Something came back that shows both directions to work.
    pub(super) fn answered(&mut self, now: Instant) {
        self.open_since = None;
        self.answers.get_or_insert((now, now)).1 = now;
    }

    /// Its connection is lost.
    pub(super) fn lost(&mut self, now: Instant) {
        self.asked = None;
        self.open_since = None;
        self.fall(now);
    }

    /// Draws conclusions.
    pub(super) fn look(&mut self, now: Instant, rtt: Duration) {
        let silence = SILENCE.max(rtt * 3);
        if self.open_since.is_some_and(|since| now.saturating_duration_since(since) >= silence) {
            self.fall(now);
        }
        let Some((first, last)) = self.answers else { return };
        if !self.trusted && last.saturating_duration_since(first) >= self.hold {
            self.trusted = true;
            self.trusted_since = Some(now);
        }
    }

    /// It answers now.
    pub(super) fn answers(&self) -> bool {
        self.answers.is_some()
    }

    /// It has answered for long enough.
    pub(super) fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// For how long nothing has come back.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        self.open_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    fn fall(&mut self, now: Instant) {
        self.answers = None;
        if std::mem::take(&mut self.trusted) {
            let soon = self.trusted_since.is_some_and(|since| now.saturating_duration_since(since) < SOON);
            self.hold = if soon && !self.hold.is_zero() { (self.hold * 2).min(LONGEST_HOLD) } else { FIRST_HOLD };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(100);
    const RTT: Duration = Duration::from_millis(80);

    /// Walks in steps; `works` says whether the network does. Returns when trust changed.
    fn walk(
        liveness: &mut Liveness,
        now: &mut Instant,
        duration: Duration,
        works: impl Fn(Duration) -> bool,
    ) -> Vec<(u128, bool)> {
        let start = *now;
        let mut changes = Vec::new();
        while now.duration_since(start) < duration {
            let at = now.duration_since(start);
            if liveness.is_due(*now, true) {
                liveness.asked(*now);
                if works(at) {
                    liveness.answered(*now + RTT);
                }
            }
            let before = liveness.is_trusted();
            liveness.look(*now, RTT);
            if liveness.is_trusted() != before {
                changes.push((at.as_millis(), liveness.is_trusted()));
            }
            *now += STEP;
        }
        changes
    }

    #[test]
    fn a_new_link_is_trusted_with_its_first_answer() {
        let (mut liveness, mut now) = (Liveness::default(), Instant::now());
        assert!(!liveness.is_trusted() && !liveness.answers());
        let changes = walk(&mut liveness, &mut now, Duration::from_secs(1), |_| true);
        assert_eq!(changes.iter().map(|(_, trusted)| *trusted).collect::<Vec<_>>(), [true]);
        assert!(changes[0].0 <= 100);
    }

    #[test]
    fn silence_is_noticed_within_a_second_and_trust_comes_back_later() {
        let (mut liveness, mut now) = (Liveness::default(), Instant::now());
        let cut = Duration::from_secs(2)..Duration::from_secs(5);
        let changes = walk(&mut liveness, &mut now, Duration::from_secs(10), |at| !cut.contains(&at));
        assert_eq!(changes.len(), 3, "{changes:?}");
        assert!((2_500..=3_000).contains(&changes[1].0), "{changes:?}");
        assert!((6_000..=6_500).contains(&changes[2].0), "held for a second: {changes:?}");
    }

    #[test]
    fn single_losses_are_not_silence() {
        let (mut liveness, mut now) = (Liveness::default(), Instant::now());
        // Two of three questions are lost.
        let changes = walk(&mut liveness, &mut now, Duration::from_secs(60), |at| at.as_millis() / 200 % 3 == 0);
        assert_eq!(changes.len(), 1, "{changes:?}");
    }

    #[test]
    fn a_flapping_link_is_used_less_and_less() {
        let (mut liveness, mut now) = (Liveness::default(), Instant::now());
        let changes = walk(&mut liveness, &mut now, Duration::from_secs(120), |at| at.as_secs() % 4 < 2);
        let taken: Vec<_> = changes.iter().filter(|(_, trusted)| *trusted).map(|(at, _)| *at / 1000).collect();
        assert!(taken.len() <= 3, "{taken:?}");
        // It holds: once it stays up it is taken, and a minute later its past is forgotten.
        let changes = walk(&mut liveness, &mut now, Duration::from_secs(90), |_| true);
        assert!(changes.len() == 1 && changes[0].1 && changes[0].0 <= 17_000, "{changes:?}");
        let changes = walk(&mut liveness, &mut now, Duration::from_secs(10), |at| at > Duration::from_secs(2));
        assert!(changes.len() == 2 && changes[1].0 < 4_000, "{changes:?}");
    }

    #[test]
    fn an_idle_link_is_asked_less_often_and_is_not_suspect_for_it() {
        let (mut liveness, mut now) = (Liveness::default(), Instant::now());
        walk(&mut liveness, &mut now, Duration::from_secs(1), |_| true);
        let mut asked = 0;
        for _ in 0..100 {
            if liveness.is_due(now, false) {
                liveness.asked(now);
                liveness.answered(now + RTT);
                asked += 1;
            }
            liveness.look(now, RTT);
            assert!(liveness.is_trusted());
            now += STEP;
        }
        assert!((9..=11).contains(&asked), "{asked}");
    }

    #[test]
    fn a_long_way_is_not_silence() {
        let (mut liveness, now) = (Liveness::default(), Instant::now());
        liveness.answered(now);
        liveness.look(now, RTT);
        liveness.asked(now);
        liveness.look(now + Duration::from_millis(700), Duration::from_millis(300));
        assert!(liveness.is_trusted());
        liveness.look(now + Duration::from_millis(900), Duration::from_millis(300));
        assert!(!liveness.is_trusted());
    }
}
