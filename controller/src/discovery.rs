//! What every way of discovery (gRPC, TURN REST, browsers) answers from: the fleet as last seen, the steering over it
//! and the newest TURN REST secret. No store is read for an answer.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::debug_span;
use turn_core::credential;
use turnpike_proto::trace::TARGET;

use crate::fleet::FleetView;
use crate::keys::Keys;
use crate::metrics;
use crate::steering::{Choice, Explanation, Place, Query, Steering, Target};

/// Longest life of a credential that may be asked for: a month.
pub const MAX_TTL: Duration = Duration::from_secs(30 * 86_400);
/// Longest user name that credentials are made out to, in bytes. USERNAME is shorter than 509 bytes (RFC 8489 §14.3)
/// and begins with the expiry and a colon.
pub const MAX_USER: usize = 480;

/// Username and password, and how long they are good for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Credential {
    /// `<Unix seconds of expiry>:<user>`.
    pub username: Vec<u8>,
    /// The password.
    pub password: String,
    /// Seconds until they expire.
    pub ttl: Duration,
    /// Unix seconds.
    pub expires_at: u64,
}

/// Why there is no answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// No node may be answered with; the sentence says why.
    #[error("{0}")]
    NoRelay(String),
    /// The user name is too long.
    #[error("the user name is longer than {MAX_USER} bytes")]
    User,
    /// The cluster's key ring holds no TURN REST secret.
    #[error("the cluster has no TURN REST secret to make credentials with")]
    Secret,
    /// The lifetime asked for is too long.
    #[error("the lifetime is longer than {} seconds", MAX_TTL.as_secs())]
    Ttl,
}

/// Answers discovery.
pub struct Discovery {
    fleet: Arc<FleetView>,
    steering: Arc<Steering>,
    keys: Arc<Keys>,
    default_ttl: Duration,
}

impl Discovery {
    /// Answers from `fleet` by `steering`, with credentials made by the newest of `keys`.
    pub fn new(fleet: Arc<FleetView>, steering: Arc<Steering>, keys: Arc<Keys>, default_ttl: Duration) -> Self {
        Self { fleet, steering, keys, default_ttl }
    }

    /// Where a region is, if the configuration says so.
    pub fn place(&self, region: &str) -> Option<Place> {
        self.steering.terms().places.get(region).copied()
    }

    /// REALM of the cluster.
    pub fn realm(&self) -> String {
        self.keys.current().message.realm.clone()
    }

    /// Relays for `query` and credentials for them; `ttl` of `None` is the default.
    ///
    /// # Errors
    /// See [`DiscoveryError`].
    pub fn discover(
        &self,
        query: &Query,
        user: &[u8],
        ttl: Option<Duration>,
    ) -> Result<(Choice, Credential), DiscoveryError> {
        let credential = debug_span!(target: TARGET, "mint").in_scope(|| self.credential(user, ttl))?;
        let choose = || self.steering.choose(&self.fleet.snapshot(), query);
        let choice = debug_span!(target: TARGET, "choose").in_scope(choose);
        metrics::discovery(!choice.relays.is_empty());
        tracing::debug!(?choice, "discovery");
        match choice.refusal {
            Some(why) => Err(DiscoveryError::NoRelay(why)),
            None => Ok((choice, credential)),
        }
    }

    /// Relays alone, for those who bring credentials of their own; `None` if no node may be answered with.
    pub fn relays(&self, query: &Query) -> Option<Choice> {
        let choice = self.steering.choose(&self.fleet.snapshot(), query);
        metrics::discovery(choice.refusal.is_none());
        choice.refusal.is_none().then_some(choice)
    }

    /// What would be answered, and why. Nothing is counted.
    pub fn explain(&self, query: &Query) -> Explanation {
        self.steering.explain(&self.fleet.snapshot(), query)
    }

    /// Relays that a client should measure its round trip to.
    pub fn targets(&self, client: IpAddr) -> Vec<Target> {
        self.steering.targets(&self.fleet.snapshot(), client)
    }

    /// Takes round trips that a client has measured, in milliseconds by region; returns how many were taken.
    pub fn report(&self, client: IpAddr, rtts: &[(String, f32)]) -> usize {
        let taken = self.steering.report(&self.fleet.snapshot(), client, rtts);
        metrics::netcheck(taken);
        taken
    }

    /// Credentials alone. An empty `user` gets a random name, so that strangers do not share one quota.
    ///
    /// # Errors
    /// [`DiscoveryError::User`], [`DiscoveryError::Ttl`].
    pub fn credential(&self, user: &[u8], ttl: Option<Duration>) -> Result<Credential, DiscoveryError> {
        if user.len() > MAX_USER {
            return Err(DiscoveryError::User);
        }
        let ttl = ttl.unwrap_or(self.default_ttl);
        if ttl > MAX_TTL {
            return Err(DiscoveryError::Ttl);
        }
        let random;
        let user = if user.is_empty() {
            random = format!("anonymous-{:016x}", getrandom::u64().unwrap_or_default());
            random.as_bytes()
        } else {
            user
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let expires_at = now + ttl.as_secs();
        let keys = self.keys.current();
        let secret = keys.rest_secrets.newest().ok_or(DiscoveryError::Secret)?;
        self.keys.gives_out(secret.id, ttl);
        let minted = credential::mint(secret, user, expires_at);
        Ok(Credential { username: minted.username, password: minted.password, ttl, expires_at })
    }
}
