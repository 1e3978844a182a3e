//! Tickets of mobility (RFC 8016): who brings one may go on with an allocation from another five-tuple.
//!
//! 32 characters of base64url: 16 random bytes, which say nothing about the allocation, and 8 bytes of a MAC under the
//! cluster's key ring over them, by which a ticket of an allocation that has ended (437) is told from one that never was
//! (400). Text, because `turnutils_uclient` keeps it as a C string of at most 32 bytes. A ticket alone opens nothing: the
//! request that brings it is authenticated as any other, and must be of the user who holds the allocation.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use crate::{Key, KeyRing};

const RANDOM_LEN: usize = 16;
const MAC_LEN: usize = 8;

/// A ticket, not as text.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct Ticket([u8; Ticket::LEN]);

impl Ticket {
    /// Bytes of it in a record.
    pub const LEN: usize = RANDOM_LEN + MAC_LEN;
    /// Characters of it on the wire.
    pub const TEXT_LEN: usize = Self::LEN / 3 * 4;

    /// Makes one under the newest key from bytes that nobody can guess; `None` without keys.
    pub fn mint(keys: &KeyRing, random: [u8; RANDOM_LEN]) -> Option<Self> {
        let mut ticket = [0; Self::LEN];
        ticket[..RANDOM_LEN].copy_from_slice(&random);
        ticket[RANDOM_LEN..].copy_from_slice(&mac(keys.newest()?, &random));
        Some(Self(ticket))
    }

    /// From a record.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// For a record.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// Reads a MOBILITY-TICKET; `None` if it cannot be one of ours.
    pub fn read(text: &[u8]) -> Option<Self> {
        let text: &[u8; Self::TEXT_LEN] = text.try_into().ok()?;
        let mut ticket = [0; Self::LEN];
        let len = URL_SAFE_NO_PAD.decode_slice(text, &mut ticket).ok()?;
        (len == Self::LEN).then_some(Self(ticket))
    }

    /// The value of MOBILITY-TICKET.
    pub fn text(&self) -> [u8; Self::TEXT_LEN] {
        let mut text = [0; Self::TEXT_LEN];
        URL_SAFE_NO_PAD.encode_slice(self.0, &mut text).expect("24 bytes are 32 characters");
        text
    }

    /// Whether a member of this cluster made it, under a key that is still in the ring.
    pub fn is_authentic(&self, keys: &KeyRing) -> bool {
        let (random, claimed) = self.0.split_at(RANDOM_LEN);
        // No early end.
        keys.0.iter().fold(false, |authentic, key| authentic | bool::from(mac(key, random).ct_eq(claimed)))
    }
}

/// Not the ticket itself: it is a secret of client and server.
impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket")
    }
}

fn mac(key: &Key, random: &[u8]) -> [u8; MAC_LEN] {
    let mut mac = Hmac::<Sha256>::new_from_slice(&key.secret).expect("HMAC takes a key of any length");
    mac.update(b"turnpike ticket");
    mac.update(random);
    let mut short = [0; MAC_LEN];
    short.copy_from_slice(&mac.finalize().into_bytes()[..MAC_LEN]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(ids: &[u8]) -> KeyRing {
        KeyRing(ids.iter().map(|id| Key { id: *id, secret: vec![*id; 32] }).collect())
    }

    #[test]
    fn what_is_minted_is_read_and_authentic() {
        let ticket = Ticket::mint(&ring(&[2, 1]), [7; 16]).expect("there is a key");
        let text = ticket.text();
        assert_eq!(Ticket::read(&text), Some(ticket));
        // What keeps it as a C string keeps all of it.
        assert!(text.len() == 32 && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte)));
        assert!(ticket.is_authentic(&ring(&[2])) && ticket.is_authentic(&ring(&[3, 2])));
        assert!(!ticket.is_authentic(&ring(&[1])) && !ticket.is_authentic(&ring(&[])));
        assert_eq!(Ticket::mint(&ring(&[]), [7; 16]), None);
        assert_eq!(format!("{ticket:?}"), "Ticket");
    }

    #[test]
    fn what_was_changed_is_not_authentic() {
        let ticket = Ticket::mint(&ring(&[1]), [7; 16]).expect("there is a key");
        for index in 0..Ticket::LEN {
            let mut changed = ticket;
            changed.0[index] ^= 1;
            assert!(!changed.is_authentic(&ring(&[1])), "byte {index}");
        }
        for garbage in [&b""[..], b"x", &[b'A'; 31], &[b'A'; 33], &[b'!'; 32], &[0; 32]] {
            assert_eq!(Ticket::read(garbage), None);
        }
    }
}
