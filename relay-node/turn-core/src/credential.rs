//! Credentials: TURN REST (time-limited, from a shared secret) and static; minted by the controller, verified by relays.
//!
//! Names and passwords are opaque bytes. The OpaqueString profile (RFC 8265) is not applied: both ends of TURN REST are
//! given the finished string, and static ones are compared as configured.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use md5::{Digest, Md5};
use sha1::Sha1;
use smallvec::SmallVec;
use subtle::ConstantTimeEq;

use crate::{Key, Settings};

/// Username and password made out to a user for a time.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Minted {
    /// `<Unix seconds of expiry>:<user>`.
    pub username: Vec<u8>,
    /// base64(HMAC-SHA1(secret, username)).
    pub password: String,
}

/// The 16-byte long-term key MD5(username ":" realm ":" password) (RFC 8489 §9.2.2).
pub type LongTermKey = [u8; 16];

/// Length of base64 of an HMAC-SHA1.
const PASSWORD_LEN: usize = 28;

/// Makes TURN REST credentials that expire at `expires_at` (Unix seconds).
pub fn mint(secret: &Key, user: &[u8], expires_at: u64) -> Minted {
    let username = [expires_at.to_string().as_bytes(), b":", user].concat();
    let password = String::from_utf8_lossy(&password(secret, &username)).into_owned();
    Minted { username, password }
}

/// The part of a user name that quota and ledger count: behind the colon of an ephemeral name, else all of it.
pub fn quota_key(username: &[u8]) -> &[u8] {
    ephemeral(username).map_or(username, |(_, user)| user)
}

/// Long-term key of a name and a password.
pub fn long_term_key(username: &[u8], realm: &str, password: &[u8]) -> LongTermKey {
    let mut hash = Md5::new();
    for part in [username, b":", realm.as_bytes(), b":", password] {
        hash.update(part);
    }
    hash.finalize().into()
}

/// Every key that would authenticate this user name now (one per live secret, or the static one). Empty for an
/// unknown, expired, overflowing or malformed name: the caller answers as for a wrong password.
pub fn candidate_keys(settings: &Settings, username: &[u8], unix_seconds: u64) -> SmallVec<[LongTermKey; 2]> {
    keys(settings, username, |expires_at| expires_at > unix_seconds)
}

/// As [`candidate_keys`], whether the name has expired or not: for requests on an allocation that this very name made,
/// so that a call may last longer than its credentials. A secret that left the ring ends them all the same.
pub fn candidate_keys_of_holder(settings: &Settings, username: &[u8]) -> SmallVec<[LongTermKey; 2]> {
    keys(settings, username, |_| true)
}

fn keys(settings: &Settings, username: &[u8], live: impl Fn(u64) -> bool) -> SmallVec<[LongTermKey; 2]> {
    let mut keys = SmallVec::new();
    // No early end: how long this takes does not tell which of the names exists.
    for user in &settings.static_users {
        if user.username.ct_eq(username).into() {
            keys.push(long_term_key(username, &settings.realm, &user.password));
        }
    }
    if ephemeral(username).and_then(|(digits, _)| decimal(digits)).is_some_and(live) {
        for secret in &settings.rest_secrets.0 {
            keys.push(long_term_key(username, &settings.realm, &password(secret, username)));
        }
    }
    keys
}

fn password(secret: &Key, username: &[u8]) -> [u8; PASSWORD_LEN] {
    let mut mac = Hmac::<Sha1>::new_from_slice(&secret.secret).expect("HMAC takes a key of any length");
    mac.update(username);
    let mut password = [0; PASSWORD_LEN];
    STANDARD.encode_slice(mac.finalize().into_bytes(), &mut password).expect("20 bytes are 28 characters");
    password
}

/// Parts `<digits>:<user>`.
fn ephemeral(username: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = username.iter().position(|byte| *byte == b':')?;
    let (digits, user) = (&username[..colon], &username[colon + 1..]);
    (colon > 0 && digits.iter().all(u8::is_ascii_digit)).then_some((digits, user))
}

/// The number, unless it overflows.
fn decimal(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |value, digit| value.checked_mul(10)?.checked_add(u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KeyRing, StaticUser};

    const NOW: u64 = 1_700_000_000;

    fn key(id: u8, secret: &[u8]) -> Key {
        Key { id, secret: secret.to_vec() }
    }

    fn settings() -> Settings {
        let static_user = StaticUser { username: b"alice".to_vec(), password: b"s3cret".to_vec() };
        Settings {
            realm: "turnpike".to_owned(),
            rest_secrets: KeyRing(vec![key(2, b"new"), key(1, b"old")]),
            static_users: vec![static_user],
            ..Settings::default()
        }
    }

    #[test]
    fn long_term_key_is_that_of_rfc_8489_9_2_2() {
        let expected = [0x84, 0x93, 0xfb, 0xc5, 0x3b, 0xa5, 0x82, 0xfb, 0x4c, 0x04, 0x4c, 0x45, 0x6b, 0xdc, 0x40, 0xeb];
        assert_eq!(long_term_key(b"user", "realm", b"pass"), expected);
    }

    #[test]
    fn minted_as_coturn_does() {
        // printf 1700000000:alice | openssl dgst -sha1 -hmac north -binary | base64
        let minted = mint(&key(1, b"north"), b"alice", NOW);
        assert_eq!(minted.username, b"1700000000:alice");
        assert_eq!(minted.password, "Cd/49soE35ICqcJF/bCTn8Z4OyE=");
    }

    #[test]
    fn every_live_secret_verifies() {
        let settings = settings();
        for secret in &settings.rest_secrets.0 {
            let minted = mint(secret, b"bob", NOW + 1);
            let expected = long_term_key(&minted.username, "turnpike", minted.password.as_bytes());
            assert!(candidate_keys(&settings, &minted.username, NOW).contains(&expected));
        }
        let gone = mint(&key(3, b"gone"), b"bob", NOW + 1);
        let wrong = long_term_key(&gone.username, "turnpike", gone.password.as_bytes());
        assert!(!candidate_keys(&settings, &gone.username, NOW).contains(&wrong));
    }

    #[test]
    fn which_names_have_keys() {
        // abuse.md C: expired, overflowing, negative, absent REST time.
        let cases: &[(&str, &[u8], usize)] = &[
            ("static", b"alice", 1),
            ("unknown", b"mallory", 0),
            ("empty", b"", 0),
            ("ends later", b"1700000001:bob", 2),
            ("ends now", b"1700000000:bob", 0),
            ("ended", b"1699999999:bob", 0),
            ("the last second there is", b"18446744073709551615:bob", 2),
            ("overflows", b"18446744073709551616:bob", 0),
            ("overflows by far", &[b'9'; 500], 0),
            ("overflows by far, colon", b"99999999999999999999999999999999:bob", 0),
            ("negative", b"-1700000001:bob", 0),
            ("plus", b"+1700000001:bob", 0),
            ("space", b" 1700000001:bob", 0),
            ("hexadecimal", b"0x7FFFFFFF:bob", 0),
            ("no time", b":bob", 0),
            ("no colon", b"1700000001", 0),
            ("no user", b"1700000001:", 2),
            ("user first", b"bob:1700000001", 0),
            ("user of any bytes", b"1700000001:\0%/\n\xFF", 2),
        ];
        for (what, username, expected) in cases {
            assert_eq!(candidate_keys(&settings(), username, NOW).len(), *expected, "{what}");
        }
    }

    #[test]
    fn the_holder_of_an_allocation_outlives_the_time() {
        assert_eq!(candidate_keys_of_holder(&settings(), b"1:bob").len(), 2);
        assert_eq!(candidate_keys_of_holder(&settings(), b"bob").len(), 0);
        let mut without = settings();
        without.rest_secrets.0.clear();
        assert_eq!(candidate_keys_of_holder(&without, b"1:bob").len(), 0);
    }

    #[test]
    fn quota_counts_the_user() {
        let cases: &[(&[u8], &[u8])] = &[
            (b"1700000000:alice", b"alice"),
            (b"1700000000:a:b", b"a:b"),
            (b"1700000000:", b""),
            (b"alice", b"alice"),
            (b"a1:alice", b"a1:alice"),
            (b":alice", b":alice"),
        ];
        for (username, expected) in cases {
            assert_eq!(quota_key(username), *expected);
        }
    }
}
