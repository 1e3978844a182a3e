//! Loss of a link over the last seconds, and what waits in the network (pure).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is looked back on.
const WINDOW: Duration = Duration::from_secs(10);
/// And what shows loss that has begun: it counts as much as if it had been so all the time.
const LATELY: Duration = Duration::from_secs(2);
/// Fewer packets say little: a single lost one of three is not a third.
const LEAST_PACKETS: u64 = 50;

#[derive(Clone, Copy, Debug)]
struct Note {
    at: Instant,
    rtt: Duration,
    sent: u64,
    lost: u64,
}

/// Round trips, and packets that QUIC has sent and lost, noted with each look at the link.
#[derive(Debug, Default)]
pub(super) struct Measure {
    notes: VecDeque<Note>,
}

impl Measure {
    /// The round trip of late, and both counts since the connection began.
    pub(super) fn note(&mut self, at: Instant, rtt: Duration, sent: u64, lost: u64) {
        // One that is as old as the window stays: it begins with it.
        while self.notes.get(1).is_some_and(|second| at.saturating_duration_since(second.at) >= WINDOW) {
            self.notes.pop_front();
        }
        self.notes.push_back(Note { at, rtt, sent, lost });
    }

    /// Thousandths, 0..=1000, of the last seconds or of the whole window, whichever is more.
    pub(super) fn loss_permille(&self) -> u16 {
        let (Some(first), Some(last)) = (self.notes.front(), self.notes.back()) else { return 0 };
        let since = |before: &Note| {
            let sent = last.sent.saturating_sub(before.sent).max(LEAST_PACKETS);
            let lost = last.lost.saturating_sub(before.lost);
            u16::try_from((lost * 1000 / sent).min(1000)).unwrap_or(1000)
        };
        let of_before = self.notes.partition_point(|note| last.at.saturating_duration_since(note.at) >= LATELY);
        let lately = self.notes.get(of_before.saturating_sub(1)).unwrap_or(first);
        since(first).max(since(lately))
    }

    /// How much longer than the shortest one the round trip is.
    pub(super) fn waits(&self) -> Duration {
        let shortest = self.notes.iter().map(|note| note.rtt).min().unwrap_or_default();
        self.notes.back().map_or(Duration::ZERO, |last| last.rtt - shortest)
    }

    /// The connection is another one.
    pub(super) fn begin_anew(&mut self) {
        self.notes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten notes a second, of so many packets and so much loss a second.
    struct Walk {
        measure: Measure,
        at: Instant,
        sent: u64,
        lost: u64,
    }

    impl Walk {
        fn new() -> Self {
            Self { measure: Measure::default(), at: Instant::now(), sent: 0, lost: 0 }
        }

        fn go(&mut self, notes: u64, per_second: u64, loss: u64) -> u16 {
            for _ in 0..notes {
                self.at += Duration::from_millis(100);
                (self.sent, self.lost) = (self.sent + per_second / 10, self.lost + loss / 10);
                self.measure.note(self.at, Duration::from_millis(40), self.sent, self.lost);
            }
            self.measure.loss_permille()
        }
    }

    #[test]
    fn loss_is_of_the_last_ten_seconds() {
        let mut walk = Walk::new();
        assert_eq!(walk.measure.loss_permille(), 0);
        assert_eq!(walk.go(200, 100, 20), 200);
        assert_eq!(walk.go(50, 100, 0), 100);
        assert_eq!(walk.go(50, 100, 0), 0);
        assert!(walk.measure.notes.len() <= 102, "{}", walk.measure.notes.len());
    }

    #[test]
    fn loss_that_begins_is_seen_within_two_seconds() {
        let mut walk = Walk::new();
        walk.go(200, 100, 0);
        assert_eq!(walk.go(5, 100, 20), 50);
        assert_eq!(walk.go(5, 100, 20), 100);
        assert_eq!(walk.go(10, 100, 20), 200);
    }

    #[test]
    fn one_lost_probe_of_an_idle_link_is_two_percent() {
        let mut measure = Measure::default();
        let now = Instant::now();
        measure.note(now, Duration::from_millis(40), 0, 0);
        measure.note(now + Duration::from_secs(1), Duration::from_millis(90), 3, 1);
        assert_eq!(measure.loss_permille(), 20);
        assert_eq!(measure.waits(), Duration::from_millis(50));
        measure.begin_anew();
        assert_eq!(measure.loss_permille(), 0);
    }
}
