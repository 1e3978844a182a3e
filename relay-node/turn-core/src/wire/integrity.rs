//! MESSAGE-INTEGRITY (RFC 8489 §14.5), MESSAGE-INTEGRITY-SHA256 (§14.6) and FINGERPRINT (§14.7).

use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Length of a whole MESSAGE-INTEGRITY attribute.
pub(super) const MESSAGE_INTEGRITY_LEN: usize = 24;
/// Length of a whole MESSAGE-INTEGRITY-SHA256 attribute that is not truncated.
pub(super) const MESSAGE_INTEGRITY_SHA256_LEN: usize = 36;
/// Length of a whole FINGERPRINT attribute.
pub(super) const FINGERPRINT_LEN: usize = 8;
/// RFC 8489 §14.7: tells a STUN FINGERPRINT from an application's own CRC-32.
const FINGERPRINT_XOR: u32 = 0x5354_554E;

/// Which attribute protects a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Integrity {
    /// MESSAGE-INTEGRITY (RFC 8489 §14.5).
    Sha1,
    /// MESSAGE-INTEGRITY-SHA256 (RFC 8489 §14.6).
    Sha256,
}

/// A key with that part of HMAC done which depends on the key alone: half of the work on a short message.
#[derive(Clone)]
pub enum PreparedKey {
    /// For MESSAGE-INTEGRITY.
    Sha1(Hmac<Sha1>),
    /// For MESSAGE-INTEGRITY-SHA256.
    Sha256(Hmac<Sha256>),
}

impl std::fmt::Debug for PreparedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PreparedKey({:?})", self.integrity())
    }
}

impl PreparedKey {
    /// Prepares a key of any length.
    pub fn new(key: &[u8], integrity: Integrity) -> Self {
        match integrity {
            Integrity::Sha1 => Self::Sha1(keyed(key)),
            Integrity::Sha256 => Self::Sha256(keyed(key)),
        }
    }

    /// Which attribute it is for.
    pub fn integrity(&self) -> Integrity {
        match self {
            Self::Sha1(_) => Integrity::Sha1,
            Self::Sha256(_) => Integrity::Sha256,
        }
    }
}

/// HMAC-SHA1 of `before`, a message up to the MESSAGE-INTEGRITY attribute, with the header's length taken to end
/// behind that attribute. `before` must hold a header.
pub(super) fn message_integrity(key: Hmac<Sha1>, before: &[u8]) -> [u8; 20] {
    over(key, before, MESSAGE_INTEGRITY_LEN).finalize().into_bytes().into()
}

/// HMAC-SHA256 of `before`, a message up to the MESSAGE-INTEGRITY-SHA256 attribute, whose whole length is
/// `attribute_len`: a truncated value is that of a shorter message (RFC 8489 §14.6).
pub(crate) fn message_integrity_sha256(key: Hmac<Sha256>, before: &[u8], attribute_len: usize) -> [u8; 32] {
    over(key, before, attribute_len).finalize().into_bytes().into()
}

/// An HMAC under a key of any length.
pub(crate) fn keyed<M: KeyInit>(key: &[u8]) -> M {
    M::new_from_slice(key).expect("HMAC takes a key of any length")
}

fn over<M: Mac>(mut mac: M, before: &[u8], attribute_len: usize) -> M {
    // A message is at most 20 + 65,532 bytes, so this fits.
    let len = (before.len() - 20 + attribute_len) as u16;
    mac.update(&before[..2]);
    mac.update(&len.to_be_bytes());
    mac.update(&before[4..]);
    mac
}

/// Whether both are the same, in time that depends on their lengths only.
pub(super) fn constant_time_eq(left: &[u8], right: &[u8]) -> bool {
    left.ct_eq(right).into()
}

/// CRC of `before`, a message up to the FINGERPRINT attribute whose header already counts that attribute.
pub(super) fn fingerprint(before: &[u8]) -> u32 {
    crc32fast::hash(before) ^ FINGERPRINT_XOR
}
