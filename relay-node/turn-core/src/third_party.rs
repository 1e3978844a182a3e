//! Third-party authorization (RFC 7635): access tokens that an authorization server sealed for this server.

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes128Gcm, Aes256Gcm, KeyInit};
use sha2::{Digest, Sha256};

use crate::IntegrityKey;
use crate::wire::Integrity;

/// RFC 7635 §7: how far clocks may differ, in milliseconds.
const DELTA: u64 = 5_000;
/// Length of the nonce of AES-GCM (RFC 5116 §5).
const NONCE_LEN: usize = 12;
/// Length of the tag that AES-GCM appends.
const TAG_LEN: usize = 16;
/// What is sealed beside the key: its length, timestamp, lifetime.
const FIELDS_LEN: usize = 2 + 8 + 4;
/// The shortest session key that is taken, in bytes: 128 bits. RFC 7635 §6.2 wants 160 bits supported.
const MIN_KEY: usize = 16;
/// Between the kid and the token's fingerprint in the name that an allocation is known by.
const SEPARATOR: u8 = b'#';
/// Hexadecimal digits of that fingerprint.
const FINGERPRINT_LEN: usize = 16;

/// The authorization servers whose tokens are taken.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ThirdParty {
    /// THIRD-PARTY-AUTHORIZATION (RFC 7635 §6.1): the name of this server, which tokens are sealed for. 1..=255 bytes.
    pub server_name: String,
    /// The long-term keys shared with authorization servers.
    pub keys: Vec<TokenKey>,
}

/// A key that tokens are sealed with (RFC 7635 §4.1).
#[derive(Clone, Eq, PartialEq)]
pub struct TokenKey {
    /// What clients send as USERNAME. Opaque bytes, at most 491: a fingerprint of the token is appended to it.
    pub kid: Vec<u8>,
    /// The key, with its algorithm.
    pub cipher: TokenCipher,
}

impl TokenKey {
    /// The longest kid, in bytes.
    pub const MAX_KID: usize = 508 - 1 - FINGERPRINT_LEN;
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenKey({})", self.kid.escape_ascii())
    }
}

/// The AEAD algorithm of a key (RFC 7635 §4.1.1, RFC 7518 §5.1).
#[derive(Clone, Eq, PartialEq)]
pub enum TokenCipher {
    /// AES-256-GCM, which RFC 7635 §4.1.1 requires.
    A256Gcm([u8; 32]),
    /// AES-128-GCM.
    A128Gcm([u8; 16]),
}

/// What a valid token grants (RFC 7635 §6.2), or what is left of it on an allocation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Session {
    /// The session key, mac_key.
    pub key: IntegrityKey,
    /// Unix milliseconds: the end of the token, and of what was allocated with it (RFC 7635 §9).
    pub expires_at: u64,
}

impl ThirdParty {
    /// Whether a key has this name.
    pub(crate) fn knows(&self, kid: &[u8]) -> bool {
        self.keys.iter().any(|key| key.kid == kid)
    }

    /// Opens a token that was sealed under the key that `kid` names (RFC 7635 §7). `None` for an unknown kid, a token
    /// that is not authentic or not well-formed, and one whose time is not now.
    ///
    /// `token` is the binary form of RFC 7635 §6.2: base64 is undone by the client.
    pub fn open(&self, kid: &[u8], token: &[u8], unix_millis: u64) -> Option<Session> {
        let key = self.keys.iter().find(|key| key.kid == kid)?;
        let (nonce_len, rest) = token.split_first_chunk::<2>()?;
        if usize::from(u16::from_be_bytes(*nonce_len)) != NONCE_LEN {
            return None;
        }
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        if sealed.len() > FIELDS_LEN + IntegrityKey::MAX + TAG_LEN {
            return None;
        }
        // RFC 7635 §6.2: the server's name is the associated data, so that a token is of use to no other server.
        let payload = Payload { msg: sealed, aad: self.server_name.as_bytes() };
        let block = match &key.cipher {
            TokenCipher::A256Gcm(key) => Aes256Gcm::new(key.into()).decrypt(nonce.into(), payload),
            TokenCipher::A128Gcm(key) => Aes128Gcm::new(key.into()).decrypt(nonce.into(), payload),
        };
        read_block(&block.ok()?, unix_millis)
    }
}

/// The encrypted_block of RFC 7635 §6.2, and the check of its time (§7).
fn read_block(block: &[u8], unix_millis: u64) -> Option<Session> {
    let (key_len, rest) = block.split_first_chunk::<2>()?;
    let (key, rest) = rest.split_at_checked(u16::from_be_bytes(*key_len).into())?;
    let (timestamp, rest) = rest.split_first_chunk::<8>()?;
    let lifetime: &[u8; 4] = rest.try_into().ok()?;
    if key.len() < MIN_KEY {
        return None;
    }
    // 48 bits of seconds and 16 bits of 1/64000 of a second.
    let timestamp = u64::from_be_bytes(*timestamp);
    let issued_at = (timestamp >> 16) * 1000 + (timestamp & 0xFFFF) / 64;
    let lifetime = u64::from(u32::from_be_bytes(*lifetime)) * 1000;
    // RFC 7635 §7: lifetime + Delta > abs(RDnew - TS). §9: what is left of it is as long as an allocation may live,
    // and no longer than the token's own lifetime.
    let left = (lifetime + DELTA).checked_sub(unix_millis.abs_diff(issued_at)).filter(|left| *left > 0)?;
    let key = IntegrityKey::new(key, Integrity::Sha1)?;
    Some(Session { key, expires_at: unix_millis + left.min(lifetime) })
}

/// The name that an allocation made with a token is known by: one kid serves many clients, so quota and ledger count by
/// token.
pub fn allocation_name(kid: &[u8], session: &Session) -> Vec<u8> {
    let digest = Sha256::digest(session.key.as_bytes());
    let mut name = Vec::with_capacity(kid.len() + 1 + FINGERPRINT_LEN);
    name.extend(kid);
    name.push(SEPARATOR);
    for byte in &digest[..FINGERPRINT_LEN / 2] {
        name.extend([byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)]));
    }
    name
}

/// The kid in a name that [`allocation_name`] made.
pub fn kid_of(allocation_name: &[u8]) -> Option<&[u8]> {
    let (kid, rest) = allocation_name.split_at_checked(allocation_name.len().checked_sub(1 + FINGERPRINT_LEN)?)?;
    (rest[0] == SEPARATOR).then_some(kid)
}

/// Seals a token, as an authorization server does.
#[cfg(test)]
pub(crate) fn seal(key: &TokenKey, server_name: &str, mac_key: &[u8], timestamp: u64, lifetime: u32) -> Vec<u8> {
    let nonce = b"h4j3k2l2n4b5";
    let mut block = u16::try_from(mac_key.len()).expect("short").to_be_bytes().to_vec();
    block.extend(mac_key);
    block.extend(timestamp.to_be_bytes());
    block.extend(lifetime.to_be_bytes());
    let payload = Payload { msg: &block, aad: server_name.as_bytes() };
    let sealed = match &key.cipher {
        TokenCipher::A256Gcm(key) => Aes256Gcm::new(key.into()).encrypt(nonce.into(), payload),
        TokenCipher::A128Gcm(key) => Aes128Gcm::new(key.into()).encrypt(nonce.into(), payload),
    };
    [&[0, 12][..], nonce, &sealed.expect("short")].concat()
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    /// RFC 7635 appendix A: when its tokens were made, and what is in them.
    const ISSUED: u64 = 92_470_300_704_768;
    const ISSUED_MILLIS: u64 = (ISSUED >> 16) * 1000 + (ISSUED & 0xFFFF) / 64;
    const MAC_KEY: &[u8] = b"ZksjpweoixXmvn67534m";

    fn third_party() -> ThirdParty {
        let key = *b"HGkj32KJGiuy098sdfaqbNjOiaz71923";
        let short: [u8; 16] = *key.first_chunk().expect("32 bytes");
        ThirdParty {
            server_name: "blackdow.carleon.gov".into(),
            keys: vec![
                TokenKey { kid: b"256".to_vec(), cipher: TokenCipher::A256Gcm(key) },
                TokenKey { kid: b"128".to_vec(), cipher: TokenCipher::A128Gcm(short) },
            ],
        }
    }

    const SAMPLE_256: &[u8] = b"\x00\x0c\x68\x34\x6a\x33\x6b\x32\x6c\x32\x6e\x34\x62\x35\x61\x7e\xf1\x34\
        \xa3\xd5\xe4\x4e\x9a\x19\xcc\x7d\xc1\x04\xb0\xc0\x3d\x03\xb2\xa5\x51\xd8\xfd\xf5\xcd\x3b\
        \x6d\xca\x6f\x10\xcf\xb7\x7e\x5b\x2d\xde\xc8\x4d\x29\x3a\x5c\x50\x49\x93\x59\xf0\xc2\xe2\
        \x6f\x76";
    const SAMPLE_128: &[u8] = b"\x00\x0c\x68\x34\x6a\x33\x6b\x32\x6c\x32\x6e\x34\x62\x35\x7f\xb9\xe9\x9f\
        \x08\x27\xbe\x3d\xf1\xe1\xbd\x65\x14\x93\xd3\x03\x1d\x36\xdf\x57\x07\x97\x84\xae\xe5\xea\
        \xcb\x65\xfa\xd4\xf2\x7f\xab\x1a\x3f\x97\x97\x4b\x69\xf8\x51\xb2\x4b\xf5\xaf\x09\xed\xa3\
        \x57\xe0";

    #[test]
    fn the_tokens_of_rfc_7635_appendix_a_open() {
        for (kid, token) in [(&b"256"[..], SAMPLE_256), (b"128", SAMPLE_128)] {
            let session = third_party().open(kid, token, ISSUED_MILLIS).expect("the RFC's token");
            assert_eq!(session.key.as_bytes(), MAC_KEY);
            assert_eq!(session.expires_at, ISSUED_MILLIS + 3_600_000);
        }
    }

    #[test]
    fn the_tokens_of_coturn_open() {
        // turnutils_oauth -e -i turn.example.org -j kid1 -k "$(printf KEY | base64)" -l 1700000000 -m 100 -n ALGORITHM
        //   -o "$(printf h4j3k2l2n4b5 | base64)" -p "$(printf Zksjpweoixxmvn67534m | base64)"
        //   -q $((1700000000 << 16)) -r 3600
        let cases = [
            (
                TokenCipher::A256Gcm(*b"01234567890123456789012345678901"),
                "AAxoNGozazJsMm40YjUJ0JmCjBuJ3X8q0GcbnfXSUNwpYHEKe0Phhsp5Yf0RYtcY2RcPijAzQbAGDZsRmP1hKA==",
            ),
            (
                TokenCipher::A128Gcm(*b"0123456789012345"),
                "AAxoNGozazJsMm40YjXq3HDAskeDYKBOPClOp40gWlcS47GKYTBgbTJRhhYSg3N48k8siXFdy364upu/18+k/A==",
            ),
        ];
        for (cipher, token) in cases {
            let keys = vec![TokenKey { kid: b"kid1".to_vec(), cipher }];
            let third_party = ThirdParty { server_name: "turn.example.org".into(), keys };
            let token = STANDARD.decode(token).expect("base64");
            let session = third_party.open(b"kid1", &token, 1_700_000_000_000).expect("coturn's token");
            assert_eq!(session.key.as_bytes(), b"Zksjpweoixxmvn67534m");
            assert_eq!(session.expires_at, 1_700_003_600_000);
        }
    }

    #[test]
    fn tokens_are_for_a_time() {
        // RFC 7635 §7 and §9: lifetime 3600 s, Delta 5 s.
        let at =
            |millis: u64| third_party().open(b"256", SAMPLE_256, millis).map(|session| session.expires_at - millis);
        let cases: &[(&str, u64, Option<u64>)] = &[
            ("an hour is left", ISSUED_MILLIS, Some(3_600_000)),
            ("half of it", ISSUED_MILLIS + 1_800_000, Some(1_805_000)),
            ("the last moment", ISSUED_MILLIS + 3_604_999, Some(1)),
            ("too late", ISSUED_MILLIS + 3_605_000, None),
            ("from a clock ahead", ISSUED_MILLIS - 60_000, Some(3_545_000)),
            ("from the future", ISSUED_MILLIS - 3_605_000, None),
            ("from another age", 0, None),
        ];
        for (what, millis, expected) in cases {
            assert_eq!(at(*millis), *expected, "{what}");
        }
    }

    #[test]
    fn what_is_not_authentic_does_not_open() {
        let open = |kid: &[u8], token: &[u8]| third_party().open(kid, token, ISSUED_MILLIS);
        assert_eq!(open(b"128", SAMPLE_256), None, "sealed with another key");
        assert_eq!(open(b"257", SAMPLE_256), None, "unknown kid");
        for byte in 0..SAMPLE_256.len() {
            let mut token = SAMPLE_256.to_vec();
            token[byte] ^= 1;
            assert_eq!(open(b"256", &token), None, "byte {byte}");
            assert_eq!(open(b"256", &SAMPLE_256[..byte]), None, "cut at {byte}");
        }
        let mut elsewhere = third_party();
        elsewhere.server_name = "other.carleon.gov".into();
        assert_eq!(elsewhere.open(b"256", SAMPLE_256, ISSUED_MILLIS), None, "sealed for another server");
    }

    #[test]
    fn session_keys_have_bounds() {
        let third_party = third_party();
        for (len, opens) in [(0, false), (15, false), (16, true), (20, true), (32, true), (64, true), (65, false)] {
            let token = seal(&third_party.keys[0], &third_party.server_name, &vec![7; len], ISSUED, 60);
            let session = third_party.open(b"256", &token, ISSUED_MILLIS);
            assert_eq!(session.is_some(), opens, "{len} bytes");
        }
    }

    #[test]
    fn any_timestamp_and_lifetime_are_read() {
        let third_party = third_party();
        for (timestamp, lifetime) in [(0, 0), (u64::MAX, u32::MAX), (ISSUED, u32::MAX), (u64::MAX, 0)] {
            let token = seal(&third_party.keys[0], &third_party.server_name, MAC_KEY, timestamp, lifetime);
            let session = third_party.open(b"256", &token, ISSUED_MILLIS);
            assert_eq!(session.is_some(), timestamp == ISSUED, "{timestamp} {lifetime}");
        }
    }

    #[test]
    fn names_hold_the_kid() {
        let session = third_party().open(b"256", SAMPLE_256, ISSUED_MILLIS).expect("the RFC's token");
        for kid in [&b"kid"[..], b"", b"a#b", b"1700000000:x"] {
            let name = allocation_name(kid, &session);
            assert_eq!(kid_of(&name), Some(kid));
        }
        for name in [&b""[..], b"alice", b"a somewhat longer name"] {
            assert_eq!(kid_of(name), None);
        }
    }
}
