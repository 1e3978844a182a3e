//! A controller that has reached its store: what every way in answers from.

mod join;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use turn_core::policy::Network;

pub use self::join::{Opener, join};
use crate::allocations::Allocations;
use crate::api::Limiter;
use crate::api::fleet::{FleetOptions, FleetService};
use crate::api::view::{NodeJson, Rates};
use crate::audit::Audit;
use crate::config::{ConsoleKey, Settings, StoreSettings};
use crate::discovery::Discovery;
use crate::fleet::{FleetView, ViewOptions, unix_ms};
use crate::keys::{KeyOptions, Keys, Steward};
use crate::metrics;
use crate::presence::{Presence, StoreHealth};
use crate::push::{Push, PushOptions};
use crate::sharing::Sharing;
use crate::steering::Steering;
use crate::store::{Store, StoreError, StoreStatus};
use crate::sweeper::Sweeper;

/// Time the store gets to say how it is.
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
    /// Who sees to their rotation.
    pub steward: Steward,
    /// The allocations in the store.
    pub allocations: Allocations,
    /// The service that relays' sessions are with.
    pub relays: FleetService,
    /// What clients of relays are told while they use them.
    pub push: Push,
    /// Discovery over the fleet.
    pub discovery: Discovery,
    /// What was done to the cluster, and who did it.
    pub audit: Audit,
    /// Keys that open HTTP discovery and the console; empty leaves them open to all.
    pub api_keys: Vec<String>,
    /// People who may do more at the console than look.
    pub console_keys: Vec<ConsoleKey>,
    /// How often HTTP discovery is answered.
    pub limiter: Limiter,
    /// Proxies whose word about a client's address is taken.
    pub trusted_proxies: Vec<Network>,
    /// When this process was ready.
    pub started: Instant,
    presence: Presence,
    /// Packets a second of every node.
    rates: Mutex<Rates>,
    _sweeper: Sweeper,
    _sharing: Sharing,
    _tasks: JoinSet<()>,
}

impl Replica {
    /// Reads `store` once: the keys are there (made, if this is the first controller), the fleet is known.
    ///
    /// # Errors
    /// As the store says.
    pub async fn start(store: Arc<dyn Store>, settings: &Settings) -> Result<Self, StoreError> {
        let store_kind = match settings.store {
            StoreSettings::Embedded { .. } => "embedded",
            StoreSettings::Etcd { .. } => "etcd",
        };
        let keys = Arc::new(Keys::start(store.clone(), &key_options(settings)).await?);
        let options = ViewOptions { lease: settings.lease, thresholds: settings.terms.thresholds };
        let fleet = Arc::new(FleetView::start(store.clone(), options));
        if tokio::time::timeout(FIRST_READING, fleet.synced()).await.is_err() {
            return Err(StoreError::Unavailable(format!("the fleet could not be read in {FIRST_READING:?}")));
        }
        let push = Push::start(fleet.clone(), PushOptions::with_lease(settings.lease));
        let terms = Arc::new(settings.terms.clone());
        let seed = getrandom::u64().unwrap_or_default();
        let steering = Arc::new(Steering::new(terms.clone(), settings.geo.clone(), seed));
        let sharing = Sharing::start(store.clone(), steering.clone());
        let mut tasks = JoinSet::new();
        if let Some(geo) = settings.geo.clone() {
            tasks.spawn(geo.follow());
        }
        let discovery = Discovery::new(fleet.clone(), steering, keys.clone(), settings.credential_ttl);
        let allocations = Allocations::start(store.clone(), fleet.clone(), keys.clone());
        let options = FleetOptions { controller_id: settings.id.clone(), lease: settings.lease, terms };
        let relays = FleetService::start(store.clone(), fleet.clone(), keys.clone(), allocations.directory(), options);
        let steward = Steward::start(store.clone(), fleet.clone(), keys.clone(), settings.id.clone());
        let sweeper =
            Sweeper::start(store.clone(), fleet.clone(), keys.clone(), settings.id.clone(), settings.retention);
        let presence = Presence::start(store.clone(), fleet.clone(), &settings.id, settings.lease);
        let audit = Audit::start(store.clone(), &settings.id);
        Ok(Self {
            id: settings.id.clone(),
            store,
            store_kind,
            fleet,
            keys,
            steward,
            allocations,
            relays,
            push,
            discovery,
            audit,
            api_keys: settings.api_keys.clone(),
            console_keys: settings.console_keys.clone(),
            limiter: Limiter::new(settings.rates, settings.api_keys.len()),
            trusted_proxies: settings.trusted_proxies.clone(),
            started: Instant::now(),
            presence,
            rates: Mutex::default(),
            _sweeper: sweeper,
            _sharing: sharing,
            _tasks: tasks,
        })
    }

    /// What was wrong with the store when it was last asked, at most a few seconds ago.
    ///
    /// # Errors
    /// As the store says; the text is a sentence for people, with what to do.
    pub fn store_health(&self) -> StoreHealth {
        self.presence.store_health()
    }

    /// Asks the store for its status, for at most two seconds.
    ///
    /// # Errors
    /// As the store says, or that it took too long; also while it answers but takes no changes.
    pub async fn store_status(&self) -> Result<StoreStatus, StoreError> {
        let status = tokio::time::timeout(PROBE, self.store.status()).await;
        let status = status.unwrap_or_else(|_| Err(StoreError::Unavailable(format!("no answer in {PROBE:?}"))))?;
        match self.store_health() {
            Err(error @ (StoreError::Full(_) | StoreError::Denied(_))) => Err(error),
            // What was heard before may be over: it answers.
            _ => Ok(status),
        }
    }

    /// Takes in the reports of the last second.
    pub fn sample(&self) {
        let snapshot = self.fleet.snapshot();
        self.rates.lock().unwrap_or_else(PoisonError::into_inner).update(&snapshot);
        metrics::fleet(&snapshot, self.fleet.thresholds());
        let now = unix_ms();
        let overdue = snapshot.nodes.values().filter(|node| node.is_overdue(now)).count();
        metrics::reports(&snapshot, overdue, self.keys.current().message.revision);
    }

    /// Every node, in order of its id.
    pub fn node_views(&self) -> Vec<NodeJson> {
        let snapshot = self.fleet.snapshot();
        let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let now = unix_ms();
        let view = |node| NodeJson::new(node, self.fleet.thresholds(), &rates, now);
        snapshot.everyone().iter().map(view).collect()
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
        credential_ttl: settings.credential_ttl,
    }
}
