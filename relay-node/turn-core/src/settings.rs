//! What a server is configured with; replaced whole by [`Input::Configure`](crate::Input::Configure).

use crate::Policy;

/// A named secret. Ids are small because nonces carry them.
#[derive(Clone, Eq, PartialEq)]
pub struct Key {
    /// Names the key on the wire.
    pub id: u8,
    /// The secret.
    pub secret: Vec<u8>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", self.id)
    }
}

/// Two or more live keys: the first one makes, all of them check.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct KeyRing(pub Vec<Key>);

impl KeyRing {
    /// The key that new things are made with.
    pub fn newest(&self) -> Option<&Key> {
        self.0.first()
    }

    /// The key of this id.
    pub fn find(&self, id: u8) -> Option<&Key> {
        self.0.iter().find(|key| key.id == id)
    }
}

/// A user with a fixed password (RFC 8489 §9.2).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StaticUser {
    /// Opaque bytes, at most 508.
    pub username: Vec<u8>,
    /// Opaque bytes.
    pub password: Vec<u8>,
}

/// Bounds, each of which a test hits.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Longest allocation lifetime in seconds (RFC 8656 §7.2 suggests at most 3600).
    pub max_lifetime: u32,
    /// Most permissions an allocation holds; one more is 508 (RFC 8656 §9.2, §18.13 "Insufficient Capacity").
    pub permissions_per_allocation: usize,
    /// Most channels an allocation holds; one more is 508.
    pub channels_per_allocation: usize,
    /// Nonce lifetime in seconds, at least 3600: Chromium does not survive 438 to an Allocate.
    pub nonce_lifetime: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_lifetime: 3600, permissions_per_allocation: 256, channels_per_allocation: 256, nonce_lifetime: 3600 }
    }
}

/// Everything a server can be told while it runs. Shared by all workers of a node.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// REALM (RFC 8489 §14.9), 1..=127 characters. Up to 20 bytes keep a 401 within three times the smallest request
    /// (abuse.md D).
    pub realm: String,
    /// TURN REST secrets.
    pub rest_secrets: KeyRing,
    /// Keys of nonces, the same on every member.
    pub nonce_keys: KeyRing,
    /// Users with fixed passwords.
    pub static_users: Vec<StaticUser>,
    /// Which peers may be reached.
    pub policy: Policy,
    /// Bounds.
    pub limits: Limits,
    /// Allocate is refused with 508, once authenticated; what exists goes on.
    pub draining: bool,
}
