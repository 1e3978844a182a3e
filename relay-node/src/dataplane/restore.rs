//! Bringing allocations back: the address first, then the record. At start nothing is read from clients meanwhile.

use std::collections::HashMap;

use turn_core::{AllocationId, Change, EndReason, Input, ListenerId, Path, Record, RelayedAddr, Transport, credential};

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
    for (_, mut record) in newest {
        settle_move(&mut record);
        let owner = shard::worker(record.five_tuple.client, workers);
        dealt[usize::from(owner.0)].push(record);
    }
    dealt
}

/// Of a move from a connection to a datagram address the second is left: connections end with their process.
fn settle_move(record: &mut Record) {
    if record.five_tuple.transport != Transport::Udp
        && let Some(mobility) = &mut record.mobility
        && let Some(moving) = mobility.moving.take_if(|moving| moving.to.transport == Transport::Udp)
    {
        record.five_tuple = moving.to;
    }
}

/// Leaves only these addresses, as this machine has them, in a record.
fn keep_addresses(record: &mut Record, held: &[RelayedAddr]) {
    let ends = std::mem::take(&mut record.family_expires_at);
    let by_advertised = |advertised| held.iter().find(|relayed| relayed.advertised == advertised).copied();
    let mut relayed = Vec::new();
    for (index, address) in std::mem::take(&mut record.relayed).into_iter().enumerate() {
        if let Some(address) = by_advertised(address.advertised) {
            relayed.push(address);
            record.family_expires_at.extend(ends.get(index));
        }
    }
    record.relayed = relayed;
}

impl Worker {
    /// Restores records of clients that this worker owns. Each stands alone: what cannot come back is counted and
    /// said, and the rest goes on.
    pub(super) fn restore(&mut self, records: Vec<Record>) {
        for record in records {
            if self.journal.as_ref().is_some_and(|journal| journal.has_ended(record.id)) {
                // The store has not heard of it yet.
                self.counters.lost(Loss::RestoreEnded);
                continue;
            }
            let ours = self.ours(&record);
            let Some(path) = self.path_of(&record).filter(|_| !ours.is_empty()) else {
                self.counters.lost(Loss::RestoreForeign);
                tracing::warn!(
                    allocation = record.id.to_text(),
                    "not restored: its relayed or server address is not of this relay"
                );
                continue;
            };
            let reason = if record.five_tuple.transport.has_session() {
                // RFC 8656 §5: the connection or session is gone with the process that had it.
                EndReason::Closed
            } else if record.expires_at <= self.now.wall {
                EndReason::Expired
            } else {
                self.restore_one(record, ours, path);
                continue;
            };
            // What is held lives in this process, which knows better than the record.
            if !ours.iter().any(|relayed| self.relayed.is_held(*relayed)) {
                self.end(&record, reason);
            }
        }
    }

    /// Holds the addresses of a record, those of them that can be had, and hands it to the core.
    fn restore_one(&mut self, mut record: Record, ours: Vec<RelayedAddr>, path: Path) {
        let quota_key: Box<[u8]> = credential::quota_key(&record.username).into();
        let known = ours.iter().any(|relayed| self.relayed.holder(*relayed) == Some(record.id));
        let (mut held, mut opened) = (Vec::new(), Vec::new());
        for relayed in ours {
            if self.relayed.holder(relayed) != Some(record.id) {
                if let Err(error) = self.relayed.restore(relayed, &quota_key) {
                    self.counters.lost(Loss::RestoreAddress);
                    tracing::error!(
                        allocation = record.id.to_text(), port = relayed.port(), %error,
                        "not restored: its relayed address cannot be opened"
                    );
                    continue;
                }
                opened.push(relayed);
            }
            held.push(relayed);
        }
        if held.is_empty() {
            return;
        }
        keep_addresses(&mut record, &held);
        let reservation = record.reservation.filter(|_| !known);
        let change = Change::Put(Box::new(record.clone()));
        let before = self.server.allocations();
        self.handle(Input::Restore { record: Box::new(record), path });
        if known || self.server.allocations() > before {
            // The store has it already. Of one that is known the newer state counts, here and in the core.
            self.keep(&change);
            if let (Some(reservation), Some(first)) = (reservation, held.first()) {
                self.relayed.restore_reservation(*first, reservation, &quota_key, self.now);
            }
        } else {
            // The core has no use for it; whatever it released itself is not released again.
            for relayed in opened {
                self.relayed.release(relayed, quota_key.clone());
            }
        }
    }

    /// The relayed addresses of a record as this machine has them.
    fn ours(&self, record: &Record) -> Vec<RelayedAddr> {
        record.relayed.iter().filter_map(|relayed| self.relayed.ours(*relayed)).collect()
    }

    /// The listener that serves the address the client knows.
    fn path_of(&self, record: &Record) -> Option<Path> {
        let five_tuple = record.five_tuple;
        let index =
            self.listeners.iter().position(|listener| listener.serves(five_tuple.transport, five_tuple.server))?;
        let listener = ListenerId(index as u16);
        match record.proxy.filter(|proxy| self.streams.half_open.trusts(proxy.ip())) {
            Some(proxy) => Some(Path::Proxied(listener, proxy)),
            None => Some(Path::Listener(listener)),
        }
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
