//! The long-term credential mechanism (RFC 8489 §9.2.4), in its order; third-party authorization (RFC 7635 §7) within.

use std::borrow::Cow;
use std::cell::Cell;
use std::hint::black_box;
use std::sync::Arc;

use super::Server;
use super::known::KnownKey;
use super::reply::Request;
use super::table::Allocation;
use crate::credential::{self, RestPassword};
use crate::key::userhash;
use crate::nonce::SecurityFeatures;
use crate::wire::attribute::{self, AccessToken, Nonce, Realm, Userhash, Username};
use crate::wire::{AttributeType, Integrity, Message, Method, PreparedKey};
use crate::{IntegrityKey, PasswordAlgorithm, Session, third_party};

/// RFC 8489 §14.3: fewer than 509 bytes.
const MAX_USERNAME: usize = 508;
/// RFC 8489 §14.9 and §14.10: 127 characters, 763 bytes of which must be read.
const MAX_TEXT: usize = 763;
/// RFC 8489 §14.6: no truncated value where the usage does not allow it, as RFC 8656 does not.
const WHOLE_SHA256: usize = 32;

/// Bytes of a session key that coturn uses.
const COTURN_SESSION_KEY: usize = 16;

/// Who made an authenticated request.
pub(super) struct User<'a> {
    /// The name, opaque: USERNAME, the one behind USERHASH, or what an allocation by an access token is known by.
    pub(super) name: &'a [u8],
    /// What answers are signed with.
    pub(super) key: IntegrityKey,
    /// `key`, prepared; of users whose key is kept.
    pub(super) prepared: Option<&'a PreparedKey>,
    /// What an access token grants, if that is how the user was authenticated.
    pub(super) session: Option<Session>,
}

/// What [`User`] borrows from.
pub(super) struct Identity<'a> {
    name: Cow<'a, [u8]>,
    key: IntegrityKey,
    /// For the attribute that the message was made with.
    prepared: Option<PreparedKey>,
    /// The key was derived from a secret for this request.
    derived: bool,
    session: Option<Session>,
}

impl Identity<'_> {
    /// The same, if the message was made with the session key (RFC 7635 §7).
    ///
    /// coturn's server and client take the first 16 bytes of any session key for HMAC-SHA1, so that is tried too: it
    /// is as secret, and long enough.
    fn proved(mut self, message: &Message<'_>, integrity: Integrity) -> Option<Self> {
        let session = self.session.as_mut()?;
        let keys = [session.key, session.key.beginning(COTURN_SESSION_KEY)];
        session.key = keys.into_iter().find(|key| black_box(key.with(integrity).verifies(message)))?;
        self.key = session.key;
        is_whole(message, integrity).then_some(self)
    }

    pub(super) fn user(&self) -> User<'_> {
        let prepared = self.prepared.as_ref().filter(|prepared| prepared.integrity() == self.key.integrity());
        User { name: &self.name, key: self.key, prepared, session: self.session }
    }
}

/// Why a request is not served.
pub(super) enum Refusal {
    /// 401, with REALM and a fresh NONCE.
    Unauthenticated,
    /// 400, bare.
    BadRequest,
    /// 438, with REALM and a fresh NONCE. The user is known, so it is signed.
    StaleNonce(IntegrityKey),
    /// Silence: this member may know too little to judge (promise P5).
    NotYet,
}

/// How a request wants to be proved.
struct Attempt<'a> {
    message: &'a Message<'a>,
    integrity: Integrity,
    algorithm: PasswordAlgorithm,
    known: Option<KnownKey>,
}

/// How the password was hashed and how the answer is signed.
#[derive(Clone, Copy)]
struct Algorithm {
    password: PasswordAlgorithm,
    answer: Integrity,
}

impl Server {
    /// Whether requests can be judged: otherwise silence, because any answer might be wrong (promise P5).
    pub(super) fn can_authenticate(&self) -> bool {
        let settings = &self.settings;
        let users = !settings.rest_secrets.0.is_empty()
            || !settings.static_users.is_empty()
            || settings.third_party.as_ref().is_some_and(|third_party| !third_party.keys.is_empty());
        users && !settings.realm.is_empty() && !settings.nonce_keys.0.is_empty()
    }

    /// The checks of RFC 8489 §9.2.4. An unknown user costs the same work as a wrong password and gets the same answer.
    pub(super) fn authenticate<'a>(&mut self, request: &Request<'a>) -> Result<Identity<'a>, Refusal> {
        let settings = Arc::clone(&self.settings);
        let message = &request.message;
        let sha256 = settings.features.sha256;
        let integrity = if sha256 && message.contains(AttributeType::MESSAGE_INTEGRITY_SHA256) {
            Integrity::Sha256
        } else if message.contains(AttributeType::MESSAGE_INTEGRITY) {
            Integrity::Sha1
        } else {
            return Err(Refusal::Unauthenticated);
        };

        let bad = |_| Refusal::BadRequest;
        let username: Option<Username<'a>> = message.attribute().map_err(bad)?;
        let hash: Option<Userhash> = if sha256 { message.attribute().map_err(bad)? } else { None };
        let (Ok(Some(Realm(realm))), Ok(Some(Nonce(nonce)))) = (message.attribute(), message.attribute()) else {
            return Err(Refusal::BadRequest);
        };
        let names_somebody = username.is_some() || hash.is_some();
        let long_name = username.is_some_and(|Username(name)| name.len() > MAX_USERNAME);
        if !names_somebody || long_name || realm.len() > MAX_TEXT || nonce.len() > MAX_TEXT {
            return Err(Refusal::BadRequest);
        }
        let algorithm = algorithm(message, nonce, sha256)?;

        let known = username.and_then(|Username(name)| self.known.find(name, algorithm.password, integrity).cloned());
        let attempt = Attempt { message, integrity, algorithm: algorithm.password, known };
        let held = self.meant(request).map(|slot| self.table.get(slot));
        let found = match username {
            Some(Username(name)) => match self.by_token(request, name, held) {
                Some(bearer) => bearer.and_then(|bearer| bearer.proved(message, integrity)),
                None => self.by_password(request, Some(name.into()), held, attempt),
            },
            None => {
                let name = hash.and_then(|Userhash(hash)| self.name_of(&hash, held)).map(|name| name.to_vec().into());
                self.by_password(request, name, held, attempt)
            }
        };
        // The realm is looked at last: what is tried does not depend on it.
        let Some(mut identity) = found.filter(|_| realm == settings.realm.as_bytes()) else {
            return Err(Refusal::Unauthenticated);
        };
        let proved_by = identity.key;
        // RFC 7635 §7: the session key is for whatever the client uses it for.
        identity.key = identity.key.with(if identity.session.is_some() { integrity } else { algorithm.answer });
        if self.may_be_of_newer_keys(request, nonce) {
            return Err(Refusal::NotYet);
        }
        if !self.is_fresh(request, nonce) {
            return Err(Refusal::StaleNonce(identity.key));
        }
        if identity.derived {
            self.known.keep(&identity.name, algorithm.password, proved_by);
        }
        Ok(identity)
    }

    /// The name behind a USERHASH: of a user with a fixed password, or of whoever holds the allocation. Others of TURN
    /// REST cannot be found.
    fn name_of<'s>(&'s self, hash: &[u8; 32], held: Option<&'s Allocation>) -> Option<&'s [u8]> {
        let listed = self.directory.name_of(hash);
        listed.or_else(|| {
            let name = &*held?.username;
            (userhash(name, self.settings.realm.as_bytes()) == *hash).then_some(name)
        })
    }

    /// Tries the key that is known of this name, if any, and every one that it can have with its password. A missing name
    /// has none.
    ///
    /// What fails costs as much for a name that is known as for one that is not: the same derivations, and one message
    /// more to verify, by nobody's key where there is no known one. That a name was found shows in nothing but the time of
    /// the lookup, some tens of nanoseconds.
    fn by_password<'a>(
        &self,
        request: &Request<'a>,
        name: Option<Cow<'a, [u8]>>,
        held: Option<&Allocation>,
        attempt: Attempt<'_>,
    ) -> Option<Identity<'a>> {
        let settings = &*self.settings;
        let Attempt { message, integrity, algorithm, known } = attempt;
        let tried = Cell::new(false);
        let try_key = |key: IntegrityKey| {
            tried.set(true);
            let key = key.with(integrity);
            black_box(key.verifies(message)).then_some(key)
        };
        let (mut matching, mut prepared, mut derived) = (None, None, false);
        if let Some(name) = &name {
            let name: &[u8] = name;
            // A ConnectionBind claims what its user's allocation has, on a five-tuple of its own (RFC 6062 §4.3).
            let holder = message.method() == Method::ConnectionBind || held.is_some_and(|held| *held.username == *name);
            let unix_seconds = request.now.wall / 1000;
            let live = holder || credential::expires_at(name).is_some_and(|end| end > unix_seconds);
            let known = known.filter(|_| live).unwrap_or_else(|| self.known.nobody(integrity));
            if black_box(message.verify_prepared(&known.prepared)) {
                (matching, prepared) = (Some(known.key), Some(known.prepared));
            }
            if matching.is_none() {
                for user in self.directory.by_name(name) {
                    matching = try_key(user.key(algorithm)).or(matching);
                }
            }
            let realm = settings.realm.as_bytes();
            let of_password =
                |password: RestPassword| try_key(IntegrityKey::long_term(algorithm, name, realm, password.as_bytes()));
            if matching.is_none() {
                matching = if holder {
                    credential::rest_passwords_of_holder(settings, name).find_map(of_password)
                } else {
                    credential::rest_passwords(settings, name, unix_seconds).find_map(of_password)
                };
                derived = matching.is_some();
            }
        }
        if matching.is_none() && !tried.get() {
            // As much work as a wrong password.
            try_key(self.known.nobody(integrity).key);
        }
        let key = matching.filter(|_| is_whole(message, integrity))?;
        Some(Identity { name: name?, key, prepared, derived, session: None })
    }

    /// Third-party authorization (RFC 7635 §7): `None` if the request is not of that kind; `Some(None)` if it is, and
    /// its token does not open; else who it would be, if its integrity is of the session key.
    ///
    /// Only Allocate and Refresh bring a token (RFC 7635 §9); other requests use the key of the one before. A
    /// ConnectionBind, on a connection of its own, has none before it and may bring one too. The token that refreshes an
    /// allocation may be another one, under another kid: keys of authorization servers are replaced too.
    fn by_token<'a>(
        &self,
        request: &Request<'a>,
        kid: &'a [u8],
        held: Option<&Allocation>,
    ) -> Option<Option<Identity<'a>>> {
        let third_party = self.settings.third_party.as_ref()?;
        let held = held.filter(|held| held.session().is_some());
        let brings_one =
            matches!(request.message.method(), Method::Allocate | Method::Refresh | Method::ConnectionBind);
        let session = match request.message.attribute() {
            Ok(Some(AccessToken(token))) if brings_one => third_party.open(kid, token, request.now.wall),
            _ => {
                let held =
                    held.filter(|held| third_party.knows(kid) || third_party::kid_of(&held.username) == Some(kid))?;
                held.session().filter(|session| session.expires_at > request.now.wall)
            }
        };
        Some(session.map(|session| {
            let name = held.map_or_else(|| third_party::allocation_name(kid, &session), |held| held.username.to_vec());
            Identity { name: name.into(), key: session.key, prepared: None, derived: false, session: Some(session) }
        }))
    }
}

/// RFC 8489 §14.6, see [`WHOLE_SHA256`].
fn is_whole(message: &Message<'_>, integrity: Integrity) -> bool {
    integrity == Integrity::Sha1
        || message.range(AttributeType::MESSAGE_INTEGRITY_SHA256).is_some_and(|range| range.len() == WHOLE_SHA256)
}

/// What PASSWORD-ALGORITHM and PASSWORD-ALGORITHMS say (RFC 8489 §9.2.4): a client that was offered algorithms repeats
/// the offer, so that one that was tampered with shows.
fn algorithm(message: &Message<'_>, nonce: &[u8], sha256: bool) -> Result<Algorithm, Refusal> {
    const UNASKED: Algorithm = Algorithm { password: PasswordAlgorithm::Md5, answer: Integrity::Sha1 };
    let offered = message.attribute().ok().flatten().map(|attribute::PasswordAlgorithms(value)| value);
    let chosen = message.attribute().ok().flatten().map(|attribute::PasswordAlgorithm(value)| value);
    if offered.is_none() && chosen.is_none() {
        return Ok(UNASKED);
    }
    let protected = SecurityFeatures::of(nonce).is_some_and(|features| features.password_algorithms);
    let password = match (sha256, protected, chosen) {
        // Nothing was offered here, so what is repeated cannot match; without the bit both are unknown.
        (false, true, _) => return Err(Refusal::BadRequest),
        (false, false, _) => return Ok(UNASKED),
        (true, true, _) if offered != Some(&PasswordAlgorithm::OFFERED[..]) => return Err(Refusal::BadRequest),
        (true, true, None) => return Err(Refusal::BadRequest),
        // A nonce without the bit, or none of ours: nothing to check against, and PASSWORD-ALGORITHM means what it says.
        (true, false, None) => return Ok(UNASKED),
        (true, _, Some(chosen)) => PasswordAlgorithm::from_value(chosen).ok_or(Refusal::BadRequest)?,
    };
    Ok(Algorithm { password, answer: Integrity::Sha256 })
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "third_party_tests.rs"]
mod third_party_tests;
