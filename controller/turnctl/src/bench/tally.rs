//! What arrived of a flow.

use serde::Serialize;

use super::packet::Packet;

/// Numbers behind the newest that are still told apart from duplicates.
const WINDOW: u64 = 4096;

/// Packets of a load, counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Counts {
    /// Sent by clients and peers.
    pub sent: u64,
    /// Arrived whole where they belong; an echoed packet arrives twice, at the peer and at its client.
    pub delivered: u64,
    /// Never arrived.
    pub lost: u64,
    /// Arrived once more.
    pub duplicates: u64,
    /// Arrived with another length or content.
    pub corrupt: u64,
    /// Arrived where another flow belongs.
    pub misdelivered: u64,
    /// Arrived behind one that was sent later.
    pub reordered: u64,
}

impl Counts {
    /// Lost packets of a hundred sent.
    pub fn loss_percent(&self) -> f64 {
        if self.sent == 0 { 0.0 } else { self.lost as f64 * 100.0 / self.sent as f64 }
    }

    /// Whether what arrived is what was sent, once and at its place.
    pub fn is_clean(&self) -> bool {
        self.duplicates == 0 && self.corrupt == 0 && self.misdelivered == 0
    }
}

/// What one end has received of one flow.
#[derive(Clone, Debug)]
pub struct Tally {
    newest: u64,
    seen: Box<[u64]>,
    unique: u64,
}

/// What a packet turned out to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seen {
    /// The next, or one behind a gap of so many.
    New(u64),
    /// One of a gap.
    Late,
    /// One that was there already, or is too old to tell.
    Duplicate,
}

impl Tally {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { newest: 0, seen: vec![0; usize::try_from(WINDOW / 64).unwrap_or(0)].into_boxed_slice(), unique: 0 }
    }

    /// The highest number so far.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Different packets so far.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Enters a packet.
    pub fn enter(&mut self, packet: &Packet) -> Seen {
        let number = packet.number;
        if number > self.newest {
            let gap = number - self.newest - 1;
            for skipped in (self.newest + 1..=number).rev().take(usize::try_from(WINDOW).unwrap_or(usize::MAX)) {
                self.mark(skipped, false);
            }
            self.mark(number, true);
            self.newest = number;
            self.unique += 1;
            return Seen::New(gap);
        }
        if number == 0 || self.newest - number >= WINDOW || self.is_marked(number) {
            return Seen::Duplicate;
        }
        self.mark(number, true);
        self.unique += 1;
        Seen::Late
    }

    fn place(number: u64) -> (usize, u64) {
        let slot = number % WINDOW;
        (usize::try_from(slot / 64).unwrap_or(0), 1 << (slot % 64))
    }

    fn is_marked(&self, number: u64) -> bool {
        let (word, bit) = Self::place(number);
        self.seen[word] & bit != 0
    }

    fn mark(&mut self, number: u64, seen: bool) {
        let (word, bit) = Self::place(number);
        if seen {
            self.seen[word] |= bit;
        } else {
            self.seen[word] &= !bit;
        }
    }
}

impl Default for Tally {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_late_ones_and_duplicates_are_told_apart() {
        let mut tally = Tally::new();
        let mut enter = |number| tally.enter(&Packet { flow: 0, number, sent: 0 });
        assert_eq!(enter(1), Seen::New(0));
        assert_eq!(enter(1), Seen::Duplicate);
        assert_eq!(enter(5), Seen::New(3));
        assert_eq!(enter(3), Seen::Late);
        assert_eq!(enter(3), Seen::Duplicate);
        assert_eq!(enter(0), Seen::Duplicate);
        // The window has gone round: what is marked are packets of the round before.
        assert_eq!(enter(WINDOW + 3), Seen::New(WINDOW - 3));
        assert_eq!(enter(5), Seen::Duplicate);
        assert_eq!(enter(WINDOW + 1), Seen::Late);
        assert_eq!(enter(2), Seen::Duplicate, "too old to tell");
        assert_eq!(enter(10 * WINDOW), Seen::New(9 * WINDOW - 4));
        for number in 9 * WINDOW + 1..10 * WINDOW {
            assert_eq!(enter(number), Seen::Late);
        }
        assert_eq!((tally.newest(), tally.unique()), (10 * WINDOW, 3 + 2 + WINDOW));
    }
}
