//! Credentials: TURN REST (time-limited, from a shared secret) and static; minted by the controller, verified by relays.
//!
//! Names and passwords are opaque bytes. The OpaqueString profile (RFC 8265) is not applied: both ends of TURN REST are
//! given the finished string, and static ones are compared as configured.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use md5::{Digest, Md5};
use sha1::Sha1;
use sha2::Sha256;

use crate::{Key, Settings};

/// Username and password made out to a user for a time.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Minted {
    /// `<Unix seconds of expiry>:<user>`.
    pub username: Vec<u8>,
    /// base64(HMAC(secret, username)).
    pub password: String,
}

/// The 16-byte long-term key MD5(username ":" realm ":" password) (RFC 8489 §9.2.2).
pub type LongTermKey = [u8; 16];

/// Length of base64 of an HMAC-SHA256, the longer of the two.
const MAX_PASSWORD: usize = 44;

/// The HMAC of a TURN REST password.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum RestHash {
    /// As draft-uberti-behave-turn-rest has it, and every server.
    Sha1,
    /// The same with the stronger hash; relays take both.
    Sha256,
}

/// Makes TURN REST credentials that expire at `expires_at` (Unix seconds), with HMAC-SHA1: every TURN server that knows
/// the secret takes them.
pub fn mint(secret: &Key, user: &[u8], expires_at: u64) -> Minted {
    mint_with(RestHash::Sha1, secret, user, expires_at)
}

/// As [`mint`] with HMAC-SHA256, which relays with SHA-256 switched on take too.
pub fn mint_sha256(secret: &Key, user: &[u8], expires_at: u64) -> Minted {
    mint_with(RestHash::Sha256, secret, user, expires_at)
}

fn mint_with(hash: RestHash, secret: &Key, user: &[u8], expires_at: u64) -> Minted {
    let username = [expires_at.to_string().as_bytes(), b":", user].concat();
    let password = String::from_utf8_lossy(RestPassword::new(hash, secret, &username).as_bytes()).into_owned();
    Minted { username, password }
}

/// The part of a user name that quota and ledger count: behind the colon of an ephemeral name, else all of it.
pub fn quota_key(username: &[u8]) -> &[u8] {
    ephemeral(username).map_or(username, |(_, user)| user)
}

/// When the credentials of a TURN REST name expire, in Unix seconds; `None` of a name that is none, or never expires.
pub fn expires_at(username: &[u8]) -> Option<u64> {
    ephemeral(username).and_then(|(digits, _)| decimal(digits))
}

/// Long-term key of a name and a password.
pub fn long_term_key(username: &[u8], realm: &str, password: &[u8]) -> LongTermKey {
    let mut hash = Md5::new();
    for part in [username, b":", realm.as_bytes(), b":", password] {
        hash.update(part);
    }
    hash.finalize().into()
}

/// Every TURN REST password that this name can have now, most likely ones first: of each live secret with HMAC-SHA1,
/// then, where SHA-256 is on, of each with HMAC-SHA256. None for an expired, overflowing or malformed name: the caller
/// answers as for a wrong password.
pub fn rest_passwords<'a>(
    settings: &'a Settings,
    username: &'a [u8],
    unix_seconds: u64,
) -> impl Iterator<Item = RestPassword> + 'a {
    passwords(settings, username, move |expires_at| expires_at > unix_seconds)
}

/// As [`rest_passwords`], whether the name has expired or not: for requests on an allocation that this very name made,
/// so that a call may last longer than its credentials. A secret that left the ring ends them all the same.
pub fn rest_passwords_of_holder<'a>(
    settings: &'a Settings,
    username: &'a [u8],
) -> impl Iterator<Item = RestPassword> + 'a {
    passwords(settings, username, |_| true)
}

fn passwords<'a>(
    settings: &'a Settings,
    username: &'a [u8],
    live: impl Fn(u64) -> bool,
) -> impl Iterator<Item = RestPassword> + 'a {
    let is_live = ephemeral(username).and_then(|(digits, _)| decimal(digits)).is_some_and(live);
    let hashes: &[RestHash] = match (is_live, settings.features.sha256) {
        (false, _) => &[],
        (true, false) => &[RestHash::Sha1],
        (true, true) => &[RestHash::Sha1, RestHash::Sha256],
    };
    let secrets = &settings.rest_secrets.0;
    hashes.iter().flat_map(move |hash| secrets.iter().map(|secret| RestPassword::new(*hash, secret, username)))
}

/// A TURN REST password: base64(HMAC(secret, username)).
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct RestPassword {
    bytes: [u8; MAX_PASSWORD],
    len: usize,
}

impl std::fmt::Debug for RestPassword {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RestPassword")
    }
}

impl RestPassword {
    fn new(hash: RestHash, secret: &Key, username: &[u8]) -> Self {
        let mut bytes = [0; MAX_PASSWORD];
        let len = match hash {
            RestHash::Sha1 => encoded_mac::<Hmac<Sha1>>(secret, username, &mut bytes),
            RestHash::Sha256 => encoded_mac::<Hmac<Sha256>>(secret, username, &mut bytes),
        };
        Self { bytes, len }
    }

    /// The characters.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn encoded_mac<M: Mac + KeyInit>(secret: &Key, username: &[u8], out: &mut [u8; MAX_PASSWORD]) -> usize {
    let mut mac = <M as KeyInit>::new_from_slice(&secret.secret).expect("HMAC takes a key of any length");
    mac.update(username);
    STANDARD.encode_slice(mac.finalize().into_bytes(), out).expect("32 bytes are 44 characters")
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
    use crate::KeyRing;

    const NOW: u64 = 1_700_000_000;

    fn key(id: u8, secret: &[u8]) -> Key {
        Key { id, secret: secret.to_vec() }
    }

    fn settings() -> Settings {
        Settings {
            realm: "turnpike".to_owned(),
            rest_secrets: KeyRing(vec![key(2, b"new"), key(1, b"old")]),
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
    fn minted_with_sha256() {
        // printf 1700000000:alice | openssl dgst -sha256 -hmac north -binary | base64
        let minted = mint_sha256(&key(1, b"north"), b"alice", NOW);
        assert_eq!(minted.username, b"1700000000:alice");
        assert_eq!(minted.password, "EuME0Xh0HllnbpbObfs8aBsd78Vr1EMwxArqbyCrGl8=");
    }

    #[test]
    fn every_live_secret_verifies_by_either_hash() {
        let settings = settings();
        let knows = |settings: &Settings, minted: &Minted| {
            rest_passwords(settings, &minted.username, NOW)
                .any(|password| password.as_bytes() == minted.password.as_bytes())
        };
        for secret in &settings.rest_secrets.0 {
            assert!(knows(&settings, &mint(secret, b"bob", NOW + 1)));
            assert!(knows(&settings, &mint_sha256(secret, b"bob", NOW + 1)));
        }
        assert!(!knows(&settings, &mint(&key(3, b"gone"), b"bob", NOW + 1)));
        let mut without = settings;
        without.features.sha256 = false;
        assert!(knows(&without, &mint(&key(2, b"new"), b"bob", NOW + 1)));
        assert!(!knows(&without, &mint_sha256(&key(2, b"new"), b"bob", NOW + 1)));
    }

    #[test]
    fn which_names_have_passwords() {
        // abuse.md C: expired, overflowing, negative, absent REST time. Two secrets, two hashes.
        let cases: &[(&str, &[u8], usize)] = &[
            ("plain", b"alice", 0),
            ("empty", b"", 0),
            ("ends later", b"1700000001:bob", 4),
            ("ends now", b"1700000000:bob", 0),
            ("ended", b"1699999999:bob", 0),
            ("the last second there is", b"18446744073709551615:bob", 4),
            ("overflows", b"18446744073709551616:bob", 0),
            ("overflows by far", &[b'9'; 500], 0),
            ("overflows by far, colon", b"99999999999999999999999999999999:bob", 0),
            ("negative", b"-1700000001:bob", 0),
            ("plus", b"+1700000001:bob", 0),
            ("space", b" 1700000001:bob", 0),
            ("hexadecimal", b"0x7FFFFFFF:bob", 0),
            ("no time", b":bob", 0),
            ("no colon", b"1700000001", 0),
            ("no user", b"1700000001:", 4),
            ("user first", b"bob:1700000001", 0),
            ("user of any bytes", b"1700000001:\0%/\n\xFF", 4),
        ];
        for (what, username, expected) in cases {
            assert_eq!(rest_passwords(&settings(), username, NOW).count(), *expected, "{what}");
        }
    }

    #[test]
    fn the_holder_of_an_allocation_outlives_the_time() {
        assert_eq!(rest_passwords_of_holder(&settings(), b"1:bob").count(), 4);
        assert_eq!(rest_passwords_of_holder(&settings(), b"bob").count(), 0);
        let mut without = settings();
        without.rest_secrets.0.clear();
        assert_eq!(rest_passwords_of_holder(&without, b"1:bob").count(), 0);
    }

    #[test]
    fn expiry_is_in_the_name() {
        let cases: &[(&[u8], Option<u64>)] =
            &[(b"1700000000:alice", Some(NOW)), (b"alice", None), (b"18446744073709551616:bob", None)];
        for (username, expected) in cases {
            assert_eq!(expires_at(username), *expected);
        }
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
