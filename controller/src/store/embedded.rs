//! The embedded store: one process, everything in memory, what is not leased also in a file.

mod disk;
mod feed;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;

use self::disk::{Disk, Write};
use self::feed::Feeds;
use super::{
    Entry, Guard, LeaseId, MAX_PAGE, Op, Page, Store, StoreError, StoreStatus, Watch, WatchEvent, check_lease,
    check_transaction,
};

/// A store in this process. Leased keys live in memory only: after a restart the relays register anew. A transaction
/// is answered when its unleased part is on disk; several share one flush.
pub struct EmbeddedStore {
    state: Arc<Mutex<State>>,
    /// A lease was granted that may be the first to end.
    granted: Arc<Notify>,
    disk: Option<Disk>,
    _reaper: JoinSet<()>,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<String, Entry>,
    revision: i64,
    leases: HashMap<LeaseId, Lease>,
    feeds: Feeds,
}

struct Lease {
    ttl: Duration,
    ends: Instant,
    keys: HashSet<String>,
}

impl EmbeddedStore {
    /// A store that ends with the process.
    pub fn in_memory() -> Self {
        Self::new(State::default(), None)
    }

    /// A store in the file at `path`, which is made (mode 0600) if it does not exist.
    ///
    /// # Errors
    /// [`StoreError::Refused`], in one line, if another process has it open, it is damaged, or it cannot be made.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (disk, entries, revision) = Disk::open(path)?;
        let state = State { entries, revision, ..State::default() };
        Ok(Self::new(state, Some(disk)))
    }

    fn new(state: State, disk: Option<Disk>) -> Self {
        let state = Arc::new(Mutex::new(state));
        let granted = Arc::new(Notify::new());
        let mut reaper = JoinSet::new();
        reaper.spawn(reap(state.clone(), granted.clone()));
        Self { state, granted, disk, _reaper: reaper }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Applies a transaction in memory and hands its unleased part to the disk, in one critical section, so that the
    /// file sees transactions in order.
    fn apply(&self, guards: &[Guard], ops: Vec<Op>) -> Result<Applied, StoreError> {
        let mut state = self.lock();
        // What lives in memory alone goes on: leases, and so the fleet.
        if let Some(disk) = &self.disk
            && ops.iter().any(|op| state.is_on_disk(op))
        {
            disk.check()?;
        }
        if !guards.iter().all(|guard| state.holds(guard)) {
            return Ok(Applied::Refused);
        }
        let unknown = |op: &Op| matches!(op, Op::Put { lease: Some(lease), .. } if !state.leases.contains_key(lease));
        if ops.iter().any(unknown) {
            return Err(StoreError::LeaseEnded);
        }
        let writes = state.write(ops);
        match &self.disk {
            Some(disk) if !writes.is_empty() => Ok(Applied::Flushing(disk.write(state.revision, writes)?)),
            _ => Ok(Applied::Done),
        }
    }
}

enum Applied {
    Refused,
    Done,
    Flushing(oneshot::Receiver<Result<(), StoreError>>),
}

#[tonic::async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.lock().entries.get(key).cloned())
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        let state = self.lock();
        let limit = limit.clamp(1, MAX_PAGE);
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let mut found = state
            .entries
            .range::<str, _>((from, Bound::Unbounded))
            .map(|(_, entry)| entry)
            .take_while(|entry| entry.key.starts_with(prefix));
        let entries: Vec<Entry> = found.by_ref().take(limit).cloned().collect();
        Ok(Page { entries, more: found.next().is_some(), revision: state.revision })
    }

    async fn transact(&self, guards: Vec<Guard>, ops: Vec<Op>) -> Result<bool, StoreError> {
        check_transaction(&guards, &ops)?;
        match self.apply(&guards, ops)? {
            Applied::Refused => Ok(false),
            Applied::Done => Ok(true),
            Applied::Flushing(flushed) => {
                let flushed = flushed.await;
                flushed.unwrap_or_else(|_| Err(StoreError::Unavailable("the store is being closed".to_owned())))?;
                Ok(true)
            }
        }
    }

    async fn watch(&self, prefix: &str) -> Result<Watch, StoreError> {
        Ok(feed::start(&self.state, prefix))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        check_lease(ttl)?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| StoreError::Refused(format!("no random numbers: {error}")))?;
        // Positive and never 0, as etcd's are.
        let id = LeaseId((i64::from_le_bytes(random) & i64::MAX).max(1));
        let lease = Lease { ttl, ends: Instant::now() + ttl, keys: HashSet::new() };
        self.lock().leases.insert(id, lease);
        self.granted.notify_one();
        Ok(id)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut state = self.lock();
        let lease = state.leases.get_mut(&lease).ok_or(StoreError::LeaseEnded)?;
        lease.ends = Instant::now() + lease.ttl;
        Ok(())
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.lock().end_lease(lease);
        Ok(())
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        if let Some(disk) = &self.disk {
            disk.check()?;
        }
        Ok(StoreStatus { kind: "embedded", version: String::new() })
    }
}

impl State {
    fn holds(&self, guard: &Guard) -> bool {
        match guard {
            Guard::Value(key, value) => self.entries.get(key).is_some_and(|entry| entry.value == *value),
            Guard::Revision(key, revision) => self.entries.get(key).is_some_and(|entry| entry.revision == *revision),
            Guard::Absent(key) => !self.entries.contains_key(key),
        }
    }

    /// Applies operations under one new revision, tells the watches, and returns what has to reach the disk.
    fn write(&mut self, ops: Vec<Op>) -> Vec<Write> {
        let mut writes = Vec::new();
        self.revision += 1;
        let revision = self.revision;
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let on_disk = self.forget(&key);
                    match lease {
                        None => writes.push(Write::Put(key.clone(), value.clone())),
                        Some(lease) => {
                            if let Some(lease) = self.leases.get_mut(&lease) {
                                lease.keys.insert(key.clone());
                            }
                            if on_disk {
                                writes.push(Write::Delete(key.clone()));
                            }
                        }
                    }
                    let entry = Entry { key: key.clone(), value, revision, lease };
                    self.feeds.publish(&key, || WatchEvent::Put(entry.clone()));
                    self.entries.insert(key, entry);
                }
                Op::Delete(key) => {
                    if !self.entries.contains_key(&key) {
                        continue;
                    }
                    if self.forget(&key) {
                        writes.push(Write::Delete(key.clone()));
                    }
                    self.feeds.publish(&key, || WatchEvent::Delete { key: key.clone(), revision });
                }
            }
        }
        writes
    }

    /// Whether an operation changes what the disk has.
    fn is_on_disk(&self, op: &Op) -> bool {
        let (key, leased) = match op {
            Op::Put { key, lease, .. } => (key, lease.is_some()),
            Op::Delete(key) => (key, true),
        };
        !leased || self.entries.get(key).is_some_and(|entry| entry.lease.is_none())
    }

    /// Removes a key and its tie to a lease; returns whether the disk has it.
    fn forget(&mut self, key: &str) -> bool {
        let Some(entry) = self.entries.remove(key) else {
            return false;
        };
        if let Some(lease) = entry.lease.and_then(|lease| self.leases.get_mut(&lease)) {
            lease.keys.remove(key);
        }
        entry.lease.is_none()
    }

    fn end_lease(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.remove(&id) else {
            return;
        };
        if !lease.keys.is_empty() {
            // Leased keys are not on disk: there is nothing to flush.
            self.write(lease.keys.into_iter().map(Op::Delete).collect());
        }
    }
}

/// Ends leases as they run out.
async fn reap(state: Arc<Mutex<State>>, granted: Arc<Notify>) {
    loop {
        let next = {
            let mut state = lock(&state);
            let now = Instant::now();
            let leases = state.leases.iter();
            let ended: Vec<LeaseId> = leases.filter(|(_, lease)| lease.ends <= now).map(|(id, _)| *id).collect();
            for id in ended {
                state.end_lease(id);
            }
            state.leases.values().map(|lease| lease.ends).min()
        };
        match next {
            Some(ends) => tokio::select! {
                () = tokio::time::sleep_until(ends.into()) => {}
                () = granted.notified() => {}
            },
            None => granted.notified().await,
        }
    }
}

/// No code panics while it holds the lock, so a poisoned one is whole.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
