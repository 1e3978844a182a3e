//! What a server is configured with; replaced whole by [`Input::Configure`](crate::Input::Configure).

use std::net::SocketAddr;

use crate::{Policy, ThirdParty, Transport};

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
    /// Answers a second that one source prefix (an IPv4 /24, an IPv6 /56) gets from a worker before it has
    /// authenticated, 0 for no limit; what is beyond gets silence (abuse.md D).
    pub strangers_per_prefix: u32,
    /// Bytes a second an allocation relays in each direction, IP and UDP headers counted, 0 for no limit. What is
    /// beyond, after a burst of a second, is dropped.
    pub bytes_per_allocation: u64,
    /// As `bytes_per_allocation`, of all allocations of one user on this node.
    pub bytes_per_user: u64,
    /// As `bytes_per_allocation`, of all allocations of this node.
    pub bytes_per_node: u64,
    /// Packets a second an allocation relays in each direction, 0 for no limit. What is beyond, after a burst of a
    /// second, is dropped. The data connections of TCP allocations (RFC 6062) have no packets and no such limit.
    pub packets_per_allocation: u32,
    /// As `packets_per_allocation`, of all allocations of one user on this node.
    pub packets_per_user: u32,
    /// Most TCP connections to peers an allocation has (RFC 6062); one more is 508, or is not accepted.
    pub peer_connections_per_allocation: usize,
}

/// Extensions that can be switched off; what is off is declined as its RFC says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Features {
    /// TCP allocations (RFC 6062).
    pub tcp_allocations: bool,
    /// Mobility (RFC 8016).
    pub mobility: bool,
    /// SHA-256 and USERHASH are offered (RFC 8489 §9.2).
    pub sha256: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self { tcp_allocations: true, mobility: true, sha256: true }
    }
}

impl Limits {
    /// Whether any bandwidth or packet rate is limited.
    pub fn has_rates(&self) -> bool {
        self.bytes_per_allocation != 0 || self.packets_per_allocation != 0 || self.has_shared_rates()
    }

    /// Whether any is limited that allocations share.
    pub fn has_shared_rates(&self) -> bool {
        self.bytes_per_user | self.bytes_per_node != 0 || self.packets_per_user != 0
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_lifetime: 3600,
            permissions_per_allocation: 256,
            channels_per_allocation: 256,
            nonce_lifetime: 3600,
            strangers_per_prefix: 1000,
            bytes_per_allocation: 0,
            bytes_per_user: 0,
            bytes_per_node: 0,
            packets_per_allocation: 0,
            packets_per_user: 0,
            peer_connections_per_allocation: 64,
        }
    }
}

/// Everything a server can be told while it runs. Shared by all workers of a node.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// REALM (RFC 8489 §14.9), 1..=127 characters.
    ///
    /// No answer to a stranger's datagram is longer than three times the request (abuse.md D). Up to 36 bytes of realm
    /// let a 401 be short enough for any request at all; up to 60 bytes, for any that is an Allocate in earnest, with
    /// REQUESTED-TRANSPORT in it. Where it cannot be, silence is the answer.
    pub realm: String,
    /// TURN REST secrets.
    pub rest_secrets: KeyRing,
    /// Keys of nonces, the same on every member.
    pub nonce_keys: KeyRing,
    /// Other members may have newer `nonce_keys`. An Allocate with a nonce under a key that is not among them is met with
    /// silence, not with 438, which ends the attempt of a browser; the next retransmission finds this member informed.
    pub nonce_keys_may_lag: bool,
    /// Users with fixed passwords.
    pub static_users: Vec<StaticUser>,
    /// Which peers may be reached.
    pub policy: Policy,
    /// Bounds.
    pub limits: Limits,
    /// Extensions that are offered.
    pub features: Features,
    /// Whose access tokens are taken (RFC 7635); none switches third-party authorization off.
    pub third_party: Option<ThirdParty>,
    /// Records may be missing that will come later: a request about an allocation that is not known is not answered,
    /// because the allocation may be among them (promise P5).
    pub restoring: bool,
    /// New clients are sent elsewhere, because this server is to become empty. What exists goes on, and where there is no
    /// alternate new clients are served too: better here than nowhere.
    pub draining: bool,
    /// New clients are sent elsewhere, because this server has enough to do. As `draining` otherwise.
    pub overloaded: bool,
    /// Where they are sent, best first: listeners of other members that take new clients. Never this server's own.
    pub alternates: Vec<Alternate>,
}

/// A listener of another server of the cluster (RFC 8489 §10).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Alternate {
    /// How clients reach it; over TLS and DTLS its certificate names the IP, because that is all a client has of it then.
    pub transport: Transport,
    /// Where.
    pub address: SocketAddr,
    /// Whether that server has relayed addresses of IPv6, for clients that ask for one.
    pub relays_ipv6: bool,
}
