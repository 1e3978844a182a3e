//! Credentials: TURN REST (time-limited, from a shared secret) and static; minted by the controller, verified by relays.

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

/// Makes TURN REST credentials that expire at `expires_at` (Unix seconds).
pub fn mint(secret: &Key, user: &[u8], expires_at: u64) -> Minted {
    let _ = (secret, user, expires_at);
    Minted {
        username: Vec::new(),
        password: String::new(),
    }
}

/// The part of a user name that quota and ledger count: behind the colon of an ephemeral name, else all of it.
pub fn quota_key(username: &[u8]) -> &[u8] {
    username
}

/// Long-term key of a name and a password.
pub fn long_term_key(username: &[u8], realm: &str, password: &[u8]) -> LongTermKey {
    let _ = (username, realm, password);
    [0; 16]
}

/// Every key that would authenticate this user name now (one per live secret, or the static one). Empty for an
/// unknown, expired, overflowing or malformed name: the caller answers as for a wrong password.
pub fn candidate_keys(settings: &Settings, username: &[u8], unix_seconds: u64) -> smallvec::SmallVec<[LongTermKey; 2]> {
    let _ = (settings, username, unix_seconds);
    smallvec::SmallVec::new()
}
