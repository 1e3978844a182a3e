//! The stored form of the cluster's settings: JSON, so that `etcdctl get` can be read.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use turnpike_proto::v1;

use super::KeyOptions;
use crate::fleet::unix_ms;

/// Bytes of a key that is made here.
const LENGTH: usize = 32;

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Document {
    /// Grows with each change; begins at the Unix time in ms, so that it grows across stores made anew, too.
    pub(super) revision: u64,
    realm: String,
    rest_secrets: Vec<StoredKey>,
    /// Made while none was configured; stays accepted after one is.
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
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct StoredKey {
    id: u8,
    value: Base64,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct StoredUser {
    username: Base64,
    password: Base64,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
struct Base64(Vec<u8>);

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

impl Document {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// What should be stored, given what is and this replica's configuration: `stored` itself if nothing changes.
    ///
    /// # Errors
    /// If the system has no random numbers, or more secrets are configured than can be numbered.
    pub(super) fn merge(stored: Option<&Self>, options: &KeyOptions) -> Result<Self, String> {
        let mut generated = stored.and_then(|stored| stored.generated_rest_secret.clone());
        if options.rest_secrets.is_empty() && generated.is_none() {
            generated = Some(random()?);
        }
        let configured = options.rest_secrets.iter().cloned().map(Base64);
        let mut secrets: Vec<Base64> = Vec::new();
        for secret in configured.chain(generated.clone()) {
            if !secrets.contains(&secret) {
                secrets.push(secret);
            }
        }
        let rest_secrets = secrets.into_iter().enumerate().map(|(id, value)| {
            let id = u8::try_from(id).map_err(|_| "more than 255 rest_secrets".to_owned())?;
            Ok(StoredKey { id, value })
        });
        let user = |user: &turn_core::StaticUser| StoredUser {
            username: Base64(user.username.clone()),
            password: Base64(user.password.clone()),
        };
        let mut merged = Self {
            revision: 0,
            realm: options.realm.clone(),
            rest_secrets: rest_secrets.collect::<Result<_, String>>()?,
            generated_rest_secret: generated,
            nonce_keys: kept_or_made(stored.map(|stored| &stored.nonce_keys))?,
            record_keys: kept_or_made(stored.map(|stored| &stored.record_keys))?,
            denied_peers: options.denied_peers.clone(),
            user_quota: options.user_quota,
            static_users: options.static_users.iter().map(user).collect(),
        };
        let before = stored.map_or(0, |stored| stored.revision);
        merged.revision = before;
        if stored != Some(&merged) {
            merged.revision = unix_ms().max(before + 1);
        }
        Ok(merged)
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
        }
    }
}

fn kept_or_made(stored: Option<&Vec<StoredKey>>) -> Result<Vec<StoredKey>, String> {
    match stored {
        Some(keys) if !keys.is_empty() => Ok(keys.clone()),
        _ => Ok(vec![StoredKey { id: 0, value: random()? }]),
    }
}

fn random() -> Result<Base64, String> {
    let mut bytes = vec![0; LENGTH];
    getrandom::fill(&mut bytes).map_err(|error| format!("no random numbers: {error}"))?;
    Ok(Base64(bytes))
}
