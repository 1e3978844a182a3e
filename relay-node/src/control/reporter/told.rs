//! What is kept of a record that the controller has been told.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use smallvec::SmallVec;
use turn_core::{PeerAddr, Record};

/// Enough of a record to see whether a later one moves more than its deadlines. There is one for each allocation of the
/// node, so the rest of it is a hash: two records that it confuses, once in 2^64, are told half a lifetime late.
pub(super) struct Told {
    /// Epoch and sequence.
    pub(super) version: (u64, u64),
    /// When, in Unix ms.
    at: u64,
    /// Of all that is no deadline.
    rest: u64,
    /// Its end first, then those of its families, permissions and channels.
    deadlines: SmallVec<[u64; 2]>,
}

impl Told {
    pub(super) fn new(record: &Record, at: u64) -> Self {
        let (rest, deadlines) = parts(record);
        Self { version: (record.epoch, record.sequence), at, rest, deadlines }
    }

    /// When a later record of the same allocation must be told: half way to the earliest of the deadlines that moved.
    /// None where more than deadlines changed, or one came nearer: at once.
    pub(super) fn due(&self, new: &Record) -> Option<u64> {
        let (rest, deadlines) = parts(new);
        if rest != self.rest || deadlines.len() != self.deadlines.len() {
            return None;
        }
        let mut earliest = *self.deadlines.first()?;
        for (before, after) in self.deadlines.iter().zip(deadlines) {
            if after < *before {
                return None;
            }
            if after > *before {
                earliest = earliest.min(*before);
            }
        }
        Some(self.at + earliest.saturating_sub(self.at) / 2)
    }
}

/// A hash of all that is no deadline, and the deadlines in an order that depends on nothing else.
fn parts(record: &Record) -> (u64, SmallVec<[u64; 2]>) {
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
    deadlines.push(record.expires_at);
    deadlines.extend(record.family_expires_at.iter().copied());
    deadlines.extend(permissions.iter().map(|(_, end)| *end));
    deadlines.extend(channels.iter().map(|(_, _, end)| *end));
    (hash.finish(), deadlines)
}
