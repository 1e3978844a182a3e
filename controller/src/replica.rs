//! A controller that has reached its store: what every way in answers from.

mod join;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

pub use self::join::{Opener, join};
use crate::allocations::Allocations;
use crate::api::fleet::{FleetOptions, FleetService};
use crate::api::view::{NodeJson, Rates};
use crate::config::Settings;
use crate::discovery::Discovery;
use crate::fleet::{FleetView, ViewOptions, unix_ms};
use crate::keys::{KeyOptions, Keys};
use crate::metrics;
use crate::steering::Steering;
use crate::store::{Store, StoreError, StoreStatus};
use crate::sweeper::Sweeper;

/// Between two questions whether the store answers, and the time it gets to do so.
const PROBE: Duration = Duration::from_secs(2);
/// Time for the first reading of the fleet.
const FIRST_READING: Duration = Duration::from_secs(5);

/// Everything the services share.
pub struct Replica {
    /// Name of this controller.
    pub id: String,
    /// Where state lives.
    pub store: Arc<dyn Store>,
    /// `etcd` or `embedded`.
    pub store_kind: &'static str,
    /// The fleet as last seen.
    pub fleet: Arc<FleetView>,
    /// The cluster's settings and key rings.
    pub keys: Arc<Keys>,
    /// The allocations in the store.
    pub allocations: Allocations,
    /// The service that relays' sessions are with.
    pub relays: FleetService,
    /// Discovery over the fleet.
    pub discovery: Discovery,
    /// Keys that open HTTP discovery and the console; empty leaves them open to all.
    pub api_keys: Vec<String>,
    /// When this process was ready.
    pub started: Instant,
    /// Whether the store answered when last asked.
    store_healthy: AtomicBool,
    /// Packets a second of every node.
    rates: Mutex<Rates>,
    _sweeper: Sweeper,
}

impl Replica {
    /// Reads `store` once: the keys are there (made, if this is the first controller), the fleet is known.
    ///
    /// # Errors
    /// As the store says.
    pub async fn start(store: Arc<dyn Store>, settings: &Settings) -> Result<Self, StoreError> {
        let store_kind = store.status().await?.kind;
        let keys = Arc::new(Keys::start(store.clone(), &key_options(settings)).await?);
        let options = ViewOptions { lease: settings.lease, thresholds: settings.terms.thresholds };
        let fleet = Arc::new(FleetView::start(store.clone(), options));
        if tokio::time::timeout(FIRST_READING, fleet.synced()).await.is_err() {
            return Err(StoreError::Unavailable(format!("the fleet could not be read in {FIRST_READING:?}")));
        }
        let steering = Steering::new(settings.terms.clone(), getrandom::u64().unwrap_or_default());
        let discovery = Discovery::new(fleet.clone(), steering, keys.clone(), settings.credential_ttl);
        let allocations = Allocations::start(store.clone(), fleet.clone(), keys.clone());
        let options = FleetOptions { controller_id: settings.id.clone(), lease: settings.lease };
        let relays = FleetService::start(store.clone(), fleet.clone(), keys.clone(), options);
        let sweeper = Sweeper::start(store.clone(), fleet.clone(), keys.clone(), settings.id.clone());
        Ok(Self {
            id: settings.id.clone(),
            store,
            store_kind,
            fleet,
            keys,
            allocations,
            relays,
            discovery,
            api_keys: settings.api_keys.clone(),
            started: Instant::now(),
            store_healthy: AtomicBool::new(true),
            rates: Mutex::default(),
            _sweeper: sweeper,
        })
    }

    /// Whether the store answered when last asked.
    pub fn store_is_healthy(&self) -> bool {
        self.store_healthy.load(Ordering::Relaxed)
    }

    /// Asks the store for its status, for at most two seconds.
    ///
    /// # Errors
    /// As the store says, or that it took too long.
    pub async fn store_status(&self) -> Result<StoreStatus, StoreError> {
        let status = tokio::time::timeout(PROBE, self.store.status()).await;
        let status = status.unwrap_or_else(|_| Err(StoreError::Unavailable(format!("no answer in {PROBE:?}"))));
        self.store_healthy.store(status.is_ok(), Ordering::Relaxed);
        status
    }

    /// Keeps [`Replica::store_is_healthy`] true, until shutdown.
    pub async fn watch_store(self: Arc<Self>, shutdown: CancellationToken) {
        let watching = async {
            loop {
                let before = self.store_is_healthy();
                match self.store_status().await {
                    Err(error) if before => tracing::warn!(%error, "the store is away; discovery goes on from memory"),
                    Ok(_) if !before => tracing::info!("the store is back"),
                    _ => {}
                }
                tokio::time::sleep(PROBE).await;
            }
        };
        tokio::select! {
            () = watching => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Takes in the reports of the last second.
    pub fn sample(&self) {
        let snapshot = self.fleet.snapshot();
        self.rates.lock().unwrap_or_else(PoisonError::into_inner).update(&snapshot);
        metrics::fleet(&snapshot, self.fleet.thresholds(), self.store_is_healthy());
    }

    /// Every node, in order of its id.
    pub fn node_views(&self) -> Vec<NodeJson> {
        let snapshot = self.fleet.snapshot();
        let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let now = unix_ms();
        let view = |node| NodeJson::new(node, self.fleet.thresholds(), &rates, now);
        snapshot.nodes.values().map(view).collect()
    }
}

fn key_options(settings: &Settings) -> KeyOptions {
    let static_user = |user: &crate::config::StaticUser| turn_core::StaticUser {
        username: user.username.clone().into_bytes(),
        password: user.password.clone().into_bytes(),
    };
    KeyOptions {
        realm: settings.realm.clone(),
        rest_secrets: settings.rest_secrets.iter().map(|secret| secret.clone().into_bytes()).collect(),
        static_users: settings.static_users.iter().map(static_user).collect(),
        denied_peers: settings.denied_peers.clone(),
        user_quota: settings.user_quota,
    }
}
