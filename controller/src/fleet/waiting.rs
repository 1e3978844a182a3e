//! Relays that wait for an address which another one owns: the keys `waiting/<node id>`, on a lease of their own.

use std::sync::Arc;
use std::time::Duration;

use super::NodeRecord;
use crate::store::{LeaseId, MAX_PAGE, Op, Store, StoreError};

/// Before every such key.
pub(super) const PREFIX: &str = "waiting/";

/// The place of one relay among those that wait, as one session holds it.
pub(crate) struct Post {
    store: Arc<dyn Store>,
    record: NodeRecord,
    ttl: Duration,
    lease: Option<LeaseId>,
}

impl Post {
    /// Not taken yet.
    pub(crate) fn new(store: Arc<dyn Store>, record: NodeRecord, ttl: Duration) -> Self {
        Self { store, record, ttl, lease: None }
    }

    /// Takes the place, or keeps it.
    ///
    /// # Errors
    /// As the store says; it is tried again.
    pub(crate) async fn hold(&mut self) -> Result<(), StoreError> {
        if let Some(lease) = self.lease {
            match self.store.keep_alive(lease).await {
                Err(StoreError::LeaseEnded) => self.lease = None,
                other => return other,
            }
        }
        let lease = self.store.grant(self.ttl).await?;
        let record = NodeRecord { lease: lease.0, waiting: true, ..self.record.clone() };
        let key = format!("{PREFIX}{}", record.node_id);
        // Of numbers and text, which JSON can write.
        let value = serde_json::to_vec(&record).unwrap_or_default();
        // Not held: the next attempt grants another lease, and this one runs out.
        self.store.transact(Vec::new(), vec![Op::Put { key, value, lease: Some(lease) }]).await?;
        self.lease = Some(lease);
        Ok(())
    }

    /// Gives the place up. The same node may hold it in another session by now: only what is on this lease goes.
    pub(crate) async fn leave(&mut self) {
        if let Some(lease) = self.lease.take()
            && let Err(error) = self.store.revoke(lease).await
        {
            tracing::debug!(%error, "the lease of a relay that waited runs out by itself");
        }
    }

    /// Whether another relay that waits for the same address goes first.
    ///
    /// # Errors
    /// As the store says.
    pub(crate) async fn yields(&self) -> Result<bool, StoreError> {
        if !self.record.standby {
            return Ok(false);
        }
        let page = self.store.range(PREFIX, None, MAX_PAGE).await?;
        let records = page.entries.iter().filter_map(|entry| serde_json::from_slice::<NodeRecord>(&entry.value).ok());
        let mut others = records.filter(|other| other.relay_address == self.record.relay_address);
        Ok(others.any(|other| !other.standby && other.node_id != self.record.node_id))
    }
}
