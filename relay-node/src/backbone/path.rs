//! Which way packets take to a member (pure): the link between the two, or over one third member, where that has been
//! clearly better for a while or the direct link is down.

use std::time::{Duration, Instant};

use turn_core::MemberId;

/// Better by less than this, and by less than a fifth, is not clearly better.
const CLEARLY: Duration = Duration::from_millis(10);
/// For so long another way has to be better.
const HOLD: Duration = Duration::from_secs(10);
/// What a lost packet in a thousand is worth: 1 % of loss weighs as much as 5 ms.
const PER_PERMILLE: Duration = Duration::from_micros(500);

/// How good a way is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Quality {
    pub(super) rtt: Duration,
    pub(super) loss_permille: u16,
}

impl Quality {
    /// Of two ways, one behind the other.
    pub(super) fn then(self, next: Self) -> Self {
        let (first, second) = (u32::from(self.loss_permille), u32::from(next.loss_permille));
        let loss = (first + second).saturating_sub(first * second / 1000).min(1000);
        Self { rtt: self.rtt + next.rtt, loss_permille: loss as u16 }
    }

    fn cost(self) -> Duration {
        self.rtt + PER_PERMILLE * self.loss_permille.into()
    }

    fn is_clearly_better_than(self, other: Self) -> bool {
        let (cost, other) = (self.cost(), other.cost());
        cost + CLEARLY < other && cost < other * 4 / 5
    }
}

/// A way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Way {
    /// The link between the two.
    #[default]
    Direct,
    /// Over this member.
    Via(MemberId),
}

/// What was chosen, and what may be chosen next.
#[derive(Debug, Default)]
pub(super) struct Chooser {
    way: Way,
    why: &'static str,
    /// Another way has been better since then.
    better_since: Option<Instant>,
}

impl Chooser {
    pub(super) fn way(&self) -> Way {
        self.way
    }

    /// In few words.
    pub(super) fn why(&self) -> &'static str {
        self.why
    }

    /// The way that was chosen does not work.
    pub(super) fn failed(&mut self) {
        *self = Self { why: "the detour has failed", ..Self::default() };
    }

    /// Several times a second: `direct` is the direct link where it works, `others` the ways over others that do.
    pub(super) fn choose(&mut self, now: Instant, direct: Option<Quality>, others: &[(MemberId, Quality)]) -> Way {
        let best = others.iter().copied().min_by_key(|(_, quality)| quality.cost());
        let current = match self.way {
            Way::Direct => direct,
            Way::Via(via) => others.iter().find(|(other, _)| *other == via).map(|(_, quality)| *quality),
        };
        match (current, direct, best) {
            // What is in use does not work: what does is taken at once.
            (None, Some(_), _) => self.take(Way::Direct, "the direct link works"),
            (None, None, Some((via, _))) => self.take(Way::Via(via), "the direct link is down"),
            (None, None, None) => self.take(Way::Direct, "no way works"),
            (Some(current), direct, best) => self.compare(now, current, direct, best),
        }
        self.way
    }

    fn compare(&mut self, now: Instant, current: Quality, direct: Option<Quality>, best: Option<(MemberId, Quality)>) {
        let on_detour = self.way != Way::Direct;
        let better = match (direct, best) {
            // Back as soon as the detour is no longer worth anything.
            (Some(direct), _) if on_detour && direct.cost() <= current.cost() => {
                Some((Way::Direct, "the detour is no longer better"))
            }
            (_, Some((via, quality))) if quality.is_clearly_better_than(current) => {
                Some((Way::Via(via), "clearly better for ten seconds"))
            }
            _ => None,
        };
        match (better, self.better_since) {
            (None, _) => {
                self.better_since = None;
                if !on_detour {
                    self.why = "the direct link is the best";
                }
            }
            (Some(_), None) => self.better_since = Some(now),
            (Some((way, why)), Some(since)) if now.saturating_duration_since(since) >= HOLD => self.take(way, why),
            (Some(_), Some(_)) => {}
        }
    }

    fn take(&mut self, way: Way, why: &'static str) {
        (self.way, self.why, self.better_since) = (way, why, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: MemberId = MemberId(3);
    const D: MemberId = MemberId(4);

    fn quality(rtt: u64, loss_permille: u16) -> Quality {
        Quality { rtt: Duration::from_millis(rtt), loss_permille }
    }

    /// Second by second; gives the seconds at which the way changed, and to which.
    fn walk(
        chooser: &mut Chooser,
        seconds: std::ops::Range<u64>,
        start: Instant,
        at: impl Fn(u64) -> (Option<Quality>, Vec<(MemberId, Quality)>),
    ) -> Vec<(u64, Way)> {
        let mut changes = Vec::new();
        for second in seconds {
            let before = chooser.way();
            let (direct, others) = at(second);
            let way = chooser.choose(start + Duration::from_secs(second), direct, &others);
            if way != before {
                changes.push((second, way));
            }
        }
        changes
    }

    #[test]
    fn a_clearly_better_way_is_taken_after_ten_seconds_and_left_when_it_is_no_longer_better() {
        for bad in [quality(200, 0), quality(40, 200)] {
            let (mut chooser, start) = (Chooser::default(), Instant::now());
            let changes = walk(&mut chooser, 0..100, start, |second| {
                let direct = if (10..50).contains(&second) { bad } else { quality(40, 0) };
                (Some(direct), vec![(C, quality(60, 0))])
            });
            assert_eq!(changes, [(20, Way::Via(C)), (60, Way::Direct)], "{bad:?}");
        }
    }

    #[test]
    fn a_little_better_is_not_enough() {
        let (mut chooser, start) = (Chooser::default(), Instant::now());
        // 9 ms and a half; 15 ms of 200.
        for (direct, via) in [(18, 9), (200, 185), (50, 41)] {
            let changes = walk(&mut chooser, 0..100, start, |_| (Some(quality(direct, 0)), vec![(C, quality(via, 0))]));
            assert!(changes.is_empty(), "{direct} and {via}: {changes:?}");
        }
        assert_eq!(chooser.why(), "the direct link is the best");
    }

    #[test]
    fn noise_changes_nothing() {
        let (mut chooser, start) = (Chooser::default(), Instant::now());
        let noise = |second: u64, salt: u64| (second * 7919 + salt * 104_729) % 41;
        let changes = walk(&mut chooser, 0..300, start, |second| {
            let direct = quality(70 + noise(second, 1), 0);
            (Some(direct), vec![(C, quality(60 + noise(second, 2), 0)), (D, quality(60 + noise(second, 3), 0))])
        });
        assert!(changes.is_empty(), "{changes:?}");
        // And on the detour.
        let (mut chooser, start) = (Chooser::default(), Instant::now());
        let changes = walk(&mut chooser, 0..300, start, |second| {
            let direct = quality(180 + noise(second, 1), 0);
            (Some(direct), vec![(C, quality(60 + noise(second, 2), 0)), (D, quality(75 + noise(second, 3), 0))])
        });
        assert_eq!(changes.len(), 1, "{changes:?}");
    }

    #[test]
    fn a_link_that_is_down_is_left_at_once_and_taken_again_when_it_works() {
        let (mut chooser, start) = (Chooser::default(), Instant::now());
        let changes = walk(&mut chooser, 0..60, start, |second| {
            let direct = (!(10..30).contains(&second)).then(|| quality(40, 0));
            (direct, vec![(C, quality(300, 0)), (D, quality(90, 0))])
        });
        assert_eq!(changes, [(10, Way::Via(D)), (40, Way::Direct)]);
        assert_eq!(chooser.why(), "the direct link is the best");
    }

    #[test]
    fn a_detour_that_ends_is_left_at_once() {
        let (mut chooser, start) = (Chooser::default(), Instant::now());
        let changes = walk(&mut chooser, 0..60, start, |second| {
            let mut others = vec![(D, quality(80, 0))];
            if second < 30 {
                others.push((C, quality(60, 0)));
            }
            (Some(quality(200, 0)), others)
        });
        assert_eq!(changes, [(10, Way::Via(C)), (30, Way::Direct), (41, Way::Via(D))]);
        chooser.failed();
        assert_eq!(chooser.way(), Way::Direct);
    }

    #[test]
    fn ways_add_up() {
        assert_eq!(quality(10, 100).then(quality(20, 100)), quality(30, 190));
        assert_eq!(quality(10, 1000).then(quality(20, 1000)), quality(30, 1000));
    }
}
