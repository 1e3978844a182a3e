//! Keys of message integrity: derived from a name and a password (RFC 8489 §9.2.2, §18.5.1), or handed over by an
//! authorization server (RFC 7635 §5).

use md5::Md5;
use sha2::{Digest, Sha256};

use crate::wire::{Integrity, Message, MessageWriter, PreparedKey};

/// PASSWORD-ALGORITHM (RFC 8489 §14.12, §18.5): how a long-term password becomes a key. Neither has parameters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum PasswordAlgorithm {
    /// 16-byte keys, for clients that know nothing else (RFC 8489 §18.5.1.1).
    Md5 = 1,
    /// 32-byte keys (RFC 8489 §18.5.1.2).
    Sha256 = 2,
}

impl PasswordAlgorithm {
    /// PASSWORD-ALGORITHMS as this server offers it, the better one first (RFC 8489 §14.11): number and length of the
    /// parameters, each 16 bits.
    pub const OFFERED: [u8; 8] = [0, Self::Sha256 as u8, 0, 0, 0, Self::Md5 as u8, 0, 0];

    /// PASSWORD-ALGORITHM as it is written: without parameters.
    pub const fn to_value(self) -> [u8; 4] {
        [0, self as u8, 0, 0]
    }

    /// Reads PASSWORD-ALGORITHM; `None` if it is unknown or has parameters, which neither of these has.
    pub const fn from_value(value: &[u8]) -> Option<Self> {
        match value {
            [0, 1, 0, 0] => Some(Self::Md5),
            [0, 2, 0, 0] => Some(Self::Sha256),
            _ => None,
        }
    }

    /// The first algorithm in a PASSWORD-ALGORITHMS that is known here (RFC 8489 §9.2.5).
    pub fn first_known(mut offered: &[u8]) -> Option<Self> {
        while let Some(([a0, a1, l0, l1], rest)) = offered.split_first_chunk::<4>() {
            if let Some(algorithm) = Self::from_value(&[*a0, *a1, *l0, *l1]) {
                return Some(algorithm);
            }
            let parameters = usize::from(u16::from_be_bytes([*l0, *l1])).next_multiple_of(4);
            offered = rest.get(parameters..)?;
        }
        None
    }
}

/// USERHASH of a name (RFC 8489 §14.4): SHA-256(username ":" realm).
pub fn userhash(username: &[u8], realm: &[u8]) -> [u8; 32] {
    digest::<Sha256>(&[username, realm])
}

/// Hashes the parts with colons between them.
fn digest<D: Digest>(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = D::new();
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            hash.update(b":");
        }
        hash.update(part);
    }
    let mut bytes = [0; 32];
    let output = hash.finalize();
    bytes[..output.len()].copy_from_slice(&output);
    bytes
}

/// A key together with the attribute that it protects messages by.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct IntegrityKey {
    bytes: [u8; Self::MAX],
    len: u8,
    integrity: Integrity,
}

impl std::fmt::Debug for IntegrityKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IntegrityKey({:?}, {} bytes)", self.integrity, self.len)
    }
}

impl IntegrityKey {
    /// The longest key: a block of either hash. HMAC gives more no further strength.
    pub const MAX: usize = 64;

    /// Key of a long-term credential (RFC 8489 §9.2.2).
    pub fn long_term(algorithm: PasswordAlgorithm, username: &[u8], realm: &[u8], password: &[u8]) -> Self {
        let (bytes, len, integrity) = match algorithm {
            PasswordAlgorithm::Md5 => (digest::<Md5>(&[username, realm, password]), 16, Integrity::Sha1),
            PasswordAlgorithm::Sha256 => (digest::<Sha256>(&[username, realm, password]), 32, Integrity::Sha256),
        };
        Self::new(&bytes[..len], integrity).expect("no digest is longer")
    }

    /// A key as it is; `None` if it is longer than [`IntegrityKey::MAX`].
    pub fn new(key: &[u8], integrity: Integrity) -> Option<Self> {
        let mut bytes = [0; Self::MAX];
        bytes.get_mut(..key.len())?.copy_from_slice(key);
        Some(Self { bytes, len: key.len() as u8, integrity })
    }

    /// The same key for another attribute: a client may send either with either algorithm (RFC 8489 §9.2.4).
    pub fn with(self, integrity: Integrity) -> Self {
        Self { integrity, ..self }
    }

    /// The first bytes of it, or all where there are fewer.
    pub(crate) fn beginning(self, len: usize) -> Self {
        let mut bytes = self.bytes;
        let len = len.min(self.len.into());
        bytes[len..].fill(0);
        Self { bytes, len: len as u8, ..self }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Which attribute it is for.
    pub fn integrity(&self) -> Integrity {
        self.integrity
    }

    /// The same key, ready to be used again and again.
    pub fn prepared(&self) -> PreparedKey {
        PreparedKey::new(self.as_bytes(), self.integrity)
    }

    /// Whether the message has the attribute, made with this key.
    pub fn verifies(&self, message: &Message<'_>) -> bool {
        match self.integrity {
            Integrity::Sha1 => message.verify_integrity(self.as_bytes()),
            Integrity::Sha256 => message.verify_integrity_sha256(self.as_bytes()),
        }
    }

    /// Appends the attribute. Only FINGERPRINT may follow.
    pub fn sign(&self, writer: &mut MessageWriter<'_>) {
        match self.integrity {
            Integrity::Sha1 => writer.integrity(self.as_bytes()),
            Integrity::Sha256 => writer.integrity_sha256(self.as_bytes()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_rfc_8489() {
        // §9.2.2, and: printf user:realm:pass | sha256sum
        let md5 = IntegrityKey::long_term(PasswordAlgorithm::Md5, b"user", b"realm", b"pass");
        let expected = [0x84, 0x93, 0xfb, 0xc5, 0x3b, 0xa5, 0x82, 0xfb, 0x4c, 0x04, 0x4c, 0x45, 0x6b, 0xdc, 0x40, 0xeb];
        assert_eq!((md5.as_bytes(), md5.integrity()), (&expected[..], Integrity::Sha1));
        let sha256 = IntegrityKey::long_term(PasswordAlgorithm::Sha256, b"user", b"realm", b"pass");
        let expected = SHA256_OF_USER_REALM_PASS;
        assert_eq!((sha256.as_bytes(), sha256.integrity()), (&expected[..], Integrity::Sha256));
    }

    const SHA256_OF_USER_REALM_PASS: [u8; 32] = [
        0x07, 0xe9, 0x34, 0x11, 0x7a, 0xbd, 0x40, 0x83, 0x6e, 0x7c, 0x63, 0x29, 0xb5, 0x47, 0x31, 0xb2, 0xb2, 0xd2,
        0xa5, 0xf9, 0xa7, 0x1f, 0x54, 0x49, 0x22, 0xd7, 0x5e, 0x07, 0x30, 0xd8, 0x25, 0x1b,
    ];

    #[test]
    fn userhash_is_that_of_rfc_8489_b_1() {
        let name = "\u{30DE}\u{30C8}\u{30EA}\u{30C3}\u{30AF}\u{30B9}".as_bytes();
        let hash = userhash(name, b"example.org");
        assert_eq!(hash[..8], [0x4a, 0x3c, 0xf3, 0x8f, 0xef, 0x69, 0x92, 0xbd]);
        assert_eq!(hash[28..], [0x40, 0x7f, 0x17, 0x04]);
    }

    #[test]
    fn algorithms_are_read() {
        let cases: &[(&str, &[u8], Option<PasswordAlgorithm>)] = &[
            ("ours", &PasswordAlgorithm::OFFERED, Some(PasswordAlgorithm::Sha256)),
            ("MD5 alone", &[0, 1, 0, 0], Some(PasswordAlgorithm::Md5)),
            ("unknown first", &[0, 9, 0, 3, 1, 2, 3, 0, 0, 1, 0, 0], Some(PasswordAlgorithm::Md5)),
            ("parameters it does not have", &[0, 2, 0, 1, 0, 0, 0, 0], None),
            ("cut", &[0, 9, 0, 8, 1, 2], None),
            ("reserved", &[0, 0, 0, 0], None),
            ("empty", &[], None),
        ];
        for (what, value, expected) in cases {
            assert_eq!(PasswordAlgorithm::first_known(value), *expected, "{what}");
        }
    }

    #[test]
    fn a_key_does_not_show_itself() {
        let key = IntegrityKey::new(&[0xAB; 20], Integrity::Sha1).expect("short");
        assert_eq!(format!("{key:?}"), "IntegrityKey(Sha1, 20 bytes)");
        assert_eq!(IntegrityKey::new(&[0; 65], Integrity::Sha1), None);
    }
}
