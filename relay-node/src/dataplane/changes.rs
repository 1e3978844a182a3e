//! Record changes on their way from the workers to the reporter.
//!
//! Each worker has a queue, under a lock that is held for a moment at a time; nobody is woken. What comes of one
//! allocation meanwhile is one change, and one that is made and ended meanwhile is none: the controller never hears of
//! it. What it used is in its account all the same.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec;

use rustc_hash::FxHashMap;
use tokio::sync::mpsc::error::TryRecvError;
use turn_core::{AllocationId, Change};

/// Changes of a worker that wait for the reporter before a full resync is due instead.
const MOST: usize = 16_384;
/// An index that has grown beyond this is made anew, once what it was of has been taken.
const USUAL: usize = 1024;

/// Where a worker's changes go beside the journal.
pub(super) struct ChangeSender {
    queue: Arc<Mutex<Queue>>,
    overflow: Arc<AtomicBool>,
}

/// The other end of all of them.
pub struct ChangeReceiver {
    queues: Vec<Arc<Mutex<Queue>>>,
    taken: vec::IntoIter<Option<Change>>,
}

#[derive(Default)]
struct Queue {
    /// In the order in which the first change of each allocation came; of those that cancelled each other nothing.
    changes: Vec<Option<Change>>,
    /// Those that a later change of the same allocation is put in the place of.
    by_id: FxHashMap<AllocationId, Place>,
    cancelled: usize,
}

#[derive(Clone, Copy)]
struct Place {
    at: usize,
    /// The allocation was made by the change that came first: nobody was told of it.
    is_new: bool,
}

/// The ends of as many queues as there are workers. `overflow` is set when something did not fit.
pub(super) fn queues(workers: usize, overflow: &Arc<AtomicBool>) -> (Vec<ChangeSender>, ChangeReceiver) {
    let queues: Vec<Arc<Mutex<Queue>>> = (0..workers).map(|_| Arc::default()).collect();
    let sender = |queue: &Arc<_>| ChangeSender { queue: Arc::clone(queue), overflow: Arc::clone(overflow) };
    (queues.iter().map(sender).collect(), ChangeReceiver { queues, taken: Vec::new().into_iter() })
}

impl ChangeSender {
    /// Reports a change. False if with it nobody ever hears of the allocation.
    pub(super) fn send(&self, change: Change) -> bool {
        let mut queue = lock(&self.queue);
        match queue.push(change) {
            Pushed::Kept => true,
            Pushed::Cancelled => false,
            Pushed::Full => {
                self.overflow.store(true, Ordering::Relaxed);
                true
            }
        }
    }

    /// All records of this worker are about to be told in another way: the end of what was made before is news from now
    /// on.
    pub(super) fn seal(&self) {
        lock(&self.queue).by_id = FxHashMap::default();
    }
}

enum Pushed {
    Kept,
    Cancelled,
    Full,
}

impl Queue {
    fn push(&mut self, change: Change) -> Pushed {
        let (id, is_end) = match &change {
            Change::Put(record) => (record.id, false),
            Change::End { id, .. } => (*id, true),
        };
        match self.by_id.get(&id) {
            Some(place) if place.is_new && is_end => {
                self.changes[place.at] = None;
                self.cancelled += 1;
                self.by_id.remove(&id);
                Pushed::Cancelled
            }
            Some(place) => {
                self.changes[place.at] = Some(change);
                Pushed::Kept
            }
            None => {
                if self.changes.len() >= MOST && !self.make_room() {
                    return Pushed::Full;
                }
                // Its first record: a restored allocation goes on counting.
                let is_new = matches!(&change, Change::Put(record) if record.sequence == 1);
                self.by_id.insert(id, Place { at: self.changes.len(), is_new });
                self.changes.push(Some(change));
                Pushed::Kept
            }
        }
    }

    /// Gives up the places of what was cancelled, if that is much.
    fn make_room(&mut self) -> bool {
        if self.cancelled < MOST / 2 {
            return false;
        }
        let mut left = 0;
        let places: Vec<usize> = self
            .changes
            .iter()
            .map(|change| {
                let place = left;
                left += usize::from(change.is_some());
                place
            })
            .collect();
        self.by_id.values_mut().for_each(|place| place.at = places[place.at]);
        self.changes.retain(Option::is_some);
        self.cancelled = 0;
        true
    }

    fn take(&mut self) -> Vec<Option<Change>> {
        if self.by_id.capacity() > USUAL {
            self.by_id = FxHashMap::default();
        }
        self.by_id.clear();
        self.cancelled = 0;
        std::mem::take(&mut self.changes)
    }
}

impl ChangeReceiver {
    /// The next change. Of different workers each has its own order.
    ///
    /// # Errors
    /// Empty; disconnected when no worker is left.
    pub fn try_recv(&mut self) -> Result<Change, TryRecvError> {
        loop {
            if let Some(change) = self.taken.by_ref().flatten().next() {
                return Ok(change);
            }
            // Before the queues are looked at: whoever is gone has said everything.
            let are_gone = self.queues.iter().all(|queue| Arc::strong_count(queue) == 1);
            let taken: Vec<_> = self.queues.iter().flat_map(|queue| lock(queue).take()).collect();
            if taken.is_empty() {
                return Err(if are_gone { TryRecvError::Disconnected } else { TryRecvError::Empty });
            }
            self.taken = taken.into_iter();
        }
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use turn_core::{EndReason, Record};

    use super::*;
    use crate::sample;

    fn put(n: u32, sequence: u64) -> Change {
        let record = sample::record(id(n), ([192, 0, 2, 1], 50_000).into(), 0);
        Change::Put(Box::new(Record { sequence, ..record }))
    }

    fn end(n: u32, sequence: u64) -> Change {
        Change::End { id: id(n), epoch: 1, sequence, reason: EndReason::Deleted }
    }

    fn id(n: u32) -> AllocationId {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        AllocationId(bytes)
    }

    fn lab() -> (ChangeSender, ChangeReceiver) {
        let (mut senders, receiver) = queues(1, &Arc::default());
        (senders.remove(0), receiver)
    }

    fn all(receiver: &mut ChangeReceiver) -> Vec<Change> {
        std::iter::from_fn(|| receiver.try_recv().ok()).collect()
    }

    #[test]
    fn what_comes_of_one_allocation_is_one_change_in_its_first_place() {
        let (sender, mut receiver) = lab();
        for change in [put(1, 4), put(2, 1), put(1, 5), put(3, 2), end(3, 3), put(2, 2)] {
            assert!(sender.send(change));
        }
        assert_eq!(all(&mut receiver), [put(1, 5), put(2, 2), end(3, 3)]);
        assert!(sender.send(put(1, 6)) && sender.send(end(2, 3)), "what has been taken is told of");
        assert_eq!(all(&mut receiver), [put(1, 6), end(2, 3)]);
    }

    #[test]
    fn nobody_hears_of_what_was_made_and_ended_meanwhile() {
        let (sender, mut receiver) = lab();
        assert!(sender.send(put(1, 1)) && sender.send(put(2, 1)) && sender.send(put(1, 2)));
        assert!(!sender.send(end(1, 3)));
        assert_eq!(all(&mut receiver), [put(2, 1)]);
        assert!(sender.send(end(3, 9)), "nobody knows since when it lives");
        assert_eq!(all(&mut receiver), [end(3, 9)]);
    }

    #[test]
    fn an_end_after_the_records_were_gathered_is_told() {
        let (sender, mut receiver) = lab();
        sender.send(put(1, 1));
        sender.seal();
        assert!(sender.send(end(1, 2)));
        assert_eq!(all(&mut receiver), [put(1, 1), end(1, 2)]);
    }

    #[test]
    fn what_does_not_fit_is_said_and_what_was_cancelled_takes_no_room() {
        let overflow = Arc::default();
        let (senders, mut receiver) = queues(1, &overflow);
        let sender = &senders[0];
        let most = MOST as u32;
        sender.send(put(0, 1));
        for n in 1..3 * most {
            sender.send(put(n, 1));
            assert!(!sender.send(end(n, 2)));
        }
        assert!(!overflow.load(Ordering::Relaxed));
        sender.send(put(0, 2));
        for n in 1..=2 * most {
            sender.send(put(n, 1));
        }
        assert!(overflow.load(Ordering::Relaxed));
        let told = all(&mut receiver);
        assert!(told.len() <= MOST && told[0] == put(0, 2), "{}", told.len());
    }

    #[test]
    fn a_worker_that_is_gone_is_heard_to_the_end() {
        let (senders, mut receiver) = queues(2, &Arc::default());
        senders[1].send(put(1, 1));
        drop(senders);
        assert_eq!(receiver.try_recv(), Ok(put(1, 1)));
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Disconnected));
    }
}
