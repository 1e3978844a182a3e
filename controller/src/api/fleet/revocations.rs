//! Revocations under way, `revoke/<relay address>/<ULID>`: one watch for all sessions of this replica.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast;
use turn_core::AllocationId;

use crate::allocations::{REVOKE_PREFIX, parse_key};
use crate::store::{Store, WatchEvent};

/// Revocations a slow session may fall behind by, before it reads those pending again.
const QUEUE: usize = 1024;

type Revocation = (IpAddr, AllocationId);

/// What is to be revoked, on which relay address.
pub(super) struct Revocations {
    pending: Mutex<HashSet<Revocation>>,
    news: broadcast::Sender<Revocation>,
}

impl Default for Revocations {
    fn default() -> Self {
        Self { pending: Mutex::default(), news: broadcast::Sender::new(QUEUE) }
    }
}

impl Revocations {
    /// News from now on; ask for those pending after it.
    pub(super) fn subscribe(&self) -> broadcast::Receiver<Revocation> {
        self.news.subscribe()
    }

    /// Those of a relay address.
    pub(super) fn pending(&self, relay_address: IpAddr) -> Vec<AllocationId> {
        let pending = self.lock();
        let of_it = pending.iter().filter(|(address, _)| *address == relay_address);
        of_it.map(|(_, id)| *id).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Revocation>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows the store.
pub(super) async fn follow(store: Arc<dyn Store>, revocations: Arc<Revocations>) {
    loop {
        match store.watch(REVOKE_PREFIX).await {
            Ok(mut watch) => {
                while let Some(event) = watch.recv().await {
                    match event {
                        WatchEvent::Put(entry) => {
                            if let Some(revocation) = parse_key(&entry.key, REVOKE_PREFIX)
                                && revocations.lock().insert(revocation)
                            {
                                // No session here is fine.
                                let _ = revocations.news.send(revocation);
                            }
                        }
                        WatchEvent::Delete { key, .. } => {
                            if let Some(revocation) = parse_key(&key, REVOKE_PREFIX) {
                                revocations.lock().remove(&revocation);
                            }
                        }
                        // What is told again reaches the relays again: revoking twice does no harm.
                        WatchEvent::Reset => revocations.lock().clear(),
                        WatchEvent::Synced => {}
                    }
                }
                revocations.lock().clear();
            }
            Err(error) => tracing::warn!(%error, "revocations cannot be watched yet"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
