//! The tables `[limits]` and `[features]`: bounds beyond the plain keys, and extensions that can be switched off.

use serde::Deserialize;

use super::ConfigError;

/// The least `strangers_per_prefix` that is a limit.
const MIN_STRANGERS: u32 = 200;

/// Bounds; 0 is no limit where the key says so.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Permissions of one allocation, 1..=65535.
    pub permissions_per_allocation: u32,
    /// Channels of one allocation, 1..=4096.
    pub channels_per_allocation: u32,
    /// Answers a second that one source prefix (IPv4 /24, IPv6 /56) gets from a worker before it has authenticated, at
    /// least 200; 0 for no limit.
    pub strangers_per_prefix: u32,
    /// Bytes a second an allocation relays in each direction, headers counted; 0 for no limit.
    pub bytes_per_allocation: u64,
    /// As `bytes_per_allocation`, for all allocations of one user on this node.
    pub bytes_per_user: u64,
    /// As `bytes_per_allocation`, for all allocations of this node.
    pub bytes_per_node: u64,
    /// Packets a second an allocation relays in each direction; 0 for no limit.
    pub packets_per_allocation: u32,
    /// As `packets_per_allocation`, for all allocations of one user on this node.
    pub packets_per_user: u32,
    /// TCP connections to peers of one allocation (RFC 6062).
    pub peer_connections_per_allocation: u32,
    /// Stream connections per worker that have not shown what they are, or not ended their TLS handshake, and again DTLS
    /// handshakes per worker that have not ended; one more closes the oldest.
    pub handshakes: u32,
    /// Seconds a connection, or a DTLS session, may be one of those, 1..=300.
    pub handshake_seconds: u16,
    /// Stream connections without an allocation of one source (an IPv4 address, an IPv6 /56) on this relay; 0 for no
    /// limit.
    pub connections_per_prefix: u32,
    /// Connections passed to `web_server` at a time.
    pub web_connections: u32,
    /// DTLS sessions per worker, 1..=16777216; one more is not begun.
    pub dtls_sessions: u32,
}

impl Default for Limits {
    fn default() -> Self {
        let core = turn_core::Limits::default();
        Self {
            permissions_per_allocation: core.permissions_per_allocation as u32,
            channels_per_allocation: core.channels_per_allocation as u32,
            strangers_per_prefix: core.strangers_per_prefix,
            bytes_per_allocation: core.bytes_per_allocation,
            bytes_per_user: core.bytes_per_user,
            bytes_per_node: core.bytes_per_node,
            packets_per_allocation: core.packets_per_allocation,
            packets_per_user: core.packets_per_user,
            peer_connections_per_allocation: core.peer_connections_per_allocation as u32,
            handshakes: 1024,
            handshake_seconds: 10,
            connections_per_prefix: 1000,
            web_connections: 1000,
            dtls_sessions: 10_000,
        }
    }
}

impl Limits {
    /// The bounds the protocol keeps.
    pub(super) fn check(&self) -> Result<turn_core::Limits, ConfigError> {
        let rows = [
            ("permissions_per_allocation", self.permissions_per_allocation, 65_535),
            ("channels_per_allocation", self.channels_per_allocation, 4096),
            ("peer_connections_per_allocation", self.peer_connections_per_allocation, 65_535),
        ];
        for (key, value, most) in rows {
            if !(1..=most).contains(&value) {
                return Err(ConfigError::new(format!("limits.{key}"), format!("{value} is not in 1..={most}")));
            }
        }
        // abuse.md D: below a few hundred, people behind one large NAT would keep one another out.
        if (1..MIN_STRANGERS).contains(&self.strangers_per_prefix) {
            let problem = format!(
                "{} is too few for a prefix with many people; at least {MIN_STRANGERS}, or 0 for no limit",
                self.strangers_per_prefix
            );
            return Err(ConfigError::new("limits.strangers_per_prefix", problem));
        }
        Ok(turn_core::Limits {
            permissions_per_allocation: self.permissions_per_allocation as usize,
            channels_per_allocation: self.channels_per_allocation as usize,
            strangers_per_prefix: self.strangers_per_prefix,
            bytes_per_allocation: self.bytes_per_allocation,
            bytes_per_user: self.bytes_per_user,
            bytes_per_node: self.bytes_per_node,
            packets_per_allocation: self.packets_per_allocation,
            packets_per_user: self.packets_per_user,
            peer_connections_per_allocation: self.peer_connections_per_allocation as usize,
            ..turn_core::Limits::default()
        })
    }
}

/// Extensions of RFC 8656 and RFC 8489; what is off is declined as its RFC says.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Features {
    /// TCP allocations (RFC 6062).
    pub tcp_allocations: bool,
    /// Mobility (RFC 8016).
    pub mobility: bool,
    /// SHA-256 and USERHASH (RFC 8489 §9.2).
    pub sha256: bool,
}

impl Default for Features {
    fn default() -> Self {
        let turn_core::Features { tcp_allocations, mobility, sha256 } = turn_core::Features::default();
        Self { tcp_allocations, mobility, sha256 }
    }
}

impl From<Features> for turn_core::Features {
    fn from(Features { tcp_allocations, mobility, sha256 }: Features) -> Self {
        Self { tcp_allocations, mobility, sha256 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_have_a_least() {
        for (value, good) in [(0, true), (1, false), (199, false), (200, true), (u32::MAX, true)] {
            let limits = Limits { strangers_per_prefix: value, ..Limits::default() };
            let checked = limits.check().map(|limits| limits.strangers_per_prefix);
            assert_eq!(checked.as_ref().ok().copied(), good.then_some(value));
            if let Err(error) = checked {
                assert!(error.to_string().starts_with("limits.strangers_per_prefix: "), "{error}");
            }
        }
    }
}
