//! The stored allocations, as operators see them: listed, found, revoked, and told as they come and go.
//!
//! Records lie under `allocations/<relay address>/<ULID>`, sealed. They are opened here, so what is damaged or forged
//! is left out of every answer.

mod index;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::broadcast;
use tokio::task::JoinSet;
use turn_core::text::escape;
use turn_core::{AllocationId, KeyRing, Record, credential};

use self::index::Index;
pub use self::index::{AllocationChange, AllocationEvent};
use crate::fleet::{FleetView, unix_ms};
use crate::keys::Keys;
use crate::store::{Entry, MAX_PAGE, Op, Store, StoreError};

/// Before every allocation's key.
pub(crate) const PREFIX: &str = "allocations/";
/// Before the key of every revocation under way, `revoke/<relay address>/<ULID>`.
pub(crate) const REVOKE_PREFIX: &str = "revoke/";
/// A revocation not fetched by its relay in this time is forgotten.
const REVOCATION_LIFE: Duration = Duration::from_secs(60);
/// Entries looked at for one page, so that a filter that matches little cannot hold a call up.
const SCAN: usize = 20_000;
/// Default and most records in a page.
const PAGE: (usize, usize) = (100, 1000);

/// Key prefix of a relay address's allocations.
pub(crate) fn prefix_of(relay_address: IpAddr) -> String {
    format!("{PREFIX}{relay_address}/")
}

/// Key of an allocation.
pub(crate) fn key_of(relay_address: IpAddr, id: AllocationId) -> String {
    format!("{PREFIX}{relay_address}/{}", id.to_text())
}

/// Reads a key under `prefix`, which is [`PREFIX`] or [`REVOKE_PREFIX`].
pub(crate) fn parse_key(key: &str, prefix: &str) -> Option<(IpAddr, AllocationId)> {
    let (address, id) = key.strip_prefix(prefix)?.split_once('/')?;
    Some((address.parse().ok()?, AllocationId::from_text(id)?))
}

/// Which allocations; the default is all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// On this node.
    pub node_id: Option<String>,
    /// In this region.
    pub region: Option<String>,
    /// Of this user: the whole USERNAME, or what quota counts of it.
    pub user: Option<Vec<u8>>,
    /// With this in its node, USERNAME, client or relayed addresses as people are shown them; in lower case.
    pub text: Option<String>,
}

/// An allocation and where it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Found {
    /// As its relay stored it.
    pub record: Record,
    /// The node that serves its relay address; empty if none does now.
    pub node_id: String,
    /// Of that node.
    pub region: String,
}

/// A page of a list.
#[derive(Clone, Debug, Default)]
pub struct Listed {
    /// In the order of relay address and creation.
    pub allocations: Vec<Found>,
    /// Goes on from here; `None` on the last page. A page may be short and still not be the last.
    pub next: Option<String>,
    /// Records left out because their seal does not verify or they are damaged.
    pub unreadable: usize,
}

/// Why there is no list.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// The page token is none of ours.
    #[error("the page token is not valid")]
    Token,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The allocations of the cluster. Its task, which follows them for events and finding, ends with this handle.
#[derive(Debug)]
pub struct Allocations {
    inner: Arc<Inner>,
    _task: JoinSet<()>,
}

struct Inner {
    store: Arc<dyn Store>,
    fleet: Arc<FleetView>,
    keys: Arc<Keys>,
    index: Index,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

impl Allocations {
    /// Starts to follow the store.
    pub fn start(store: Arc<dyn Store>, fleet: Arc<FleetView>, keys: Arc<Keys>) -> Self {
        let inner = Arc::new(Inner { store, fleet, keys, index: Index::default() });
        let mut task = JoinSet::new();
        task.spawn(index::follow(inner.clone()));
        Self { inner, _task: task }
    }

    /// Where clients are served, as last heard.
    pub fn directory(&self) -> Directory {
        Directory { inner: self.inner.clone() }
    }

    /// Allocations created and ended from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<AllocationEvent> {
        self.inner.index.subscribe()
    }

    /// How many are stored, as last heard.
    pub fn count(&self) -> usize {
        self.inner.index.count()
    }

    /// Those made last, newest first. What has just ended or cannot be read is left out.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn newest(&self, limit: usize) -> Result<Vec<Found>, StoreError> {
        let found = stream::iter(self.inner.index.newest(limit)).map(|id| self.get(id)).buffered(16);
        found.try_filter_map(async |found| Ok(found)).try_collect().await
    }

    /// A page of those that match. `page_size` 0 is 100; more than 1,000 is 1,000.
    ///
    /// # Errors
    /// See [`ListError`].
    pub async fn list(&self, filter: &Filter, page_size: usize, token: &str) -> Result<Listed, ListError> {
        let size = if page_size == 0 { PAGE.0 } else { page_size.min(PAGE.1) };
        let snapshot = self.inner.fleet.snapshot();
        let prefix = match &filter.node_id {
            Some(node_id) => match snapshot.nodes.get(node_id) {
                Some(node) => prefix_of(node.record.relay_address),
                None => return Ok(Listed::default()),
            },
            None => PREFIX.to_owned(),
        };
        let mut after = (!token.is_empty()).then(|| format!("{PREFIX}{token}"));
        if after.as_ref().is_some_and(|after| parse_key(after, PREFIX).is_none()) {
            return Err(ListError::Token);
        }
        let keys = self.inner.keys.current();
        let mut listed = Listed::default();
        let mut scanned = 0;
        loop {
            let limit = (size - listed.allocations.len()).clamp(PAGE.0, MAX_PAGE);
            let page = self.inner.store.range(&prefix, after.as_deref(), limit).await?;
            let last = page.entries.len();
            for (n, entry) in page.entries.into_iter().enumerate() {
                let more = page.more || n + 1 < last;
                after = Some(entry.key.clone());
                scanned += 1;
                match self.inner.found(&entry, &keys.record_keys) {
                    Some(found) if matches(filter, &found) => listed.allocations.push(found),
                    Some(_) => {}
                    None => listed.unreadable += 1,
                }
                if more && (listed.allocations.len() == size || scanned >= SCAN) {
                    listed.next = after.and_then(|key| key.strip_prefix(PREFIX).map(str::to_owned));
                    return Ok(listed);
                }
            }
            if !page.more {
                return Ok(listed);
            }
        }
    }

    /// The token with which a list goes on after `found`.
    pub fn token_after(found: &Found) -> String {
        format!("{}/{}", found.record.relay_address, found.record.id.to_text())
    }

    /// One allocation; `None` if it is not stored or cannot be read.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn get(&self, id: AllocationId) -> Result<Option<Found>, StoreError> {
        let keys = self.inner.keys.current();
        let entry = self.inner.entry(id).await?;
        Ok(entry.and_then(|entry| self.inner.found(&entry, &keys.record_keys)))
    }

    /// Asks the relay of an allocation to end it, on whichever replica its session is: the request is a short-lived
    /// key that every replica watches. False if there is no such allocation.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn revoke(&self, id: AllocationId) -> Result<bool, StoreError> {
        let store = &self.inner.store;
        let Some(entry) = self.inner.entry(id).await? else {
            return Ok(false);
        };
        let Some((relay_address, _)) = parse_key(&entry.key, PREFIX) else {
            return Ok(false);
        };
        let lease = store.grant(REVOCATION_LIFE).await?;
        let put = Op::Put {
            key: format!("{REVOKE_PREFIX}{relay_address}/{}", id.to_text()),
            value: unix_ms().to_string().into_bytes(),
            lease: Some(lease),
        };
        match store.transact(Vec::new(), vec![put.clone()]).await {
            // Of unknown outcome: asking twice does no harm.
            Err(StoreError::Unavailable(_)) => store.transact(Vec::new(), vec![put]).await,
            answer => answer,
        }
    }
}

/// Where clients are served: read from the index of allocations, which follows the store.
#[derive(Clone, Debug)]
pub struct Directory {
    inner: Arc<Inner>,
}

impl Directory {
    /// The node that has the allocation of a UDP client.
    pub fn locate(&self, client: SocketAddr) -> Option<String> {
        let relay_address = self.inner.index.located(client)?;
        let snapshot = self.inner.fleet.snapshot();
        snapshot.node_of(relay_address).map(|node| node.record.node_id.clone())
    }
}

impl Inner {
    /// Finds the entry of an allocation: where the index says, else under every relay address ever used.
    async fn entry(&self, id: AllocationId) -> Result<Option<Entry>, StoreError> {
        if let Some(address) = self.index.address_of(id)
            && let Some(entry) = self.store.get(&key_of(address, id)).await?
        {
            return Ok(Some(entry));
        }
        let mut after = None;
        loop {
            let page = self.store.range("epochs/", after.as_deref(), MAX_PAGE).await?;
            for epoch in &page.entries {
                let address = epoch.key.strip_prefix("epochs/").and_then(|text| text.parse().ok());
                let Some(address) = address else { continue };
                if let Some(entry) = self.store.get(&key_of(address, id)).await? {
                    return Ok(Some(entry));
                }
            }
            after = page.entries.into_iter().last().map(|entry| entry.key);
            if !page.more {
                return Ok(None);
            }
        }
    }

    fn found(&self, entry: &Entry, keys: &KeyRing) -> Option<Found> {
        let record = open(entry, keys)?;
        let snapshot = self.fleet.snapshot();
        let node = snapshot.node_of(record.relay_address);
        let (node_id, region) =
            node.map_or_else(Default::default, |node| (node.record.node_id.clone(), node.record.region.clone()));
        Some(Found { record, node_id, region })
    }
}

/// Opens a stored record: its seal must verify and it must lie where it belongs.
pub(crate) fn open(entry: &Entry, keys: &KeyRing) -> Option<Record> {
    let (address, id) = parse_key(&entry.key, PREFIX)?;
    match Record::open(&entry.value, keys) {
        Ok(record) if record.relay_address == address && record.id == id => Some(record),
        Ok(_) => {
            tracing::warn!(key = entry.key, "a record that belongs elsewhere is left out");
            None
        }
        Err(error) => {
            tracing::warn!(key = entry.key, %error, "a stored record is left out");
            None
        }
    }
}

fn matches(filter: &Filter, found: &Found) -> bool {
    let username = found.record.username.as_slice();
    let of_user = |user: &Vec<u8>| username == user.as_slice() || credential::quota_key(username) == user.as_slice();
    filter.region.as_ref().is_none_or(|region| *region == found.region)
        && filter.user.as_ref().is_none_or(of_user)
        && filter.text.as_ref().is_none_or(|text| contains(found, text))
}

fn contains(found: &Found, text: &str) -> bool {
    let Found { record, node_id, region } = found;
    let has = |shown: &str| shown.to_lowercase().contains(text);
    has(node_id)
        || has(region)
        || has(&escape(&record.username))
        || has(&record.five_tuple.client.to_string())
        || record.relayed.iter().any(|relayed| has(&relayed.advertised.to_string()))
}
