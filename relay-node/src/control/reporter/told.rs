//! What is kept of the records that the controller has been told.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use slab::Slab;
use smallvec::SmallVec;
use turn_core::index::{Index, plain_hash};
use turn_core::{AllocationId, PeerAddr, Record};

/// What was told last of each live allocation.
#[derive(Default)]
pub(super) struct ToldTable {
    entries: Slab<Told>,
    by_id: Index,
}

/// Enough of a record to see whether a later one moves more than its deadlines. There is one for each allocation of the
/// node, so the rest of it is a hash: two records that it confuses, once in 2^64, are told half a lifetime late.
pub(super) struct Told {
    id: AllocationId,
    epoch: u64,
    sequence: u64,
    /// Of all that is no deadline.
    rest: u64,
    /// The end of the allocation in Unix ms; when it was told is this long before.
    end: u64,
    ahead: u32,
    /// Those of its families, permissions and channels; an idle allocation has none.
    deadlines: Box<[u64]>,
}

impl ToldTable {
    pub(super) fn get(&self, id: AllocationId) -> Option<&Told> {
        self.place(id).map(|place| &self.entries[place as usize])
    }

    /// A record has been told at that time, Unix ms.
    pub(super) fn put(&mut self, record: &Record, at: u64) {
        let told = Told::new(record, at);
        if let Some(place) = self.place(record.id) {
            self.entries[place as usize] = told;
        } else {
            // Allocations are counted in 32 bits everywhere.
            let place = self.entries.insert(told) as u32;
            self.by_id.insert(plain_hash(&record.id), place);
        }
    }

    pub(super) fn remove(&mut self, id: AllocationId) {
        if let Some(place) = self.place(id) {
            self.by_id.remove(plain_hash(&id), place);
            self.entries.remove(place as usize);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn place(&self, id: AllocationId) -> Option<u32> {
        self.by_id.find(plain_hash(&id), |place| self.entries[place as usize].id == id)
    }
}

impl Told {
    fn new(record: &Record, at: u64) -> Self {
        let (rest, deadlines) = parts(record);
        let end = record.expires_at;
        // An allocation that lasts for more than 49 days counts as told later.
        let ahead = u32::try_from(end.saturating_sub(at)).unwrap_or(u32::MAX);
        let deadlines = deadlines.into_boxed_slice();
        Self { id: record.id, epoch: record.epoch, sequence: record.sequence, rest, end, ahead, deadlines }
    }

    /// Epoch and sequence.
    pub(super) fn version(&self) -> (u64, u64) {
        (self.epoch, self.sequence)
    }

    /// When a later record of the same allocation must be told: half way to the earliest of the deadlines that moved.
    /// None where more than deadlines changed, or one came nearer: at once.
    pub(super) fn due(&self, new: &Record) -> Option<u64> {
        let (rest, deadlines) = parts(new);
        if rest != self.rest || deadlines.len() != self.deadlines.len() || new.expires_at < self.end {
            return None;
        }
        let mut earliest = self.end;
        for (before, after) in self.deadlines.iter().zip(deadlines) {
            if after < *before {
                return None;
            }
            if after > *before {
                earliest = earliest.min(*before);
            }
        }
        let at = self.end.saturating_sub(self.ahead.into());
        Some(at + earliest.saturating_sub(at) / 2)
    }
}

/// A hash of all that is no deadline, and the deadlines but for the end of all, in an order that depends on nothing else.
fn parts(record: &Record) -> (u64, SmallVec<[u64; 4]>) {
    let mut permissions: SmallVec<[(IpAddr, u64); 4]> = record.permissions.iter().copied().collect();
    permissions.sort_unstable();
    let mut channels: SmallVec<[(u16, PeerAddr, u64); 4]> = record.channels.iter().copied().collect();
    channels.sort_unstable();

    let mut hash = DefaultHasher::new();
    (record.epoch, record.relay_address, record.five_tuple, &record.relayed).hash(&mut hash);
    (record.proxy, &record.username, record.created_at, record.family_expires_at.len()).hash(&mut hash);
    if let Some(mobility) = &record.mobility {
        mobility.ticket.hash(&mut hash);
        mobility.moving.map(|moving| (moving.to, moving.by, moving.transaction_id)).hash(&mut hash);
    }
    permissions.len().hash(&mut hash);
    for (ip, _) in &permissions {
        ip.hash(&mut hash);
    }
    for (number, peer, _) in &channels {
        (number, peer).hash(&mut hash);
    }

    let mut deadlines = SmallVec::new();
    deadlines.extend(record.family_expires_at.iter().copied());
    deadlines.extend(permissions.iter().map(|(_, end)| *end));
    deadlines.extend(channels.iter().map(|(_, _, end)| *end));
    (hash.finish(), deadlines)
}
