//! Nonces that need no table (promise P9): a MAC under the cluster's key ring over the client's address and a time,
//! in the `obMatJos2` form of RFC 8489 §9.2, valid on every member.
//!
//! 41 characters: the cookie and the security features (13), then base64url of key id (1 byte), Unix time (4) and
//! MAC (16). Short, because it goes to strangers (abuse.md D); where even that is too long, 31 with 8 bytes of MAC.

use std::net::{IpAddr, SocketAddr};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use crate::wire::integrity::keyed;
use crate::{Key, KeyRing};

/// RFC 8489 §9.2: says that the server knows RFC 8489.
const COOKIE: &[u8; 9] = b"obMatJos2";
/// Cookie and security features.
const NONCE_COOKIE: usize = COOKIE.len() + 4;
const MAC_LEN: usize = 16;
const SHORT_MAC_LEN: usize = 8;
/// Key id and time.
const PREFIX_LEN: usize = 1 + 4;

/// What a nonce says the server offers, protected by the nonce against whoever would take it away (RFC 8489 §9.2.1,
/// §18.1).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SecurityFeatures {
    /// Bit 0: PASSWORD-ALGORITHMS was sent along.
    pub password_algorithms: bool,
    /// Bit 1: the client must send USERHASH, not USERNAME.
    pub username_anonymity: bool,
}

impl SecurityFeatures {
    /// The 24 bits, bit 0 the highest.
    fn to_bits(self) -> [u8; 3] {
        [u8::from(self.password_algorithms) << 7 | u8::from(self.username_anonymity) << 6, 0, 0]
    }

    /// Of a NONCE that starts with the nonce cookie; `None` of one that does not. Unassigned bits are ignored.
    pub fn of(nonce: &[u8]) -> Option<Self> {
        let encoded: &[u8; 4] = nonce.strip_prefix(COOKIE)?.first_chunk()?;
        let mut bits = [0; 3];
        STANDARD_NO_PAD.decode_slice(encoded, &mut bits).ok()?;
        Some(Self { password_algorithms: bits[0] & 0x80 != 0, username_anonymity: bits[0] & 0x40 != 0 })
    }
}

/// A nonce, ready to be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Nonce {
    bytes: [u8; Nonce::LEN],
    len: usize,
}

impl Nonce {
    /// Its length in bytes; all of them are `qdtext` (RFC 8489 §14.10).
    pub const LEN: usize = NONCE_COOKIE + encoded_len(PREFIX_LEN + MAC_LEN);
    /// Length of the short form.
    pub const SHORT_LEN: usize = NONCE_COOKIE + encoded_len(PREFIX_LEN + SHORT_MAC_LEN);

    /// Makes a nonce for a client under the newest key; `None` without keys.
    pub fn mint(keys: &KeyRing, client: SocketAddr, unix_seconds: u64, features: SecurityFeatures) -> Option<Self> {
        Some(Self::mint_with(&NonceKey::new(keys.newest()?), client, unix_seconds, features))
    }

    fn mint_with(key: &NonceKey, client: SocketAddr, unix_seconds: u64, features: SecurityFeatures) -> Self {
        // Wraps in 2106; `verify` compares modulo 2^32.
        let time = (unix_seconds as u32).to_be_bytes();
        let mac = key.mac(time, client, features.to_bits());
        Self::encode(key.id, time, &mac, features.to_bits())
    }

    fn encode(id: u8, time: [u8; 4], mac: &[u8], features: [u8; 3]) -> Self {
        let mut binary = [0; PREFIX_LEN + MAC_LEN];
        binary[0] = id;
        binary[1..PREFIX_LEN].copy_from_slice(&time);
        let end = PREFIX_LEN + mac.len();
        binary[PREFIX_LEN..end].copy_from_slice(mac);
        let mut bytes = [0; Self::LEN];
        bytes[..9].copy_from_slice(COOKIE);
        STANDARD_NO_PAD.encode_slice(features, &mut bytes[9..NONCE_COOKIE]).expect("3 bytes are 4 characters");
        let written = URL_SAFE_NO_PAD.encode_slice(&binary[..end], &mut bytes[NONCE_COOKIE..]).expect("it has room");
        Self { bytes, len: NONCE_COOKIE + written }
    }

    /// The same nonce with half of its MAC: worth as much, and 10 characters shorter.
    pub fn shortened(&self) -> Self {
        let mut binary = [0; PREFIX_LEN + MAC_LEN];
        let features = SecurityFeatures::of(&self.bytes).unwrap_or_default().to_bits();
        URL_SAFE_NO_PAD.decode_slice(&self.as_bytes()[NONCE_COOKIE..], &mut binary).expect("our own nonce");
        let [id, t0, t1, t2, t3, mac @ ..] = binary;
        Self::encode(id, [t0, t1, t2, t3], &mac[..SHORT_MAC_LEN], features)
    }

    /// The characters.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Length of base64 without padding.
const fn encoded_len(binary: usize) -> usize {
    (binary * 4).div_ceil(3)
}

/// What a client's NONCE is worth.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Freshness {
    /// Minted by a member for this client, within its lifetime.
    Fresh,
    /// Of the form and of a time at which it would be fresh, under a key that is not in the ring: a member that has heard
    /// of a newer key may have minted it.
    Unknown,
    /// Anything else, also garbage: 438 with a fresh one (RFC 8489 §9.2.4).
    Stale,
}

/// A key ring with that part of the work done which is the same for all nonces.
#[derive(Default)]
pub struct NonceKeys(Vec<NonceKey>);

impl NonceKeys {
    /// Prepares a ring.
    pub fn new(keys: &KeyRing) -> Self {
        Self(keys.0.iter().map(NonceKey::new).collect())
    }

    /// As [`Nonce::mint`].
    pub fn mint(&self, client: SocketAddr, unix_seconds: u64, features: SecurityFeatures) -> Option<Nonce> {
        Some(Nonce::mint_with(self.0.first()?, client, unix_seconds, features))
    }

    /// As [`verify`].
    pub fn verify(&self, nonce: &[u8], client: SocketAddr, unix_seconds: u64, lifetime: u32) -> Freshness {
        let find = |id| self.0.iter().find(|key| key.id == id).cloned();
        verify_with(find, nonce, client, unix_seconds, lifetime)
    }
}

/// Checks a NONCE from `client` (IP and port) at this Unix time. `lifetime` is in seconds.
///
/// A time ahead of this member's clock by up to `lifetime` is fresh: the member that minted it has another clock.
/// Whatever features the nonce names, a member has minted it with them: it is not fresh with any bit changed.
pub fn verify(keys: &KeyRing, nonce: &[u8], client: SocketAddr, unix_seconds: u64, lifetime: u32) -> Freshness {
    verify_with(|id| keys.find(id).map(NonceKey::new), nonce, client, unix_seconds, lifetime)
}

fn verify_with(
    find: impl Fn(u8) -> Option<NonceKey>,
    nonce: &[u8],
    client: SocketAddr,
    unix_seconds: u64,
    lifetime: u32,
) -> Freshness {
    let verified = (|| {
        let (encoded_features, encoded) = nonce.strip_prefix(COOKIE)?.split_first_chunk::<4>()?;
        // Exact length first: decoding takes room for whole groups of 4.
        let mac_len = match nonce.len() {
            Nonce::LEN => MAC_LEN,
            Nonce::SHORT_LEN => SHORT_MAC_LEN,
            _ => return None,
        };
        let mut features = [0; 3];
        STANDARD_NO_PAD.decode_slice(encoded_features, &mut features).ok()?;
        let mut binary = [0; PREFIX_LEN + MAC_LEN];
        let len = URL_SAFE_NO_PAD.decode_slice(encoded, &mut binary).ok()?;
        let [id, t0, t1, t2, t3, claimed @ ..] = &binary;
        let time = [*t0, *t1, *t2, *t3];
        let age = (unix_seconds as u32).wrapping_sub(u32::from_be_bytes(time)) as i32;
        if len != PREFIX_LEN + mac_len || age.unsigned_abs() > lifetime {
            return None;
        }
        let Some(key) = find(*id) else {
            return Some(Freshness::Unknown);
        };
        let authentic: bool = key.mac(time, client, features)[..mac_len].ct_eq(&claimed[..mac_len]).into();
        authentic.then_some(Freshness::Fresh)
    })();
    verified.unwrap_or(Freshness::Stale)
}

/// A key that has been told what all nonces begin with.
#[derive(Clone)]
struct NonceKey {
    id: u8,
    hmac: Hmac<Sha256>,
}

impl NonceKey {
    fn new(key: &Key) -> Self {
        let mut hmac: Hmac<Sha256> = keyed(&key.secret);
        hmac.update(b"turnpike nonce");
        hmac.update(&[key.id]);
        Self { id: key.id, hmac }
    }

    /// A nonce without features is hashed as before there were any: those of the previous version stay fresh.
    fn mac(&self, time: [u8; 4], client: SocketAddr, features: [u8; 3]) -> [u8; MAC_LEN] {
        let ip = match client.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let mut mac = self.hmac.clone();
        mac.update(&time);
        mac.update(&ip.octets());
        mac.update(&client.port().to_be_bytes());
        if features != [0; 3] {
            mac.update(&features);
        }
        let mut short = [0; MAC_LEN];
        short.copy_from_slice(&mac.finalize().into_bytes()[..MAC_LEN]);
        short
    }
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

    const BOTH: SecurityFeatures = SecurityFeatures { password_algorithms: true, username_anonymity: true };

    fn minted() -> Nonce {
        Nonce::mint(&ring(&[1]), client("192.0.2.1:5"), NOW, BOTH).expect("there is a key")
    }

    fn client(text: &str) -> SocketAddr {
        text.parse().expect("literal")
    }

    #[test]
    fn has_the_form_of_rfc_8489_9_2() {
        let cases = [
            (SecurityFeatures::default(), b"obMatJos2AAAA"),
            (BOTH, b"obMatJos2wAAA"),
            (SecurityFeatures { username_anonymity: false, ..BOTH }, b"obMatJos2gAAA"),
        ];
        for (features, start) in cases {
            let nonce = Nonce::mint(&ring(&[1]), client("192.0.2.1:5"), NOW, features).expect("there is a key");
            assert_eq!((nonce.as_bytes().len(), nonce.shortened().as_bytes().len()), (41, 31));
            for nonce in [nonce, nonce.shortened()] {
                assert!(nonce.as_bytes().starts_with(start));
                assert!(nonce.as_bytes().iter().all(|c| c.is_ascii_alphanumeric() || b"-_".contains(c)));
                assert_eq!(SecurityFeatures::of(nonce.as_bytes()), Some(features));
                let freshness = verify(&ring(&[1]), nonce.as_bytes(), client("192.0.2.1:5"), NOW, HOUR);
                assert_eq!(freshness, Freshness::Fresh);
            }
        }
        assert_eq!(Nonce::mint(&ring(&[]), client("192.0.2.1:5"), NOW, BOTH), None);
    }

    #[test]
    fn features_cannot_be_taken_away() {
        // RFC 8489 §9.2.1.
        let minted = minted();
        for features in [b"AAAA", b"gAAA", b"QAAA", b"wAAB", b"wBAA"] {
            for nonce in [minted, minted.shortened()] {
                let mut changed = nonce.as_bytes().to_vec();
                changed[9..13].copy_from_slice(features);
                let freshness = verify(&ring(&[1]), &changed, client("192.0.2.1:5"), NOW, HOUR);
                assert_eq!(freshness, Freshness::Stale, "{features:?}");
            }
        }
    }

    #[test]
    fn one_of_the_version_before_features_is_fresh() {
        // Minted by Turnpike 0.1: `ring(&[1])`, 192.0.2.1:5, NOW.
        let nonce = b"obMatJos2AAAAAWVT8QDBZK6-kESoPyj9F01CR66I";
        assert_eq!(verify(&ring(&[1]), nonce, client("192.0.2.1:5"), NOW, HOUR), Freshness::Fresh);
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
            ("a key nobody knows here", v4, v4, NOW, &[2], Freshness::Unknown),
            ("a key nobody knows here, for somebody else", v4, "192.0.2.2:5", NOW, &[2], Freshness::Unknown),
            ("a key nobody knows here, too late", v4, v4, NOW + hour + 1, &[2], Freshness::Stale),
            ("no keys", v4, v4, NOW, &[], Freshness::Unknown),
        ];
        for (what, minted_for, used_by, at, keys, expected) in cases {
            let nonce = Nonce::mint(&ring(&[1]), client(minted_for), NOW, BOTH).expect("there is a key");
            let freshness = verify(&ring(keys), nonce.as_bytes(), client(used_by), *at, HOUR);
            assert_eq!(freshness, *expected, "{what}");
        }
    }

    #[test]
    fn a_key_of_the_same_id_with_another_secret_does_not_verify() {
        let nonce = minted();
        let mut other = ring(&[1]);
        other.0[0].secret = b"another".to_vec();
        let freshness = verify(&other, nonce.as_bytes(), client("192.0.2.1:5"), NOW, HOUR);
        assert_eq!(freshness, Freshness::Stale);
    }

    #[test]
    fn garbage_is_stale() {
        let minted = minted();
        let check = |nonce: &[u8]| verify(&ring(&[1]), nonce, client("192.0.2.1:5"), NOW, HOUR);
        for end in 0..minted.as_bytes().len() {
            assert_eq!(check(&minted.as_bytes()[..end]), Freshness::Stale, "cut at {end}");
        }
        for byte in 0..minted.as_bytes().len() {
            let mut changed = minted.bytes;
            changed[byte] = if changed[byte] == b'x' { b'y' } else { b'x' };
            // With another id it is of a key that is not there.
            assert_ne!(check(&changed), Freshness::Fresh, "byte {byte}");
        }
        for nonce in [&b""[..], b"obMatJos2", &[0xFF; 763], &[b'A'; 41], b"obMatJos2AAAA===="] {
            assert_eq!(check(nonce), Freshness::Stale);
        }
        assert_eq!(check(&[minted.as_bytes(), b"A"].concat()), Freshness::Stale);
    }

    #[test]
    fn security_features_are_read() {
        let features = |password_algorithms, username_anonymity| {
            Some(SecurityFeatures { password_algorithms, username_anonymity })
        };
        let cases: &[(&[u8], Option<SecurityFeatures>)] = &[
            (b"obMatJos2AAAA", features(false, false)),
            (b"obMatJos2PAAA", features(false, false)),
            (b"obMatJos2gAAA", features(true, false)),
            (b"obMatJos2QAAA", features(false, true)),
            (b"obMatJos2/AAA", features(true, true)),
            (b"obMatJos2gAA", None),
            (b"obMatJos2g=AA", None),
            (b"gAAA", None),
        ];
        for (nonce, expected) in cases {
            assert_eq!(SecurityFeatures::of(nonce), *expected);
        }
        // The nonce of RFC 8489 B.1 names none of the two.
        let rfc = b"obMatJos2AAACf//499k954d6OL34oL9FSTvy64sA";
        assert_eq!(SecurityFeatures::of(rfc), features(false, false));
    }
}
