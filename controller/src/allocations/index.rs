//! Which allocations there are, followed by a watch: where each one is, and the events of those that come and go.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast;
use turn_core::{AllocationId, Transport};

use super::{Inner, PREFIX, open, parse_key};
use crate::fleet::unix_ms;
use crate::store::{Entry, WatchEvent};

/// Events a slow subscriber may fall behind by.
const EVENTS: usize = 4096;

/// An allocation came or went.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AllocationEvent {
    /// Unix ms, when this replica heard of it.
    pub at: u64,
    /// What happened.
    pub change: AllocationChange,
    /// Which.
    pub id: AllocationId,
    /// Where.
    pub relay_address: IpAddr,
    /// USERNAME, opaque bytes; empty if the record cannot be read.
    pub username: Vec<u8>,
}

/// What happened to an allocation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AllocationChange {
    /// Its first record was stored.
    Created,
    /// Its record was removed.
    Ended,
}

/// Follows every allocation's key.
#[derive(Debug)]
pub(super) struct Index {
    known: Mutex<HashMap<AllocationId, Known>>,
    /// The directory: allocations of UDP clients, by where they first came from.
    by_client: Mutex<HashMap<SocketAddr, AllocationId>>,
    events: broadcast::Sender<AllocationEvent>,
}

#[derive(Debug)]
struct Known {
    relay_address: IpAddr,
    username: Box<[u8]>,
    /// Of UDP.
    client: Option<SocketAddr>,
}

impl Default for Index {
    fn default() -> Self {
        Self { known: Mutex::default(), by_client: Mutex::default(), events: broadcast::Sender::new(EVENTS) }
    }
}

impl Index {
    pub(super) fn subscribe(&self) -> broadcast::Receiver<AllocationEvent> {
        self.events.subscribe()
    }

    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }

    pub(super) fn address_of(&self, id: AllocationId) -> Option<IpAddr> {
        self.lock().get(&id).map(|known| known.relay_address)
    }

    /// The relay address whose allocation a UDP client has.
    pub(super) fn located(&self, client: SocketAddr) -> Option<IpAddr> {
        let id = *self.clients().get(&client)?;
        self.address_of(id)
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<SocketAddr, AllocationId>> {
        self.by_client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another allocation may be at the address by now.
    fn forget_client(&self, id: AllocationId, known: &Known) {
        if let Some(client) = known.client {
            let mut clients = self.clients();
            if clients.get(&client) == Some(&id) {
                clients.remove(&client);
            }
        }
    }

    /// The ids made last, newest first.
    pub(super) fn newest(&self, limit: usize) -> Vec<AllocationId> {
        let mut ids: Vec<AllocationId> = self.lock().keys().copied().collect();
        if limit < ids.len() {
            ids.select_nth_unstable_by(limit, |a, b| b.cmp(a));
            ids.truncate(limit);
        }
        ids.sort_unstable_by(|a, b| b.cmp(a));
        ids
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AllocationId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: AllocationChange, id: AllocationId, known: &Known) {
        if self.events.receiver_count() > 0 {
            let event = AllocationEvent {
                at: unix_ms(),
                change,
                id,
                relay_address: known.relay_address,
                username: known.username.to_vec(),
            };
            // The last subscriber may just have left.
            let _ = self.events.send(event);
        }
    }

    /// Notes an allocation; true if it is new.
    fn put(&self, entry: &Entry, inner: &Inner) -> Option<(AllocationId, bool)> {
        let (relay_address, id) = parse_key(&entry.key, PREFIX)?;
        if self.lock().contains_key(&id) {
            return Some((id, false));
        }
        let record = open(entry, &inner.keys.current().record_keys);
        let client = record.as_ref().map(|record| record.five_tuple).filter(|it| it.transport == Transport::Udp);
        let client = client.map(|five_tuple| five_tuple.client);
        let username = record.map(|record| record.username.into_boxed_slice()).unwrap_or_default();
        if let Some(client) = client {
            self.clients().insert(client, id);
        }
        self.lock().insert(id, Known { relay_address, username, client });
        Some((id, true))
    }

    fn created(&self, id: AllocationId) {
        if let Some(known) = self.lock().get(&id) {
            self.tell(AllocationChange::Created, id, known);
        }
    }

    fn ended(&self, key: &str) {
        let Some((relay_address, id)) = parse_key(key, PREFIX) else {
            return;
        };
        let mut known = self.lock();
        // Another relay address may have adopted it.
        if known.get(&id).is_some_and(|known| known.relay_address == relay_address)
            && let Some(gone) = known.remove(&id)
        {
            self.forget_client(id, &gone);
            self.tell(AllocationChange::Ended, id, &gone);
        }
    }

    fn retain(&self, told: &HashSet<AllocationId>) {
        self.lock().retain(|id, known| {
            let stays = told.contains(id);
            if !stays {
                self.forget_client(*id, known);
                self.tell(AllocationChange::Ended, *id, known);
            }
            stays
        });
    }
}

/// Follows the store. The first telling is no news; a later one is, where it differs.
pub(super) async fn follow(inner: Arc<Inner>) {
    let index = &inner.index;
    let mut telling = Some(HashSet::new());
    let mut first = true;
    loop {
        match inner.store.watch(PREFIX).await {
            Ok(mut watch) => {
                while let Some(event) = watch.recv().await {
                    match event {
                        WatchEvent::Put(entry) => {
                            if let Some((id, new)) = index.put(&entry, &inner) {
                                if new && !first {
                                    index.created(id);
                                }
                                if let Some(told) = &mut telling {
                                    told.insert(id);
                                }
                            }
                        }
                        WatchEvent::Delete { key, .. } => index.ended(&key),
                        WatchEvent::Reset => telling = Some(HashSet::new()),
                        WatchEvent::Synced => {
                            if let Some(told) = telling.take() {
                                index.retain(&told);
                            }
                            first = false;
                        }
                    }
                }
                telling = Some(HashSet::new());
            }
            Err(error) => tracing::warn!(%error, "the allocations cannot be watched yet"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
