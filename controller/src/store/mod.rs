//! Where the cluster's state lives: one trait, two stores, one contract test (`tests/store_contract.rs`).

mod embedded;
mod etcd;

use std::collections::HashSet;
use std::time::Duration;

pub use embedded::EmbeddedStore;
pub use etcd::{EtcdOptions, EtcdStore, EtcdTls};

/// Most operations, and most guards, in a transaction.
pub const MAX_OPS: usize = 128;
/// Longest value in bytes.
pub const MAX_VALUE: usize = 64 * 1024;
/// Most bytes of keys and values in a transaction; etcd takes 1.5 MiB by default.
pub const MAX_TRANSACTION: usize = 1024 * 1024;
/// Most entries in a page, whatever is asked for.
pub const MAX_PAGE: usize = 1000;
/// Shortest lease.
pub const MIN_LEASE: Duration = Duration::from_secs(2);

/// A key with its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Key without the store's root prefix, e.g. `nodes/eu-1`.
    pub key: String,
    /// Opaque bytes.
    pub value: Vec<u8>,
    /// Store revision of its last change.
    pub revision: i64,
    /// The lease it hangs on.
    pub lease: Option<LeaseId>,
}

/// A page of a range, in key order.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Entries.
    pub entries: Vec<Entry>,
    /// Whether more follow the last one.
    pub more: bool,
    /// Revision the page was read at; a watch goes on from the next one.
    pub revision: i64,
}

/// A lease.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct LeaseId(pub i64);

/// What must hold for a transaction to apply.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Guard {
    /// The key has exactly this value.
    Value(String, Vec<u8>),
    /// The key was last changed at this revision.
    Revision(String, i64),
    /// The key does not exist.
    Absent(String),
}

/// A write.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// Key.
        key: String,
        /// Value.
        value: Vec<u8>,
        /// Lease to hang it on.
        lease: Option<LeaseId>,
    },
    /// Removes a key; removing none is fine.
    Delete(String),
}

/// What a watch tells.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum WatchEvent {
    /// A key was set.
    Put(Entry),
    /// A key is gone, by delete or by the end of its lease.
    Delete {
        /// Key.
        key: String,
        /// Revision of the deletion.
        revision: i64,
    },
    /// The watch had to start over (compaction, reconnect): what follows is the whole prefix, then [`WatchEvent::Synced`].
    Reset,
    /// The prefix has been told in full; from here on come changes.
    Synced,
}

/// A watch. Ends never by itself; it repairs itself (compaction, reconnect) and says so with [`WatchEvent::Reset`].
/// Dropping it ends it.
pub type Watch = tokio::sync::mpsc::Receiver<WatchEvent>;

/// Why a store did not do as asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Nobody answers, after the retries; worth another try. A transaction may or may not have applied, or may yet.
    #[error("the store does not answer: {0}")]
    Unavailable(String),
    /// The lease has run out.
    #[error("the lease has ended")]
    LeaseEnded,
    /// It has no room for changes until somebody makes some; what is there can be read, and leases go on. Nothing was
    /// applied, or will be.
    #[error("the store is full: {0}")]
    Full(String),
    /// It does not let this controller do it; nothing was applied, or will be. An operator can mend that.
    #[error("the store turns this controller away: {0}")]
    Denied(String),
    /// It will not do it, now or later.
    #[error("the store refuses: {0}")]
    Refused(String),
}

impl StoreError {
    /// Whether the same call may succeed later, once the store is well again.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Full(_) | Self::Denied(_))
    }
}

/// State for the console and `turnctl status`.
#[derive(Clone, Debug)]
pub struct StoreStatus {
    /// `etcd` or `embedded`.
    pub kind: &'static str,
    /// What the store calls its version.
    pub version: String,
}

/// A key-value store with transactions, leases and watches. Every call retries what may pass within a few seconds,
/// except a transaction whose outcome is unknown.
#[tonic::async_trait]
pub trait Store: Send + Sync + 'static {
    /// One key.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;
    /// Up to `limit` (at most [`MAX_PAGE`]) entries under `prefix`, after the key `after` (exclusive) if given.
    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError>;
    /// Applies all `ops` if every guard holds (true), else nothing (false). At most [`MAX_OPS`] ops on as many
    /// different keys, [`MAX_VALUE`] bytes a value and [`MAX_TRANSACTION`] in all.
    ///
    /// An attempt of unknown outcome is not repeated but [`StoreError::Unavailable`]: the first copy might land after
    /// whatever is written next. Who must be sure changes a guarded value before trying again.
    async fn transact(&self, guards: Vec<Guard>, ops: Vec<Op>) -> Result<bool, StoreError>;
    /// The whole prefix, then its changes for ever. Begins even while the store is away.
    async fn watch(&self, prefix: &str) -> Result<Watch, StoreError>;
    /// A lease of this length (whole seconds, at least 2).
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;
    /// Renews a lease.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;
    /// Ends a lease and removes the keys on it.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;
    /// Whether it answers, and what it is.
    async fn status(&self) -> Result<StoreStatus, StoreError>;
}

/// Checks what both stores refuse alike.
fn check_transaction(guards: &[Guard], ops: &[Op]) -> Result<(), StoreError> {
    if ops.len() > MAX_OPS || guards.len() > MAX_OPS {
        return Err(StoreError::Refused(format!(
            "{} operations and {} guards in a transaction, at most {MAX_OPS} of each",
            ops.len(),
            guards.len()
        )));
    }
    let mut keys = HashSet::with_capacity(ops.len());
    let mut bytes = 0;
    for op in ops {
        let (key, value) = match op {
            Op::Put { key, value, .. } => (key, value.len()),
            Op::Delete(key) => (key, 0),
        };
        if value > MAX_VALUE {
            return Err(StoreError::Refused(format!("{key}: {value} bytes, at most {MAX_VALUE}")));
        }
        if !keys.insert(key.as_str()) {
            return Err(StoreError::Refused(format!("{key}: twice in one transaction")));
        }
        bytes += key.len() + value;
    }
    if bytes > MAX_TRANSACTION {
        return Err(StoreError::Refused(format!("{bytes} bytes in a transaction, at most {MAX_TRANSACTION}")));
    }
    Ok(())
}

/// Checks a lease's length.
fn check_lease(ttl: Duration) -> Result<(), StoreError> {
    if ttl < MIN_LEASE || ttl.subsec_nanos() != 0 {
        return Err(StoreError::Refused(format!("a lease of {ttl:?}; whole seconds, at least {MIN_LEASE:?}")));
    }
    Ok(())
}
