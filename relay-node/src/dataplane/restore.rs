//! Bringing allocations back: the address first, then the record. At start nothing is read from clients meanwhile.

use std::collections::HashMap;

use turn_core::{AllocationId, Change, EndReason, Input, ListenerId, Path, Record, RelayedAddr, credential};

use super::counters::Loss;
use super::shard;
use super::worker::Worker;

/// Deals records out to the workers that own their clients; of several with one id, the newest.
pub(super) fn deal(records: Vec<Record>, workers: u16) -> Vec<Vec<Record>> {
    let mut newest: HashMap<AllocationId, Record> = HashMap::with_capacity(records.len());
    for record in records {
        match newest.get_mut(&record.id) {
            Some(known) if record.supersedes(known.epoch, known.sequence) => *known = record,
            Some(_) => {}
            None => drop(newest.insert(record.id, record)),
        }
    }
    let mut dealt: Vec<Vec<Record>> = (0..workers).map(|_| Vec::new()).collect();
    for (_, record) in newest {
        let owner = shard::worker(record.five_tuple.client, workers);
        dealt[usize::from(owner.0)].push(record);
    }
    dealt
}

impl Worker {
    /// Restores records of clients that this worker owns. Each stands alone: what cannot come back is counted and
    /// said, and the rest goes on.
    pub(super) fn restore(&mut self, records: Vec<Record>) {
        for record in records {
            let (Some(ours), Some(path)) = (self.ours(&record), self.path_of(&record)) else {
                self.counters.lost(Loss::RestoreForeign);
                tracing::warn!(
                    allocation = record.id.to_text(),
                    "not restored: its relayed or server address is not of this relay"
                );
                continue;
            };
            let reason = if record.five_tuple.transport.is_stream() {
                // RFC 8656 §5: the connection is gone with the process that had it.
                EndReason::Closed
            } else if record.expires_at <= self.now.wall {
                EndReason::Expired
            } else {
                self.restore_one(record, ours, path);
                continue;
            };
            // What is held lives in this process, which knows better than the record.
            if !self.relayed.is_held(ours) {
                self.end(&record, reason);
            }
        }
    }

    fn restore_one(&mut self, mut record: Record, ours: RelayedAddr, path: Path) {
        let quota_key: Box<[u8]> = credential::quota_key(&record.username).into();
        let known = self.relayed.holder(ours) == Some(record.id);
        if !known && let Err(error) = self.relayed.restore(ours, &quota_key) {
            self.counters.lost(Loss::RestoreAddress);
            tracing::error!(
                allocation = record.id.to_text(), port = ours.port(), %error,
                "not restored: its relayed address cannot be opened"
            );
            return;
        }
        record.relayed = vec![ours];
        let change = Change::Put(Box::new(record.clone()));
        let before = self.server.allocations();
        self.handle(Input::Restore { record: Box::new(record), path });
        if known || self.server.allocations() > before {
            // The store has it already. Of one that is known the newer state counts, here and in the core.
            self.keep(&change);
        } else {
            // The core has no use for it; whatever it released itself is not released again.
            self.relayed.release(ours, quota_key);
        }
    }

    /// The relayed address of a record as this machine has it.
    fn ours(&self, record: &Record) -> Option<RelayedAddr> {
        // One address per allocation today; a record of more is of a later version.
        let [relayed] = record.relayed[..] else {
            return None;
        };
        self.relayed.ours(relayed)
    }

    /// The listener that serves the address the client knows.
    fn path_of(&self, record: &Record) -> Option<Path> {
        let five_tuple = record.five_tuple;
        let index =
            self.listeners.iter().position(|listener| listener.serves(five_tuple.transport, five_tuple.server))?;
        Some(Path::Listener(ListenerId(index as u16)))
    }

    fn end(&mut self, record: &Record, reason: EndReason) {
        self.record(Change::End {
            id: record.id,
            epoch: record.epoch.max(self.epoch),
            sequence: record.sequence + 1,
            reason,
        });
    }
}
