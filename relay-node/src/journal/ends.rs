//! Allocations that have ended and may still be stored.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use turn_core::index::{Index, plain_hash};
use turn_core::{AllocationId, Change, EndReason, WorkerId};

/// Tombstones kept at most, some 5 MB of memory and as much of disk: more than a node ends in an outage of minutes.
/// Beyond it the oldest go, and what the store has of them lives on until it expires.
const MOST: usize = 65_536;
/// Tombstones that there is always room for, once there was.
const KEPT: usize = 512;

/// The tombstones of this process and of those before, until the store is known to have them: a record that comes back
/// from the store must not revive what has ended here. One per process; a lock, because ends are no packet path.
#[derive(Debug)]
pub struct Ends {
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The oldest first.
    tombstones: VecDeque<Tombstone>,
    /// By ids: numbers of tombstones, which are counted from the first of all, and begin anew after the last of 32 bits.
    by_id: Index,
    /// The number of the oldest.
    first: u32,
}

/// [`Change::End`], and whose file it is to stand in.
#[derive(Debug)]
struct Tombstone {
    noted: Instant,
    id: AllocationId,
    epoch: u64,
    sequence: u64,
    worker: WorkerId,
    reason: EndReason,
}

impl Tombstone {
    fn change(&self) -> Change {
        Change::End { id: self.id, epoch: self.epoch, sequence: self.sequence, reason: self.reason }
    }
}

impl Ends {
    /// None yet. A relay without a store has nobody to revive anything.
    pub fn new(has_store: bool) -> Self {
        Self { most: if has_store { MOST } else { 0 }, state: Mutex::default() }
    }

    /// Whether any are kept.
    pub fn are_kept(&self) -> bool {
        self.most > 0
    }

    /// Keeps a tombstone, to be written by `worker`; of a record nothing is kept.
    pub fn note(&self, worker: WorkerId, change: &Change, now: Instant) {
        let Change::End { id, epoch, sequence, reason } = *change else { return };
        let mut state = self.lock();
        if self.most == 0 || state.contains(id) {
            return;
        }
        state.push(Tombstone { noted: now, id, epoch, sequence, worker, reason });
        if state.tombstones.len() > self.most {
            state.pop_if(|_| true);
        }
    }

    /// Whether an allocation has ended here.
    pub fn contains(&self, id: AllocationId) -> bool {
        self.lock().contains(id)
    }

    /// The tombstones that are to stand in a worker's file, the oldest first.
    pub fn of(&self, worker: WorkerId) -> Vec<Change> {
        let state = self.lock();
        let of_worker = state.tombstones.iter().filter(|tombstone| tombstone.worker == worker);
        of_worker.map(Tombstone::change).collect()
    }

    /// The store has every end that was noted before `until`.
    pub fn settle(&self, until: Instant) {
        let mut state = self.lock();
        while state.pop_if(|oldest| oldest.noted < until) {}
        state.give_back();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn contains(&self, id: AllocationId) -> bool {
        let is = |number: u32| {
            let tombstone = self.tombstones.get(number.wrapping_sub(self.first) as usize);
            tombstone.is_some_and(|tombstone| tombstone.id == id)
        };
        self.by_id.find(plain_hash(&id), is).is_some()
    }

    fn push(&mut self, tombstone: Tombstone) {
        // There are never more than 2^32 at a time.
        let number = self.first.wrapping_add(self.tombstones.len() as u32);
        self.by_id.insert(plain_hash(&tombstone.id), number);
        self.tombstones.push_back(tombstone);
    }

    /// Takes the oldest one away; whether there was such a one.
    fn pop_if(&mut self, is_due: impl FnOnce(&Tombstone) -> bool) -> bool {
        let Some(oldest) = self.tombstones.pop_front_if(|oldest| is_due(oldest)) else { return false };
        self.by_id.remove(plain_hash(&oldest.id), self.first);
        self.first = self.first.wrapping_add(1);
        true
    }

    /// Many allocations that ended at once are no reason to keep room for as many.
    fn give_back(&mut self) {
        let room = (2 * self.tombstones.len()).max(KEPT);
        if self.tombstones.capacity() > 2 * room {
            self.tombstones.shrink_to(room);
            self.by_id.shrink_to(room);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn end(id: u32) -> Change {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&id.to_be_bytes());
        Change::End { id: AllocationId(bytes), epoch: 1, sequence: 1, reason: EndReason::Deleted }
    }

    fn id(change: &Change) -> AllocationId {
        match change {
            Change::End { id, .. } => *id,
            Change::Put(record) => record.id,
        }
    }

    #[test]
    fn kept_by_worker_until_the_store_has_them() {
        let ends = Ends::new(true);
        let now = Instant::now();
        let second = Duration::from_secs(1);
        for (number, worker) in [(1, 0), (2, 1), (3, 0)] {
            ends.note(WorkerId(worker), &end(number), now + second * number);
        }
        assert_eq!((ends.of(WorkerId(0)).len(), ends.of(WorkerId(1))), (2, vec![end(2)]));
        ends.settle(now + second * 2);
        assert!(!ends.contains(id(&end(1))) && ends.contains(id(&end(2))), "the one of that moment is not before it");
        ends.settle(now + second * 9);
        assert!(ends.of(WorkerId(0)).is_empty());
    }

    #[test]
    fn room_is_given_back_and_what_is_left_is_found() {
        let ends = Ends::new(true);
        // Numbers begin anew in the middle.
        ends.lock().first = u32::MAX - 3_000;
        let now = Instant::now();
        for number in 0..10_000 {
            ends.note(WorkerId(0), &end(number), now + Duration::from_millis(number.into()));
        }
        ends.settle(now + Duration::from_millis(9_990));
        assert!(ends.lock().tombstones.capacity() < 10 * KEPT);
        let left: Vec<u32> = (0..10_000).filter(|number| ends.contains(id(&end(*number)))).collect();
        assert_eq!(left, (9_990..10_000).collect::<Vec<_>>());
        assert_eq!(ends.of(WorkerId(0)), left.into_iter().map(end).collect::<Vec<_>>());
    }

    #[test]
    fn bounded_and_none_without_a_store() {
        let ends = Ends::new(true);
        for number in 0..MOST as u32 + 2 {
            ends.note(WorkerId(0), &end(number), Instant::now());
        }
        assert_eq!(ends.of(WorkerId(0)).len(), MOST);
        assert!(!ends.contains(id(&end(1))) && ends.contains(id(&end(2))), "the oldest went");
        let ends = Ends::new(false);
        ends.note(WorkerId(0), &end(1), Instant::now());
        assert!(ends.of(WorkerId(0)).is_empty());
    }
}
