//! Loss of a link over the last seconds (pure).

use std::collections::VecDeque;

/// Seconds that are looked back on.
const WINDOW: usize = 10;
/// And those that show loss that has begun: it counts as much as if it had been so all the time.
const LATELY: usize = 3;
/// Fewer packets say little: a single lost one of three is not a third.
const LEAST_PACKETS: u64 = 50;

/// Packets that QUIC has sent and lost, noted each second.
#[derive(Debug, Default)]
pub(super) struct Measure {
    notes: VecDeque<(u64, u64)>,
}

impl Measure {
    /// Both since the connection began.
    pub(super) fn note(&mut self, sent: u64, lost: u64) {
        if self.notes.len() > WINDOW {
            self.notes.pop_front();
        }
        self.notes.push_back((sent, lost));
    }

    /// Thousandths, 0..=1000, of the last seconds or of the whole window, whichever is more.
    pub(super) fn loss_permille(&self) -> u16 {
        let since = |index: usize| {
            let (Some((sent, lost)), Some((sent_before, lost_before))) = (self.notes.back(), self.notes.get(index))
            else {
                return 0;
            };
            let sent = sent.saturating_sub(*sent_before).max(LEAST_PACKETS);
            let lost = lost.saturating_sub(*lost_before);
            u16::try_from((lost * 1000 / sent).min(1000)).unwrap_or(1000)
        };
        since(0).max(since(self.notes.len().saturating_sub(LATELY + 1)))
    }

    /// The connection is another one.
    pub(super) fn begin_anew(&mut self) {
        self.notes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_is_of_the_last_ten_seconds() {
        let mut measure = Measure::default();
        assert_eq!(measure.loss_permille(), 0);
        let (mut sent, mut lost) = (0, 0);
        let mut go = |measure: &mut Measure, seconds: u32, loss: u64| {
            for _ in 0..seconds {
                (sent, lost) = (sent + 100, lost + loss);
                measure.note(sent, lost);
            }
            measure.loss_permille()
        };
        assert_eq!(go(&mut measure, 20, 20), 200);
        assert_eq!(go(&mut measure, 5, 0), 100);
        assert_eq!(go(&mut measure, 5, 0), 0);
    }

    #[test]
    fn loss_that_begins_is_seen_within_seconds() {
        let mut measure = Measure::default();
        for second in 0..20 {
            measure.note(second * 100, 0);
        }
        measure.note(2000, 20);
        assert_eq!(measure.loss_permille(), 66);
        measure.note(2100, 40);
        measure.note(2200, 60);
        assert_eq!(measure.loss_permille(), 200);
    }

    #[test]
    fn one_lost_probe_of_an_idle_link_is_two_percent() {
        let mut measure = Measure::default();
        measure.note(0, 0);
        measure.note(3, 1);
        assert_eq!(measure.loss_permille(), 20);
        measure.begin_anew();
        assert_eq!(measure.loss_permille(), 0);
    }
}
