//! Nonces that need no table (promise P9): a MAC under the cluster's key ring over the client's address and a time,
//! in the `obMatJos2` form of RFC 8489 §9.2, valid on every member.
//!
//! 41 characters: the cookie and the security features (13), then base64url of key id (1 byte), Unix time (4) and
//! MAC (16). Short, because it goes to strangers (abuse.md D).

use std::net::{IpAddr, SocketAddr};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use crate::{Key, KeyRing};

/// RFC 8489 §9.2: says that the server knows RFC 8489.
const COOKIE: &[u8; 9] = b"obMatJos2";
/// RFC 8489 §9.2: 24 security feature bits in base64, none set.
const NO_FEATURES: &[u8; 4] = b"AAAA";
const MAC_LEN: usize = 16;
const BINARY_LEN: usize = 1 + 4 + MAC_LEN;

/// A nonce, ready to be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Nonce([u8; Nonce::LEN]);

impl Nonce {
    /// Its length in bytes; all of them are `qdtext` (RFC 8489 §14.10).
    pub const LEN: usize = COOKIE.len() + NO_FEATURES.len() + BINARY_LEN.div_ceil(3) * 4;

    /// Makes a nonce for a client under the newest key; `None` without keys.
    pub fn mint(keys: &KeyRing, client: SocketAddr, unix_seconds: u64) -> Option<Self> {
        let key = keys.newest()?;
        // Wraps in 2106; `verify` compares modulo 2^32.
        let time = (unix_seconds as u32).to_be_bytes();
        let mut binary = [0; BINARY_LEN];
        binary[0] = key.id;
        binary[1..5].copy_from_slice(&time);
        binary[5..].copy_from_slice(&mac(key, time, client));
        let mut nonce = [0; Self::LEN];
        nonce[..9].copy_from_slice(COOKIE);
        nonce[9..13].copy_from_slice(NO_FEATURES);
        URL_SAFE_NO_PAD.encode_slice(binary, &mut nonce[13..]).expect("21 bytes are 28 characters");
        Some(Self(nonce))
    }

    /// The characters.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What a client's NONCE is worth.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Freshness {
    /// Minted by a member for this client, within its lifetime.
    Fresh,
    /// Anything else, also garbage: 438 with a fresh one (RFC 8489 §9.2.4).
    Stale,
}

/// Checks a NONCE from `client` (IP and port) at this Unix time. `lifetime` is in seconds.
///
/// A time ahead of this member's clock by up to `lifetime` is fresh: the member that minted it has another clock.
pub fn verify(keys: &KeyRing, nonce: &[u8], client: SocketAddr, unix_seconds: u64, lifetime: u32) -> Freshness {
    let verified = (|| {
        let encoded = nonce.strip_prefix(COOKIE)?.strip_prefix(NO_FEATURES)?;
        // Exact length first: decoding takes room for whole groups of 4.
        let encoded: &[u8; Nonce::LEN - 13] = encoded.try_into().ok()?;
        let mut binary = [0; BINARY_LEN];
        let len = URL_SAFE_NO_PAD.decode_slice(encoded, &mut binary).ok()?;
        let [id, t0, t1, t2, t3, claimed @ ..] = &binary;
        let time = [*t0, *t1, *t2, *t3];
        let key = keys.find(*id).filter(|_| len == BINARY_LEN)?;
        let authentic: bool = mac(key, time, client).ct_eq(claimed).into();
        let age = (unix_seconds as u32).wrapping_sub(u32::from_be_bytes(time)) as i32;
        (authentic && age.unsigned_abs() <= lifetime).then_some(())
    })();
    match verified {
        Some(()) => Freshness::Fresh,
        None => Freshness::Stale,
    }
}

/// Whether a NONCE has the security feature bit "Password algorithms" (RFC 8489 §18.1, bit 0), which no nonce of ours
/// has: RFC 8489 §9.2.4 wants 400 where a request then brings PASSWORD-ALGORITHM(S) that this server never offered.
pub fn claims_password_algorithms(nonce: &[u8]) -> bool {
    // Bit 0 is the highest bit of the first of 4 characters: set in the upper half of the base64 alphabet.
    nonce
        .strip_prefix(COOKIE)
        .and_then(|rest| rest.first_chunk::<4>())
        .is_some_and(|features| matches!(features[0], b'g'..=b'z' | b'0'..=b'9' | b'+' | b'/'))
}

fn mac(key: &Key, time: [u8; 4], client: SocketAddr) -> [u8; MAC_LEN] {
    let ip = match client.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut mac = Hmac::<Sha256>::new_from_slice(&key.secret).expect("HMAC takes a key of any length");
    mac.update(b"turnpike nonce");
    mac.update(&[key.id]);
    mac.update(&time);
    mac.update(&ip.octets());
    mac.update(&client.port().to_be_bytes());
    let mut short = [0; MAC_LEN];
    short.copy_from_slice(&mac.finalize().into_bytes()[..MAC_LEN]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000;
    const HOUR: u32 = 3600;

    fn ring(ids: &[u8]) -> KeyRing {
        let key = |id: &u8| Key { id: *id, secret: vec![*id; 32] };
        KeyRing(ids.iter().map(key).collect())
    }

    fn client(text: &str) -> SocketAddr {
        text.parse().expect("literal")
    }

    #[test]
    fn has_the_form_of_rfc_8489_9_2() {
        let nonce = Nonce::mint(&ring(&[1]), client("192.0.2.1:5"), NOW).expect("there is a key");
        assert!(nonce.as_bytes().starts_with(b"obMatJos2AAAA"));
        assert_eq!(nonce.as_bytes().len(), 41);
        assert!(nonce.as_bytes().iter().all(|c| c.is_ascii_alphanumeric() || b"-_".contains(c)));
        assert_eq!(Nonce::mint(&ring(&[]), client("192.0.2.1:5"), NOW), None);
    }

    #[test]
    fn who_may_use_it_and_when() {
        let hour = u64::from(HOUR);
        let (v4, v6) = ("192.0.2.1:5", "[2001:db8::1]:5");
        type Case = (&'static str, &'static str, &'static str, u64, &'static [u8], Freshness);
        let cases: &[Case] = &[
            ("at once", v4, v4, NOW, &[1], Freshness::Fresh),
            ("IPv6", v6, v6, NOW, &[1], Freshness::Fresh),
            ("the last second", v4, v4, NOW + hour, &[1], Freshness::Fresh),
            ("a second too late", v4, v4, NOW + hour + 1, &[1], Freshness::Stale),
            ("by a member ahead", v4, v4, NOW - 30, &[1], Freshness::Fresh),
            ("from the far future", v4, v4, NOW - hour - 1, &[1], Freshness::Stale),
            ("2^32 seconds later", v4, v4, NOW + (1 << 32) + hour + 1, &[1], Freshness::Stale),
            ("another port", v4, "192.0.2.1:6", NOW, &[1], Freshness::Stale),
            ("another IP", v4, "192.0.2.2:5", NOW, &[1], Freshness::Stale),
            ("retired key", v4, v4, NOW, &[2, 1], Freshness::Fresh),
            ("key gone", v4, v4, NOW, &[2], Freshness::Stale),
            ("no keys", v4, v4, NOW, &[], Freshness::Stale),
        ];
        for (what, minted_for, used_by, at, keys, expected) in cases {
            let nonce = Nonce::mint(&ring(&[1]), client(minted_for), NOW).expect("there is a key");
            let freshness = verify(&ring(keys), nonce.as_bytes(), client(used_by), *at, HOUR);
            assert_eq!(freshness, *expected, "{what}");
        }
    }

    #[test]
    fn a_key_of_the_same_id_with_another_secret_does_not_verify() {
        let nonce = Nonce::mint(&ring(&[1]), client("192.0.2.1:5"), NOW).expect("there is a key");
        let mut other = ring(&[1]);
        other.0[0].secret = b"another".to_vec();
        let freshness = verify(&other, nonce.as_bytes(), client("192.0.2.1:5"), NOW, HOUR);
        assert_eq!(freshness, Freshness::Stale);
    }

    #[test]
    fn garbage_is_stale() {
        let minted = Nonce::mint(&ring(&[1]), client("192.0.2.1:5"), NOW).expect("there is a key");
        let check = |nonce: &[u8]| verify(&ring(&[1]), nonce, client("192.0.2.1:5"), NOW, HOUR);
        for end in 0..minted.as_bytes().len() {
            assert_eq!(check(&minted.as_bytes()[..end]), Freshness::Stale, "cut at {end}");
        }
        for byte in 0..minted.as_bytes().len() {
            let mut changed = minted.0;
            changed[byte] = if changed[byte] == b'x' { b'y' } else { b'x' };
            assert_eq!(check(&changed), Freshness::Stale, "byte {byte}");
        }
        for nonce in [&b""[..], b"obMatJos2", &[0xFF; 763], &[b'A'; 41], b"obMatJos2AAAA===="] {
            assert_eq!(check(nonce), Freshness::Stale);
        }
        assert_eq!(check(&[minted.as_bytes(), b"A"].concat()), Freshness::Stale);
    }

    #[test]
    fn security_feature_bit_0() {
        let cases: &[(&[u8], bool)] = &[
            (b"obMatJos2AAAA", false),
            (b"obMatJos2fAAA", false),
            (b"obMatJos2gAAA", true),
            (b"obMatJos2/AAA", true),
            (b"obMatJos2gAA", false),
            (b"gAAA", false),
        ];
        for (nonce, expected) in cases {
            assert_eq!(claims_password_algorithms(nonce), *expected);
        }
    }
}
