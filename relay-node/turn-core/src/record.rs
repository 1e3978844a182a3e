//! The versioned allocation record: what the journal and the store keep, and how two of them are merged.

use std::net::IpAddr;

use crate::{FiveTuple, RelayedAddr};

/// A ULID: 48 bits of Unix milliseconds, 80 random bits, big endian. Sorts by creation.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AllocationId(pub [u8; 16]);

/// One allocation as of (epoch, sequence). Deadlines are Unix milliseconds: they outlive the process's clock.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// Identity of the owner's allocations; outlives the process.
    pub relay_address: IpAddr,
    /// Ownership under which this was written.
    pub epoch: u64,
    /// Grows with each change of this allocation.
    pub sequence: u64,
    /// Name of the allocation.
    pub id: AllocationId,
    /// The client.
    pub five_tuple: FiveTuple,
    /// Relayed addresses, one per family; one today (RFC 8656 §7.2 dual allocations later).
    pub relayed: Vec<RelayedAddr>,
    /// USERNAME of the Allocate, opaque bytes.
    pub username: Vec<u8>,
    /// Unix ms.
    pub created_at: u64,
    /// Unix ms.
    pub expires_at: u64,
    /// (peer IP, Unix ms of expiry).
    pub permissions: Vec<(IpAddr, u64)>,
    /// (channel number, peer, Unix ms of expiry).
    pub channels: Vec<(u16, crate::PeerAddr, u64)>,
}

/// Why an allocation ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum EndReason {
    /// Refresh with LIFETIME 0.
    Deleted = 1,
    /// Its lifetime ran out.
    Expired = 2,
    /// Its stream connection closed.
    Closed = 3,
    /// An operator revoked it.
    Revoked = 4,
}

/// A change of the record set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// Created or changed.
    Put(Box<Record>),
    /// Ended: a tombstone until the store has acknowledged it.
    End {
        /// Which.
        id: AllocationId,
        /// Ownership under which it ended.
        epoch: u64,
        /// Above the sequence of every record of the allocation.
        sequence: u64,
        /// Why.
        reason: EndReason,
    },
}

/// Why bytes are not a record. Refused one by one, counted, never all.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Cut short or inconsistent.
    #[error("the record is damaged")]
    Damaged,
    /// Of a version this binary cannot read.
    #[error("the record has version {0}, which this binary does not read")]
    Version(u8),
    /// The MAC is of no live key.
    #[error("the record's seal does not verify")]
    Seal,
}

impl Record {
    /// Encodes and appends a MAC under the newest key of the cluster's record ring (none without keys).
    pub fn seal(&self, keys: &crate::KeyRing) -> Vec<u8> {
        let _ = keys;
        Vec::new()
    }

    /// Checks the MAC against the ring (skipped when the ring is empty) and decodes.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn open(bytes: &[u8], keys: &crate::KeyRing) -> Result<Self, RecordError> {
        let _ = (bytes, keys);
        Err(RecordError::Damaged)
    }

    /// Merge order: (epoch, sequence), never clocks.
    pub fn supersedes(&self, epoch: u64, sequence: u64) -> bool {
        (self.epoch, self.sequence) > (epoch, sequence)
    }
}

impl AllocationId {
    /// The 26-character text form (Crockford base 32).
    pub fn to_text(self) -> String {
        String::new()
    }

    /// Reads the text form, ignoring case.
    pub fn from_text(text: &str) -> Option<Self> {
        let _ = text;
        None
    }
}
