//! The stored form of the cluster's settings: JSON, so that `etcdctl get` can be read.
//!
//! Fields that this version does not know are kept as they are when it writes the document again, so that replicas of
//! two versions can share it. A field of a key that a writer does not know says what it says where it is absent: the
//! version before this one knew only `id` and `value`.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use turnpike_proto::v1;

use super::{KeyOptions, Ring};
use crate::fleet::unix_ms;

/// Bytes of a key that is made here.
const LENGTH: usize = 32;
/// Earlier revisions that are remembered: more than one rotation of every ring makes.
const LINEAGE: usize = 32;

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Document {
    /// Grows with each change; begins at the Unix time in ms, so that it grows across stores made anew, too.
    pub(super) revision: u64,
    /// Revisions it came from, ascending, at most [`LINEAGE`]; 0 is the beginning. By these a relay knows settings that
    /// its own did not come into: of a store made anew, or out of a snapshot.
    #[serde(default)]
    lineage: Vec<u64>,
    realm: String,
    rest_secrets: Vec<StoredKey>,
    /// The newest TURN REST secret that was made here; it stays accepted while others are configured.
    #[serde(default)]
    generated_rest_secret: Option<Base64>,
    nonce_keys: Vec<StoredKey>,
    record_keys: Vec<StoredKey>,
    #[serde(default)]
    denied_peers: Vec<String>,
    #[serde(default)]
    user_quota: u32,
    #[serde(default)]
    static_users: Vec<StoredUser>,
    /// Of a newer version.
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

/// A key of a ring. The first of a ring is the newest: new things are made with it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct StoredKey {
    /// Names it on the wire.
    pub(super) id: u8,
    pub(super) value: Base64,
    #[serde(default)]
    pub(super) stage: Stage,
    #[serde(default)]
    pub(super) origin: Option<Origin>,
    /// When it was made, Unix ms; 0 if the version that made it did not say.
    #[serde(default)]
    pub(super) created_at: u64,
    /// When it came to its stage, Unix ms.
    #[serde(default)]
    pub(super) since: u64,
    /// Revision of the settings with which it came to its stage.
    #[serde(default)]
    pub(super) revision: u64,
    /// Of a newer version.
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

/// What a key is used for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Stage {
    /// Everybody accepts it; it makes new things if it is the first of its ring.
    #[default]
    Live,
    /// Being made known: accepted by who has heard of it, not used by anybody yet.
    Next,
    /// It was the newest, and leaves when nothing made with it can matter any more.
    Retiring,
}

/// Where a key comes from.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Random, made by a controller.
    Made,
    /// Given by an operator, whose apps make credentials with it, too.
    Given,
    /// In the configuration of the controllers; it leaves with that.
    Configured,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct StoredUser {
    username: Base64,
    password: Base64,
}

#[derive(Clone, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Base64(pub(super) Vec<u8>);

impl std::fmt::Debug for Base64 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Secrets do not get into logs by way of `{:?}`.
        write!(f, "{} bytes", self.0.len())
    }
}

impl TryFrom<String> for Base64 {
    type Error = base64::DecodeError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        BASE64_STANDARD.decode(text).map(Self)
    }
}

impl From<Base64> for String {
    fn from(bytes: Base64) -> Self {
        BASE64_STANDARD.encode(bytes.0)
    }
}

impl StoredKey {
    pub(super) fn new(id: u8, value: Vec<u8>, origin: Origin, stage: Stage, now: u64) -> Self {
        Self {
            id,
            value: Base64(value),
            stage,
            origin: Some(origin),
            created_at: now,
            since: now,
            revision: 0,
            unknown: Map::new(),
        }
    }

    /// Where it comes from; keys of the version before this one that do not say were made here.
    pub(super) fn origin(&self) -> Origin {
        self.origin.unwrap_or(Origin::Made)
    }
}

impl Document {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, String> {
        let mut document: Self = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let generated = document.generated_rest_secret.clone();
        for key in &mut document.rest_secrets {
            // As the version before this one told them apart.
            let made = Some(&key.value) == generated.as_ref();
            key.origin.get_or_insert(if made { Origin::Made } else { Origin::Configured });
        }
        for ring in Ring::ALL {
            let keys = document.ring(ring);
            if keys.first().is_none_or(|key| key.stage != Stage::Live) {
                return Err(format!("the {ring} ring has no newest key"));
            }
        }
        Ok(document)
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    pub(super) fn ring(&self, ring: Ring) -> &[StoredKey] {
        match ring {
            Ring::Rest => &self.rest_secrets,
            Ring::Nonce => &self.nonce_keys,
            Ring::Record => &self.record_keys,
        }
    }

    pub(super) fn ring_mut(&mut self, ring: Ring) -> &mut Vec<StoredKey> {
        match ring {
            Ring::Rest => &mut self.rest_secrets,
            Ring::Nonce => &mut self.nonce_keys,
            Ring::Record => &mut self.record_keys,
        }
    }

    /// Whether the ring is the configuration's: then it is changed there.
    pub(super) fn is_configured(&self, ring: Ring) -> bool {
        self.ring(ring).first().is_some_and(|key| key.origin() == Origin::Configured)
    }

    /// This document as it is to be stored after a change: under a revision that no other one has had, which the keys
    /// that changed carry too.
    pub(super) fn revised(mut self, before: &Self, now: u64) -> Self {
        self.revision = now.max(before.revision + 1);
        let forgotten = (before.lineage.len() + 1).saturating_sub(LINEAGE);
        self.lineage = before.lineage.iter().copied().chain([before.revision]).skip(forgotten).collect();
        for ring in Ring::ALL {
            let revision = self.revision;
            for key in self.ring_mut(ring) {
                let same = before.ring(ring).iter().any(|old| old == &*key);
                if !same {
                    key.revision = revision;
                }
            }
        }
        let made = self.rest_secrets.iter().find(|key| key.origin() == Origin::Made && key.stage != Stage::Next);
        if let Some(made) = made {
            self.generated_rest_secret = Some(made.value.clone());
        }
        self
    }

    /// What should be stored, given what is and this replica's configuration: `stored` itself if nothing changes.
    ///
    /// # Errors
    /// If the system has no random numbers, or more secrets are configured than can be numbered.
    pub(super) fn merge(stored: Option<&Self>, options: &KeyOptions) -> Result<Self, String> {
        let now = unix_ms();
        let user = |user: &turn_core::StaticUser| StoredUser {
            username: Base64(user.username.clone()),
            password: Base64(user.password.clone()),
        };
        let merged = Self {
            revision: stored.map_or(0, |stored| stored.revision),
            lineage: stored.map(|stored| stored.lineage.clone()).unwrap_or_default(),
            realm: options.realm.clone(),
            rest_secrets: rest_secrets(stored, &options.rest_secrets, now)?,
            generated_rest_secret: stored.and_then(|stored| stored.generated_rest_secret.clone()),
            nonce_keys: kept_or_made(stored, Ring::Nonce, now)?,
            record_keys: kept_or_made(stored, Ring::Record, now)?,
            denied_peers: options.denied_peers.clone(),
            user_quota: options.user_quota,
            static_users: options.static_users.iter().map(user).collect(),
            unknown: stored.map(|stored| stored.unknown.clone()).unwrap_or_default(),
        };
        match stored {
            Some(stored) if *stored == merged => Ok(merged),
            Some(stored) => Ok(merged.revised(stored, now)),
            None => Ok(merged.clone().revised(&merged, now)),
        }
    }

    /// As relays are told.
    pub(super) fn message(&self) -> v1::Settings {
        let secrets = |keys: &[StoredKey]| {
            let secret = |key: &StoredKey| v1::Secret { id: u32::from(key.id), value: key.value.0.clone() };
            keys.iter().map(secret).collect()
        };
        let user =
            |user: &StoredUser| v1::StaticUser { username: user.username.0.clone(), password: user.password.0.clone() };
        v1::Settings {
            revision: self.revision,
            realm: self.realm.clone(),
            rest_secrets: secrets(&self.rest_secrets),
            nonce_keys: secrets(&self.nonce_keys),
            record_keys: secrets(&self.record_keys),
            denied_peers: self.denied_peers.clone(),
            user_quota: self.user_quota,
            static_users: self.static_users.iter().map(user).collect(),
            lineage: self.lineage.clone(),
        }
    }
}

/// The TURN REST ring: what is configured comes first; what was made or given here follows it, or stands alone. What
/// was configured and is not any more is gone.
fn rest_secrets(stored: Option<&Document>, configured: &[Vec<u8>], now: u64) -> Result<Vec<StoredKey>, String> {
    let known = stored.map_or(&[][..], |stored| &stored.rest_secrets);
    let mut ring: Vec<StoredKey> = Vec::new();
    for secret in configured {
        if ring.iter().any(|key| key.value.0 == *secret) {
            continue;
        }
        let key = match known.iter().find(|key| key.value.0 == *secret) {
            Some(key) => StoredKey { stage: Stage::Live, origin: Some(Origin::Configured), ..key.clone() },
            None => {
                let id = free_id(known.iter().chain(&ring)).ok_or("more than 255 rest_secrets")?;
                StoredKey::new(id, secret.clone(), Origin::Configured, Stage::Live, now)
            }
        };
        ring.push(key);
    }
    for key in known.iter().filter(|key| key.origin() != Origin::Configured) {
        if !ring.iter().any(|there| there.value == key.value) {
            let mut key = key.clone();
            if !configured.is_empty() && key.stage == Stage::Next {
                // What the configuration says is the newest: this one has been overtaken.
                key.stage = Stage::Live;
            }
            ring.push(key);
        }
    }
    if configured.is_empty() && ring.first().is_none_or(|key| key.stage != Stage::Live) {
        match ring.iter().position(|key| key.stage == Stage::Live) {
            Some(live) => ring.swap(0, live),
            None => {
                let id = free_id(known.iter().chain(&ring)).ok_or("more than 255 rest_secrets")?;
                ring.insert(0, StoredKey::new(id, random()?, Origin::Made, Stage::Live, now));
            }
        }
    }
    Ok(ring)
}

fn kept_or_made(stored: Option<&Document>, ring: Ring, now: u64) -> Result<Vec<StoredKey>, String> {
    match stored {
        Some(stored) if !stored.ring(ring).is_empty() => Ok(stored.ring(ring).to_vec()),
        _ => Ok(vec![StoredKey::new(0, random()?, Origin::Made, Stage::Live, now)]),
    }
}

/// The id after the one given out last (the newest key's, or the one being made known), so that an id comes back only
/// after all others; never one that is in use.
pub(super) fn free_id<'a>(keys: impl Iterator<Item = &'a StoredKey> + Clone) -> Option<u8> {
    let last = keys.clone().max_by_key(|key| (key.created_at, key.id));
    let first = last.map_or(0, |key| key.id.wrapping_add(1));
    (0..=u8::MAX).map(|n| first.wrapping_add(n)).find(|id| keys.clone().all(|key| key.id != *id))
}

/// A key's worth of random bytes.
///
/// # Errors
/// The system has none.
pub(super) fn random() -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; LENGTH];
    getrandom::fill(&mut bytes).map_err(|error| format!("no random numbers: {error}"))?;
    Ok(bytes)
}
