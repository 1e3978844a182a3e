//! When allocations end: a heap that knows where each entry is, so that a deadline moves instead of piling up.
//! O(log n) to arm, move and disarm; O(1) to look; never a scan. A client that refreshes without end adds nothing.

use std::time::Instant;

use super::table::Slot;

/// One deadline per slot.
#[derive(Default)]
pub(super) struct Timers {
    /// A binary heap, earliest first.
    heap: Vec<(Instant, Slot)>,
    /// By slot: index in the heap, or [`NOWHERE`].
    position: Vec<u32>,
}

const NOWHERE: u32 = u32::MAX;

impl Timers {
    /// The earliest deadline and whose it is.
    pub(super) fn next(&self) -> Option<(Instant, Slot)> {
        self.heap.first().copied()
    }

    /// Sets or moves the deadline of a slot.
    pub(super) fn arm(&mut self, slot: Slot, deadline: Instant) {
        if self.position.len() <= slot.index() {
            self.position.resize(slot.index() + 1, NOWHERE);
        }
        let index = match self.position[slot.index()] {
            NOWHERE => {
                self.heap.push((deadline, slot));
                self.heap.len() - 1
            }
            index => {
                self.heap[index as usize].0 = deadline;
                index as usize
            }
        };
        self.settle(index);
    }

    /// Forgets a slot.
    pub(super) fn disarm(&mut self, slot: Slot) {
        let Some(position) = self.position.get_mut(slot.index()) else {
            return;
        };
        let index = std::mem::replace(position, NOWHERE);
        if index != NOWHERE {
            self.heap.swap_remove(index as usize);
            if (index as usize) < self.heap.len() {
                self.settle(index as usize);
            }
        }
    }

    /// Brings the entry at `index` to its place, up or down.
    fn settle(&mut self, mut index: usize) {
        while index > 0 && self.heap[index].0 < self.heap[(index - 1) / 2].0 {
            self.swap(index, (index - 1) / 2);
            index = (index - 1) / 2;
        }
        loop {
            let earliest = [2 * index + 1, 2 * index + 2]
                .into_iter()
                .filter(|child| *child < self.heap.len())
                .min_by_key(|child| self.heap[*child].0);
            match earliest {
                Some(child) if self.heap[child].0 < self.heap[index].0 => {
                    self.swap(index, child);
                    index = child;
                }
                _ => break,
            }
        }
        self.note(index);
    }

    fn swap(&mut self, left: usize, right: usize) {
        self.heap.swap(left, right);
        self.note(left);
        self.note(right);
    }

    fn note(&mut self, index: usize) {
        let slot = self.heap[index].1;
        // Slots are u32, so there are no more entries than that.
        self.position[slot.index()] = index as u32;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use rand_chacha::ChaCha12Rng;
    use rand_core::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn agrees_with_a_plain_map() {
        let start = Instant::now();
        let mut rng = ChaCha12Rng::from_seed([7; 32]);
        let mut timers = Timers::default();
        let mut model = BTreeMap::new();
        for _ in 0..20_000 {
            let slot = Slot(rng.next_u32() % 200);
            if rng.next_u32() % 3 == 0 {
                timers.disarm(slot);
                model.remove(&slot);
            } else {
                let deadline = start + Duration::from_millis(u64::from(rng.next_u32() % 1000));
                timers.arm(slot, deadline);
                model.insert(slot, deadline);
            }
            assert_eq!(timers.next().map(|(at, _)| at), model.values().min().copied());
            assert_eq!(timers.heap.len(), model.len());
            if let Some((at, slot)) = timers.next() {
                assert_eq!(model[&slot], at);
            }
        }
        // Drained in order.
        let mut last = start;
        while let Some((at, slot)) = timers.next() {
            assert!(at >= last);
            assert_eq!(model.remove(&slot), Some(at));
            last = at;
            timers.disarm(slot);
        }
        assert!(model.is_empty());
    }
}
