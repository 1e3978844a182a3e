//! Relays that an operator wants empty: the keys `drains/<node id>`, which no lease ends.
//!
//! The word of an operator outlives the relay, the controllers and the operator: nothing removes a key but
//! [`lift`], as a cordon of Kubernetes.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use turn_core::Transport;

use super::{NodeState, Snapshot, Thresholds, unix_ms};
use crate::store::{Guard, Op, Store, StoreError};

/// Before every such key.
pub(super) const PREFIX: &str = "drains/";
/// Attempts to write against others that write at the same time.
const ATTEMPTS: usize = 5;

/// `drains/<node id>`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct DrainRecord {
    /// Unix ms.
    pub since: u64,
    /// By when it shall be empty, Unix ms; 0 is no deadline.
    pub deadline: u64,
    /// Who said so.
    pub by: String,
}

/// Who is told to drain, by node id; also nodes that are not there.
pub type Drains = BTreeMap<String, DrainRecord>;

/// Allocations by the transport of their clients.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ByTransport {
    /// UDP.
    pub udp: u64,
    /// TCP.
    pub tcp: u64,
    /// TLS.
    pub tls: u64,
    /// DTLS.
    pub dtls: u64,
}

impl ByTransport {
    /// Every transport with its count.
    pub fn each(&self) -> [(Transport, u64); 4] {
        let Self { udp, tcp, tls, dtls } = *self;
        [(Transport::Udp, udp), (Transport::Tcp, tcp), (Transport::Tls, tls), (Transport::Dtls, dtls)]
    }

    /// Counts more.
    pub fn add(&mut self, transport: Transport, allocations: u64) {
        let count = match transport {
            Transport::Udp => &mut self.udp,
            Transport::Tcp => &mut self.tcp,
            Transport::Tls => &mut self.tls,
            Transport::Dtls => &mut self.dtls,
        };
        *count = count.saturating_add(allocations);
    }
}

/// Why nodes must not drain, for people; `None` if they may: an unknown node is seldom meant, and a region should keep
/// a relay that takes clients.
pub fn objection(snapshot: &Snapshot, thresholds: &Thresholds, node_ids: &[String]) -> Option<Objection> {
    if let Some(unknown) = node_ids.iter().find(|id| !snapshot.nodes.contains_key(*id)) {
        return Some(Objection::Unknown(unknown.clone()));
    }
    let ready = |region: &str, without: &[String]| {
        let own = snapshot.nodes.iter().filter(|(id, node)| node.record.region == region && !without.contains(id));
        own.filter(|(_, node)| node.state(thresholds) == NodeState::Ready).count()
    };
    let regions = node_ids.iter().filter_map(|id| snapshot.nodes.get(id)).map(|node| node.record.region.as_str());
    let emptied = regions.into_iter().find(|region| ready(region, &[]) > 0 && ready(region, node_ids) == 0)?;
    let elsewhere = snapshot.nodes.iter().any(|(id, node)| {
        node.record.region != emptied && !node_ids.contains(id) && node.state(thresholds) == NodeState::Ready
    });
    Some(if elsewhere { Objection::Region(emptied.to_owned()) } else { Objection::Cluster })
}

/// Why nodes must not drain unless the operator insists.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Objection {
    /// A node that is not there.
    #[error("there is no relay {0}")]
    Unknown(String),
    /// The region would have no ready relay.
    #[error("region {0} would have no ready relay left: its clients would be sent to other regions")]
    Region(String),
    /// No region would have one.
    #[error("the cluster would have no ready relay left: new clients would be sent nowhere")]
    Cluster,
}

/// Writes that these nodes drain, to be empty `within` a time from now if one is given. A node that drains already
/// goes on doing so since when it did, and keeps its deadline if no other is given. What was written, and whether it
/// drained before.
///
/// # Errors
/// As the store says; then none was written for sure.
pub async fn order(
    store: &dyn Store,
    node_ids: &[String],
    within: Option<Duration>,
    by: &str,
) -> Result<Vec<(DrainRecord, bool)>, StoreError> {
    let now = unix_ms();
    let deadline = within.map(|within| now.saturating_add(u64::try_from(within.as_millis()).unwrap_or(u64::MAX)));
    for _ in 0..ATTEMPTS {
        let mut answers = Vec::with_capacity(node_ids.len());
        let mut guards = Vec::with_capacity(node_ids.len());
        let mut ops = Vec::with_capacity(node_ids.len());
        for id in node_ids {
            let key = format!("{PREFIX}{id}");
            let stored = store.get(&key).await?;
            let before: Option<DrainRecord> =
                stored.as_ref().and_then(|entry| serde_json::from_slice(&entry.value).ok());
            guards.push(match stored {
                Some(entry) => Guard::Revision(key.clone(), entry.revision),
                None => Guard::Absent(key.clone()),
            });
            let (since, kept) = before.as_ref().map_or((now, 0), |before| (before.since, before.deadline));
            let record = DrainRecord { since, deadline: deadline.unwrap_or(kept), by: by.to_owned() };
            // A record of numbers and text has nothing that JSON cannot write.
            let value = serde_json::to_vec(&record).unwrap_or_default();
            ops.push(Op::Put { key, value, lease: None });
            answers.push((record, before.is_some()));
        }
        if store.transact(guards, ops).await? {
            return Ok(answers);
        }
    }
    Err(StoreError::Unavailable("others keep changing the same relays".to_owned()))
}

/// Removes the word that these nodes drain. Whether each was told so.
///
/// # Errors
/// As the store says; then none was removed for sure.
pub async fn lift(store: &dyn Store, node_ids: &[String]) -> Result<Vec<bool>, StoreError> {
    for _ in 0..ATTEMPTS {
        let (mut guards, mut ops) = (Vec::new(), Vec::new());
        let mut drained = Vec::with_capacity(node_ids.len());
        for id in node_ids {
            let stored = store.get(&format!("{PREFIX}{id}")).await?;
            drained.push(stored.is_some());
            if let Some(entry) = stored {
                ops.push(Op::Delete(entry.key.clone()));
                guards.push(Guard::Revision(entry.key, entry.revision));
            }
        }
        if ops.is_empty() || store.transact(guards, ops).await? {
            return Ok(drained);
        }
    }
    Err(StoreError::Unavailable("others keep changing the same relays".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::EmbeddedStore;

    #[tokio::test]
    async fn a_drain_is_written_changed_and_lifted() {
        let store = EmbeddedStore::in_memory();
        let ids = ["eu-1".to_owned(), "eu-2".to_owned()];
        let first = order(&store, &ids[..1], None, "admin/ann").await.expect("a store");
        assert_eq!((first[0].0.deadline, first[0].0.by.as_str(), first[0].1), (0, "admin/ann", false));
        let again = order(&store, &ids, Some(Duration::from_secs(60)), "admin/bob").await.expect("a store");
        assert_eq!((again[0].0.since, again[0].1, again[1].1), (first[0].0.since, true, false));
        assert!(again[0].0.deadline >= again[1].0.since + 60_000, "{again:?}");

        let again = order(&store, &ids[..1], None, "admin/bob").await.expect("a store");
        assert!(again[0].0.deadline >= again[0].0.since + 60_000, "kept: {again:?}");

        let stored = store.get("drains/eu-1").await.expect("a store").expect("written");
        assert_eq!(stored.lease, None, "no lease ends it");
        assert_eq!(serde_json::from_slice::<DrainRecord>(&stored.value).expect("JSON"), again[0].0);
        assert_eq!(lift(&store, &ids[..1]).await.expect("a store"), [true]);
        assert_eq!(lift(&store, &ids).await.expect("a store"), [false, true]);
        assert!(store.get("drains/eu-2").await.expect("a store").is_none());
    }

    #[test]
    fn what_an_operator_wrote_by_hand_is_a_drain_too() {
        assert_eq!(serde_json::from_str::<DrainRecord>("{}").expect("JSON"), DrainRecord::default());
    }
}
