//! The long-term credential mechanism (RFC 8489 §9.2.4), and TURN REST names.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use turn_core::FiveTuple;

use super::super::stun::{self, MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256, NONCE, REALM, Read, USERHASH, USERNAME};
use super::{Answer, Model, Signature, error};

/// A user with a password.
#[derive(Clone, Debug)]
pub struct StaticUser {
    pub name: Vec<u8>,
    pub password: Vec<u8>,
}

/// A TURN REST secret.
#[derive(Clone, Debug)]
pub struct RestSecret(pub Vec<u8>);

/// Who has asked.
pub(super) struct Who {
    pub(super) name: Vec<u8>,
    /// What the answer is signed with.
    pub(super) signature: Signature,
}

const MD5: [u8; 4] = [0, 1, 0, 0];
const SHA256: [u8; 4] = [0, 2, 0, 0];

impl Model {
    pub(super) fn authenticate(&mut self, from: &FiveTuple, message: &Read) -> Result<Who, Answer> {
        let has_sha1 = message.has(MESSAGE_INTEGRITY);
        let has_sha256 = message.has(MESSAGE_INTEGRITY_SHA256) && self.offer.is_some();
        if !has_sha1 && !has_sha256 {
            return Err(self.challenge(401, Signature::None, message));
        }
        let username = message.find(USERNAME).map(<[u8]>::to_vec);
        let userhash = message.find(USERHASH).filter(|_| self.offer.is_some()).map(<[u8]>::to_vec);
        let (Some(realm), Some(nonce)) = (message.find(REALM), message.find(NONCE)) else {
            return Err(error(400, Signature::None, message));
        };

        // RFC 8489 §14.4: 32 bytes.
        if userhash.as_ref().is_some_and(|hash| hash.len() != 32) || (username.is_none() && userhash.is_none()) {
            return Err(error(400, Signature::None, message));
        }
        // abuse.md B.
        let too_long = |value: &[u8], most| value.len() > most;
        if username.as_ref().is_some_and(|name| too_long(name, 508)) || too_long(realm, 763) || too_long(nonce, 763) {
            return Err(error(400, Signature::None, message));
        }
        let algorithm = self.algorithm(nonce, message).map_err(|()| error(400, Signature::None, message))?;

        // The user: by name, or by the hash of it.
        let name = match (username, userhash) {
            (Some(name), _) => Some(name),
            (None, Some(hash)) => {
                // Those of TURN REST are known by it while they have an allocation here.
                let held = self.meant(from, message).map(|allocation| allocation.username.clone());
                let names = self.static_users.iter().map(|user| user.name.clone()).chain(held);
                names.into_iter().find(|name| stun::userhash(name, &self.realm) == hash)
            }
            (None, None) => None,
        };
        let Some(name) = name.filter(|_| realm == self.realm) else {
            return Err(self.challenge(401, Signature::None, message));
        };

        // RFC 6062 §4.3: a ConnectionBind has the credentials of the allocation, which may have run out since.
        let holder = message.method == stun::CONNECTION_BIND
            || self.meant(from, message).is_some_and(|allocation| allocation.username == name);
        let keys: Vec<Vec<u8>> = self
            .passwords(&name, holder)
            .iter()
            .map(|password| match algorithm {
                Some(SHA256) => stun::sha256_key(&name, &self.realm, password),
                _ => stun::md5_key(&name, &self.realm, password),
            })
            .collect();

        // RFC 8489 §14.6: no truncated value.
        let whole = message.find(MESSAGE_INTEGRITY_SHA256).is_none_or(|value| value.len() == 32);
        let verifies = |key: &Vec<u8>| {
            if has_sha256 { whole && message.signed_sha256_with(key) } else { message.signed_with(key) }
        };
        let Some(key) = keys.into_iter().find(verifies) else {
            return Err(self.challenge(401, Signature::None, message));
        };
        let signature = if algorithm.is_some() { Signature::Sha256(key) } else { Signature::Sha1(key) };
        if !self.is_fresh(nonce, from) {
            return Err(self.challenge(438, signature, message));
        }
        Ok(Who { name, signature })
    }

    /// 401 or 438: REALM, NONCE, and PASSWORD-ALGORITHMS where it is offered.
    fn challenge(&self, code: u16, signature: Signature, message: &Read) -> Answer {
        let mut answer = error(code, signature, message);
        answer.attributes.push((REALM, Some(self.realm.clone())));
        answer.attributes.push((NONCE, None));
        if let Some(offer) = &self.offer {
            answer.attributes.push((stun::PASSWORD_ALGORITHMS, Some(offer.clone())));
        }
        answer
    }

    /// RFC 8489 §9.2.4, third check: what the request chose; none is MD5 as before RFC 8489.
    fn algorithm(&self, nonce: &[u8], message: &Read) -> Result<Option<[u8; 4]>, ()> {
        let bit = nonce.starts_with(b"obMatJos2")
            && nonce.get(9..13).and_then(|bits| STANDARD.decode(bits).ok()).is_some_and(|bits| bits[0] & 0x80 != 0);
        let chosen = message.find(stun::PASSWORD_ALGORITHM);
        let listed = message.find(stun::PASSWORD_ALGORITHMS);
        match (bit, chosen, listed, &self.offer) {
            (_, None, None, _) | (false, _, _, None) | (false, None, Some(_), Some(_)) => Ok(None),
            (true, Some(chosen), Some(listed), Some(offer)) if listed == offer => known_algorithm(chosen),
            // No server that offers algorithms gave out such a nonce, so there is nothing to compare with.
            (false, Some(chosen), _, Some(_)) => known_algorithm(chosen),
            (true, ..) => Err(()),
        }
    }

    /// The passwords a name may have. Who holds the allocation goes on after the time of a TURN REST name.
    fn passwords(&self, name: &[u8], holder: bool) -> Vec<Vec<u8>> {
        let fixed = self.static_users.iter().filter(|user| user.name == name).map(|user| user.password.clone());
        let mut passwords: Vec<Vec<u8>> = fixed.collect();
        if let Some(end) = rest_end(name)
            && (end > self.unix_seconds() || holder)
        {
            for secret in &self.rest_secrets {
                passwords.push(STANDARD.encode(stun::hmac_sha1(&secret.0, name)).into_bytes());
                if self.offer.is_some() {
                    passwords.push(STANDARD.encode(stun::hmac_sha256(&secret.0, name)).into_bytes());
                }
            }
        }
        passwords
    }

    /// One that was given to this very client, not too long ago, under a key that is still there.
    fn is_fresh(&self, nonce: &[u8], from: &FiveTuple) -> bool {
        let now = self.unix_seconds();
        self.issued.iter().any(|issued| {
            issued.nonce == nonce
                && issued.client == from.client
                && now - issued.at <= self.nonce_lifetime
                && self.nonce_keys.contains(&issued.key)
        })
    }
}

fn known_algorithm(chosen: &[u8]) -> Result<Option<[u8; 4]>, ()> {
    match chosen {
        [0, 1, 0, 0] => Ok(Some(MD5)),
        [0, 2, 0, 0] => Ok(Some(SHA256)),
        _ => Err(()),
    }
}

/// The time in a TURN REST name: decimal digits, then a colon.
fn rest_end(name: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(name).into_owned();
    let (digits, _) = text.split_once(':')?;
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}
