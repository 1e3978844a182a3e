//! This replica among the others, and how its store does: each second it writes `controllers/<id>`, on a lease shorter
//! than the relays', and so finds out whether the store answers, takes changes and lets it in. The others see by the
//! key when it is gone, and give its relays time to come to them.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::fleet::{FleetView, unix_ms};
use crate::metrics;
use crate::store::{LeaseId, MIN_LEASE, Op, Store, StoreError};

/// Before the key of every replica.
pub(crate) const PREFIX: &str = "controllers/";
/// Between two writes.
const EVERY: Duration = Duration::from_secs(1);
/// How much sooner than a relay's lease this one ends.
const SOONER: Duration = Duration::from_secs(2);
/// Time the store gets to answer. A leader change takes etcd 1-1.5 s.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is wrong with the store, if anything is.
pub type StoreHealth = Result<(), StoreError>;

/// Keeps the key until dropped; then it runs out.
#[derive(Debug)]
pub struct Presence {
    health: watch::Receiver<StoreHealth>,
    _task: JoinSet<()>,
}

/// The key's value, for people.
#[derive(Serialize)]
struct Record<'a> {
    version: &'a str,
    /// Unix ms.
    started_at: u64,
    /// Unix ms.
    seen_at: u64,
}

impl Presence {
    /// Begins to write as `id`, and tells `fleet` whether the store can be trusted. `lease` is that of the relays.
    pub fn start(store: Arc<dyn Store>, fleet: Arc<FleetView>, id: &str, lease: Duration) -> Self {
        let (sender, health) = watch::channel(Ok(()));
        let beat = Beat {
            store,
            key: format!("{PREFIX}{id}"),
            ttl: lease.saturating_sub(SOONER).max(MIN_LEASE),
            lease: None,
            started_at: unix_ms(),
        };
        let mut task = JoinSet::new();
        task.spawn(beat.run(fleet, sender));
        Self { health, _task: task }
    }

    /// How the store did when it was last asked, at most a few seconds ago.
    pub fn store_health(&self) -> StoreHealth {
        self.health.borrow().clone()
    }
}

struct Beat {
    store: Arc<dyn Store>,
    key: String,
    ttl: Duration,
    lease: Option<LeaseId>,
    started_at: u64,
}

impl Beat {
    async fn run(mut self, fleet: Arc<FleetView>, health: watch::Sender<StoreHealth>) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let beaten = timeout(PATIENCE, self.beat()).await;
            let silent = || StoreError::Unavailable(format!("no answer in {PATIENCE:?}"));
            let now = beaten.unwrap_or_else(|_| Err(silent()));
            let before = health.borrow().clone();
            match (&before, &now) {
                (Ok(()), Err(error)) => tracing::warn!("{error}; relays go on, discovery answers from memory"),
                (Err(_), Ok(())) => tracing::info!("the store is well again"),
                (Err(before), Err(error)) if std::mem::discriminant(before) != std::mem::discriminant(error) => {
                    tracing::warn!("{error}");
                }
                _ => {}
            }
            fleet.doubt(now.is_err());
            metrics::store(&now);
            // The one before is of no more use.
            let _ = health.send_replace(now);
        }
    }

    async fn beat(&mut self) -> StoreHealth {
        self.store.status().await?;
        let lease = match self.lease {
            Some(lease) => match self.store.keep_alive(lease).await {
                Err(StoreError::LeaseEnded) => self.store.grant(self.ttl).await?,
                renewed => renewed.map(|()| lease)?,
            },
            None => self.store.grant(self.ttl).await?,
        };
        self.lease = Some(lease);
        let version = env!("CARGO_PKG_VERSION");
        let record = Record { version, started_at: self.started_at, seen_at: unix_ms() };
        let put = Op::Put {
            key: self.key.clone(),
            // A record of ours has no part that JSON cannot write.
            value: serde_json::to_vec(&record).unwrap_or_default(),
            lease: Some(lease),
        };
        self.store.transact(Vec::new(), vec![put]).await.map(drop)
    }
}
