//! How keys are replaced (pure): what a rotation is at each moment stands in the document, so that any replica, and one
//! that has just started, goes on with it.
//!
//! 1. A new key is `next`: everybody accepts it as soon as they hear of it, nobody uses it.
//! 2. When every relay with a lease has said that it knows it, or has not said so for [`PATIENCE`], it is the newest;
//!    the one before is retiring.
//! 3. A retiring key leaves when nothing made with it can matter: see [`Seen`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::document::{Document, Origin, Stage, StoredKey, free_id, random};
use super::{KeyInfo, KeyState, Ring, RotateError};

/// How long a relay with a lease may keep a new key from being used. It then hears of both steps at once, at its next
/// Hello at the latest. Together with the way to all members below the five seconds that are promised.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// Longest life of a nonce on any relay (`turn_core::Limits`), and what clocks may differ by.
const NONCE_LIFE: Duration = Duration::from_secs(3600 + 300);
/// What is added to the longest credential: clocks of apps and relays differ.
const CREDENTIAL_MARGIN: Duration = Duration::from_secs(300);
/// A key of records stays at least this long, so that what was on its way when it was replaced has arrived.
const RECORD_LIFE: Duration = Duration::from_secs(10);
/// A relay that does not say which settings it has (of the version before) is believed to have heard of them by then.
const MUTE: Duration = Duration::from_secs(60);
/// Most keys of a ring that are accepted at a time: each costs a wrong password an HMAC more.
pub(super) const MOST: usize = 16;
/// Bytes of a TURN REST secret that an operator gives.
pub(super) const SECRET: std::ops::RangeInclusive<usize> = 16..=1024;

/// What the keeper of the keys sees of the cluster.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Of every relay with a lease: the revision of the settings it has in force, as it last said.
    pub(super) relays: Vec<u64>,
    /// Whether `relays` is the fleet as it is; else nobody is known to have answered.
    pub(super) relays_are_known: bool,
    /// Longest life of the credentials made with each TURN REST secret, by id. `None`: not looked up.
    pub(super) longest_credential: Option<BTreeMap<u8, Duration>>,
    /// What is stored. `None`: not looked up.
    pub(super) records: Option<Records>,
}

/// What the stored records still need of the rings.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    /// Ids of the keys they are sealed with.
    pub(super) seals: BTreeSet<u8>,
    /// When the credentials expire, or expired, of the allocation whose credentials do so first, Unix ms.
    pub(super) earliest_credential: Option<u64>,
}

/// Credentials of the version before this one, which did not note how long they live, may live this long.
const UNKNOWN_CREDENTIAL: Duration = crate::discovery::MAX_TTL;

impl Document {
    /// Begins to replace the newest key of a ring. Where that is under way already nothing changes: two operators at
    /// once rotate once, and `None` is answered.
    ///
    /// # Errors
    /// See [`RotateError`].
    pub(super) fn begin(&self, ring: Ring, secret: Option<&[u8]>, now: u64) -> Result<Option<Self>, RotateError> {
        let keys = self.ring(ring);
        if self.is_configured(ring) {
            return Err(RotateError::Configured);
        }
        if let Some(secret) = secret {
            if ring != Ring::Rest {
                return Err(RotateError::NotGiven(ring));
            }
            if !SECRET.contains(&secret.len()) {
                return Err(RotateError::Length);
            }
            if let Some(at) = keys.iter().position(|key| key.value.0 == secret) {
                // Whoever repeats the command gets what it began.
                let is_it = at == 0 || keys[at].stage == Stage::Next;
                return if is_it { Ok(None) } else { Err(RotateError::Known(keys[at].id)) };
            }
        }
        if let Some(next) = keys.iter().find(|key| key.stage == Stage::Next) {
            return if secret.is_some() { Err(RotateError::UnderWay(next.id)) } else { Ok(None) };
        }
        if keys.len() >= MOST {
            return Err(RotateError::Full(ring));
        }
        let id = free_id(keys.iter()).ok_or(RotateError::Full(ring))?;
        let (value, origin) = match secret {
            Some(secret) => (secret.to_vec(), Origin::Given),
            None => (random().map_err(RotateError::Random)?, Origin::Made),
        };
        let mut document = self.clone();
        document.ring_mut(ring).insert(1, StoredKey::new(id, value, origin, Stage::Next, now));
        Ok(Some(document.revised(self, now)))
    }

    /// Removes a key now, whatever is still made with it.
    ///
    /// # Errors
    /// [`RotateError::Newest`], [`RotateError::Unknown`], [`RotateError::Configured`].
    pub(super) fn retire(&self, ring: Ring, id: u8, now: u64) -> Result<Self, RotateError> {
        let keys = self.ring(ring);
        let at = keys.iter().position(|key| key.id == id).ok_or(RotateError::Unknown(ring, id))?;
        if keys[at].origin() == Origin::Configured {
            return Err(RotateError::Configured);
        }
        if at == 0 {
            return Err(RotateError::Newest(ring));
        }
        let mut document = self.clone();
        document.ring_mut(ring).remove(at);
        Ok(document.revised(self, now))
    }

    /// The next step of every rotation that may take one; `None` if none may.
    pub(super) fn advance(&self, seen: &Seen, now: u64) -> Option<Self> {
        let mut document = self.clone();
        for ring in Ring::ALL {
            document.promote(ring, seen, now);
            document.ring_mut(ring).retain(|key| !has_left(ring, key, seen, now));
        }
        (document != *self).then(|| document.revised(self, now))
    }

    fn promote(&mut self, ring: Ring, seen: &Seen, now: u64) {
        let keys = self.ring_mut(ring);
        let Some(at) = keys.iter().position(|key| key.stage == Stage::Next) else {
            return;
        };
        let revision = keys[at].revision;
        let known_to_all = seen.relays_are_known && seen.relays.iter().all(|relay| *relay >= revision);
        if !known_to_all && elapsed(keys[at].since, now) < PATIENCE {
            return;
        }
        if let Some(newest) = keys.first_mut() {
            // A secret given by an operator is used by apps that make credentials of whatever life.
            newest.stage = if newest.origin() == Origin::Made { Stage::Retiring } else { Stage::Live };
            newest.since = now;
        }
        let mut next = keys.remove(at);
        next.stage = Stage::Live;
        next.since = now;
        keys.insert(0, next);
    }

    /// Whether somebody has to look again soon: a key is being made known.
    pub(super) fn is_rotating(&self) -> bool {
        Ring::ALL.iter().any(|ring| self.ring(*ring).iter().any(|key| key.stage == Stage::Next))
    }

    /// Whether TURN REST secrets wait to leave.
    pub(super) fn retires_secrets(&self) -> bool {
        self.ring(Ring::Rest).iter().any(|key| key.stage == Stage::Retiring)
    }

    /// Whether a key would leave now if no stored record needed it: then they have to be looked at.
    pub(super) fn waits_for_records(&self, longest_credential: Option<&BTreeMap<u8, Duration>>, now: u64) -> bool {
        [Ring::Rest, Ring::Record].into_iter().any(|ring| {
            self.ring(ring).iter().any(|key| {
                let life = life(ring, key, longest_credential).unwrap_or(RECORD_LIFE);
                key.stage == Stage::Retiring && elapsed(key.since, now) >= life
            })
        })
    }

    /// Every key, without its secret.
    pub(super) fn keys(&self, longest_credential: &BTreeMap<u8, Duration>) -> Vec<KeyInfo> {
        let mut infos = Vec::new();
        for ring in Ring::ALL {
            for (at, key) in self.ring(ring).iter().enumerate() {
                let state = match key.stage {
                    Stage::Next => KeyState::Next,
                    Stage::Live if at == 0 => KeyState::Newest,
                    Stage::Live => KeyState::Accepted,
                    Stage::Retiring => KeyState::Retiring,
                };
                let leaves_at = life(ring, key, Some(longest_credential)).filter(|_| state == KeyState::Retiring);
                let leaves_at = leaves_at.map(|life| key.since.saturating_add(ms(life)));
                infos.push(KeyInfo {
                    ring,
                    id: key.id,
                    state,
                    origin: key.origin(),
                    created_at: key.created_at,
                    since: key.since,
                    leaves_at,
                });
            }
        }
        infos
    }
}

/// How long a retiring key stays for what was made with it; `None` if that is not a matter of time, or not looked up.
fn life(ring: Ring, key: &StoredKey, longest_credential: Option<&BTreeMap<u8, Duration>>) -> Option<Duration> {
    match ring {
        Ring::Nonce => Some(NONCE_LIFE),
        Ring::Rest => {
            // Only this version and later ones say when they made a key, and note what they make with it.
            let unnoted = if key.created_at == 0 { UNKNOWN_CREDENTIAL } else { Duration::ZERO };
            let longest = longest_credential?.get(&key.id).copied().unwrap_or_default();
            Some(longest.max(unnoted) + CREDENTIAL_MARGIN)
        }
        Ring::Record => None,
    }
}

/// Whether nothing that was made with a key can matter any more.
fn has_left(ring: Ring, key: &StoredKey, seen: &Seen, now: u64) -> bool {
    if key.stage != Stage::Retiring {
        return false;
    }
    let age = elapsed(key.since, now);
    let life = life(ring, key, seen.longest_credential.as_ref());
    match ring {
        Ring::Nonce => return life.is_some_and(|life| age >= life),
        Ring::Rest => {
            let (Some(life), Some(records)) = (life, &seen.records) else { return false };
            // A call outlasts its credentials, and refreshes with their secret: those of every allocation that is left
            // were made with a newer one.
            let last = key.since.saturating_add(ms(life));
            return age >= life && records.earliest_credential.is_none_or(|expired| expired > last);
        }
        Ring::Record => {}
    }
    // Relays seal everything anew when they hear of a newer key. What is sealed with this one is of a relay that is
    // gone: its records are restored by a successor, or swept when they have expired.
    let heard =
        seen.relays_are_known && seen.relays.iter().all(|relay| *relay >= key.revision || (*relay == 0 && age >= MUTE));
    age >= RECORD_LIFE && heard && seen.records.as_ref().is_some_and(|records| !records.seals.contains(&key.id))
}

fn elapsed(since: u64, now: u64) -> Duration {
    Duration::from_millis(now.saturating_sub(since))
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
