//! Allocations that have ended and may still be stored.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use turn_core::{AllocationId, Change, WorkerId};

/// Tombstones kept at most, some 5 MB of memory and as much of disk: more than a node ends in an outage of minutes.
/// Beyond it the oldest go, and what the store has of them lives on until it expires.
const MOST: usize = 65_536;

/// The tombstones of this process and of those before, until the store is known to have them: a record that comes back
/// from the store must not revive what has ended here. One per process; a lock, because ends are no packet path.
#[derive(Debug)]
pub struct Ends {
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_id: HashMap<AllocationId, (WorkerId, Change)>,
    /// When each was noted, the oldest first.
    order: VecDeque<(Instant, AllocationId)>,
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
        let Change::End { id, .. } = change else { return };
        let mut state = self.lock();
        if self.most == 0 || state.by_id.insert(*id, (worker, change.clone())).is_some() {
            return;
        }
        state.order.push_back((now, *id));
        if state.order.len() > self.most
            && let Some((_, oldest)) = state.order.pop_front()
        {
            state.by_id.remove(&oldest);
        }
    }

    /// Whether an allocation has ended here.
    pub fn contains(&self, id: AllocationId) -> bool {
        self.lock().by_id.contains_key(&id)
    }

    /// The tombstones that are to stand in a worker's file.
    pub fn of(&self, worker: WorkerId) -> Vec<Change> {
        let state = self.lock();
        state.by_id.values().filter(|(owner, _)| *owner == worker).map(|(_, change)| change.clone()).collect()
    }

    /// The store has every end that was noted before `until`.
    pub fn settle(&self, until: Instant) {
        let mut state = self.lock();
        while let Some((_, id)) = state.order.pop_front_if(|(at, _)| *at < until) {
            state.by_id.remove(&id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use turn_core::EndReason;

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
