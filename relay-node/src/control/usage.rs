//! Which usage the controller is told, and when (pure but for reading the accounts).
//!
//! What lives is told when a session begins, because the process before may have closed its count, and then each 30 s
//! if it has changed, spread evenly over them; what has ended, a moment later, again and
//! again until it is acknowledged. Everything told is a total, so that telling it twice, or anew in the next session,
//! changes nothing.

use std::collections::VecDeque;
use std::hash::BuildHasher;

use rustc_hash::{FxBuildHasher, FxHashSet};
use turnpike_proto::v1::{self, relay_message::Body};

use super::reporter::{BATCH, end_reason};
use crate::accounts::{Accounts, Usage};

/// Seconds between two checkpoints of an allocation.
const CHECKPOINT: u32 = 30;
/// How long after an allocation's end its count is final, milliseconds: another worker may still have sent for it.
const SETTLED: u64 = 1000;
/// Batches that may wait for their acknowledgement.
const IN_FLIGHT: usize = 4;
/// Ended allocations looked up at a time.
const ENDED: usize = 8 * BATCH;

/// See the module. Between two sessions it remembers nothing.
#[derive(Debug, Default)]
pub struct UsageReporter {
    /// The controller takes usage.
    is_taken: bool,
    /// Everything that lives has been looked at since the session began.
    has_told_all: bool,
    /// Which part of the rows is looked at next.
    part: u32,
    /// A hash of what was told last, by row.
    told: Vec<u64>,
    waiting: VecDeque<(Usage, bool)>,
    /// Batches, and the ended rows (with their origins) in them.
    in_flight: VecDeque<(u64, Vec<(u32, u64)>)>,
    last_batch: u64,
}

impl UsageReporter {
    /// A session has begun, with a controller that takes usage or does not.
    pub fn connected(&mut self, is_taken: bool) {
        *self = Self { is_taken, part: self.part, ..Self::default() };
    }

    /// A second has passed: a part of what lives is looked at.
    pub fn tick(&mut self, accounts: &Accounts) {
        self.part = (self.part + 1) % CHECKPOINT;
        // What the last checkpoint could not get rid of comes first.
        if self.is_taken && self.waiting.len() < ENDED {
            let begins = !std::mem::replace(&mut self.has_told_all, true);
            let (part, parts) = if begins { (0, 1) } else { (self.part, CHECKPOINT) };
            for usage in accounts.live(part, parts) {
                let hash = FxBuildHasher.hash_one((usage.origin, usage.totals));
                let row = usage.index as usize;
                self.told.resize(self.told.len().max(row + 1), 0);
                if std::mem::replace(&mut self.told[row], hash) != hash {
                    self.waiting.push_back((usage, false));
                }
            }
        }
    }

    /// Nothing is counted any more: everything is to be told once more, as of now.
    pub fn close(&mut self, accounts: &Accounts) {
        if self.is_taken {
            self.waiting = accounts.live(0, 1).map(|usage| (usage, true)).collect();
            self.look_for_ended(accounts, u64::MAX);
        }
    }

    /// The next message that may leave. `now` is Unix ms. Call it until it returns nothing.
    pub fn next(&mut self, accounts: &Accounts, now: u64) -> Option<Body> {
        if !self.is_taken || self.in_flight.len() >= IN_FLIGHT {
            return None;
        }
        if self.waiting.is_empty() {
            self.look_for_ended(accounts, now.saturating_sub(SETTLED));
        }
        let (mut usage, mut ended, mut ids) = (Vec::new(), Vec::new(), FxHashSet::default());
        // An allocation with two counts takes two batches.
        while usage.len() < BATCH
            && let Some((told, closed)) = self.waiting.pop_front_if(|(told, _)| ids.insert(told.id))
        {
            if told.ended.is_some() {
                ended.push((told.index, told.origin));
            }
            let user = accounts.user(&told);
            usage.push(message(&told, user, closed));
        }
        if usage.is_empty() {
            return None;
        }
        self.last_batch += 1;
        self.in_flight.push_back((self.last_batch, ended));
        Some(Body::Usage(v1::UsageBatch { batch_id: self.last_batch, usage }))
    }

    /// The store has a batch, and all before it.
    pub fn acknowledged(&mut self, accounts: &Accounts, batch: u64) {
        while let Some((_, ended)) = self.in_flight.pop_front_if(|(first, _)| *first <= batch) {
            ended.into_iter().for_each(|(row, origin)| accounts.forget(row, origin));
        }
    }

    /// Whether nothing waits to be told or acknowledged.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.in_flight.is_empty()
    }

    /// Those that are under way are the oldest, so others are looked for when they have arrived.
    fn look_for_ended(&mut self, accounts: &Accounts, before: u64) {
        if self.in_flight.iter().all(|(_, ended)| ended.is_empty()) {
            self.waiting.extend(accounts.ended(before, ENDED).into_iter().map(|usage| (usage, true)));
        }
    }
}

fn message(usage: &Usage, username: Vec<u8>, closed: bool) -> v1::Usage {
    let reason = usage.ended.and_then(|ended| ended.reason).map_or(v1::EndReason::Unspecified, end_reason);
    v1::Usage {
        allocation_id: usage.id.0.to_vec(),
        origin: usage.origin,
        username,
        packets_to_peer: usage.totals.packets_to_peer,
        bytes_to_peer: usage.totals.bytes_to_peer,
        packets_to_client: usage.totals.packets_to_client,
        bytes_to_client: usage.totals.bytes_to_client,
        continued: usage.continued,
        unclean: usage.unclean,
        closed,
        ended_at: usage.ended.map_or(0, |ended| ended.at),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use turn_core::meter::Direction;
    use turn_core::{AllocationId, EndReason};

    use super::*;

    const START: u64 = 1_700_000_000_000;

    struct Lab {
        _directory: tempfile::TempDir,
        accounts: Accounts,
        reporter: UsageReporter,
    }

    impl Lab {
        fn new() -> Self {
            let directory = tempfile::tempdir().expect("a directory");
            let accounts = Accounts::open(directory.path(), 1000, true).expect("opened");
            let mut reporter = UsageReporter::default();
            reporter.connected(true);
            Self { _directory: directory, accounts, reporter }
        }

        /// What is said within a checkpoint.
        fn checkpoint(&mut self) -> Vec<v1::Usage> {
            (0..CHECKPOINT).flat_map(|_| self.second(START)).collect()
        }

        fn second(&mut self, now: u64) -> Vec<v1::Usage> {
            self.reporter.tick(&self.accounts);
            let mut said = Vec::new();
            while let Some(Body::Usage(batch)) = self.reporter.next(&self.accounts, now) {
                assert!(batch.usage.len() <= BATCH);
                said.extend(batch.usage);
                self.reporter.acknowledged(&self.accounts, batch.batch_id);
            }
            said
        }
    }

    fn id(number: u64) -> AllocationId {
        AllocationId::new(number, [0; 10])
    }

    #[test]
    fn what_lives_is_told_each_checkpoint_if_it_has_changed() {
        let mut lab = Lab::new();
        let account = lab.accounts.take(id(1), b"alice", false);
        lab.accounts.take(id(2), b"bob", false);
        let first = lab.checkpoint();
        assert_eq!(first.len(), 2, "also those that have sent nothing");
        assert!(lab.checkpoint().is_empty(), "nothing has changed");
        lab.accounts.add(account, Direction::ToPeer, 1, 100);
        let second = lab.checkpoint();
        assert_eq!((second.len(), second[0].bytes_to_peer, &*second[0].username), (1, 100, &b"alice"[..]));
        lab.reporter.connected(true);
        assert_eq!(lab.checkpoint().len(), 2, "anew in the next session");
    }

    #[test]
    fn what_has_ended_is_told_until_it_is_acknowledged() {
        let mut lab = Lab::new();
        let account = lab.accounts.take(id(1), b"alice", false);
        lab.accounts.add(account, Direction::ToClient, 2, 50);
        lab.accounts.end(id(1), EndReason::Deleted, START);
        assert!(lab.reporter.next(&lab.accounts, START + 500).is_none(), "not settled");
        for _ in 0..2 {
            let Some(Body::Usage(batch)) = lab.reporter.next(&lab.accounts, START + 2000) else { panic!("nothing") };
            let usage = &batch.usage[0];
            assert_eq!((usage.ended_at, usage.reason()), (START, v1::EndReason::Deleted));
            assert_eq!((usage.packets_to_client, usage.bytes_to_client, usage.closed), (2, 50, true));
            assert!(lab.reporter.next(&lab.accounts, START + 3000).is_none(), "it is under way");
            // The session breaks before the answer.
            lab.reporter.connected(true);
        }
        assert_eq!(lab.second(START + 4000).len(), 1);
        assert!(lab.second(START + 5000).is_empty() && lab.reporter.is_done());
    }

    #[test]
    fn a_controller_that_takes_no_usage_is_told_none_and_nothing_is_lost() {
        let mut lab = Lab::new();
        lab.accounts.take(id(1), b"alice", false);
        lab.accounts.end(id(1), EndReason::Expired, START);
        lab.reporter.connected(false);
        assert!(lab.checkpoint().is_empty() && lab.second(START + 9000).is_empty());
        lab.reporter.connected(true);
        assert_eq!(lab.second(START + 9000).len(), 1);
    }

    #[test]
    fn thousands_take_many_batches_and_the_end_tells_all_of_them() {
        let mut lab = Lab::new();
        for number in 0..1000 {
            lab.accounts.take(id(number), b"alice", false);
        }
        assert_eq!(lab.checkpoint().len(), 1000);
        for number in 0..600 {
            lab.accounts.end(id(number), EndReason::Closed, START);
        }
        lab.reporter.close(&lab.accounts);
        let said = lab.second(START);
        assert_eq!(said.iter().filter(|usage| usage.ended_at == 0 && usage.closed).count(), 400);
        assert_eq!(said.iter().filter(|usage| usage.ended_at != 0).count(), 600);
        assert!(lab.reporter.is_done());
    }
}
