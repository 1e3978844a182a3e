//! What the backbone of this relay is set to.

use std::net::{IpAddr, SocketAddr};

use turn_core::policy::Network;

/// Checked settings of the backbone.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This relay's node id, as in its certificate (`turnpike://relay/<node>`).
    pub node_id: String,
    /// UDP addresses of the links: at most one of each family. Port 0 binds any.
    pub listen: Vec<SocketAddr>,
    /// IPs of this relay that other members may send to: its advertised relay IPs.
    pub relay_ips: Vec<IpAddr>,
    /// A link whose far end has an address in one of these is private: nobody else's traffic is on it.
    pub private_networks: Vec<Network>,
    /// What a private link may use, in bits per second; where none is said it is found by measuring.
    pub capacity: Option<u64>,
    /// Whether packets leave by plain UDP while a link is not usable; else they are dropped.
    pub plain_udp: bool,
}

impl Settings {
    /// Whether a link to this address is private.
    pub(super) fn is_private(&self, ip: IpAddr) -> bool {
        self.private_networks.iter().any(|network| network.contains(ip.to_canonical()))
    }
}

/// The relay's certificate of the cluster, as PEM texts: what its session with the controller uses too.
#[derive(Clone, Eq, PartialEq)]
pub struct Identity {
    /// The authority of the cluster.
    pub ca: Vec<u8>,
    /// The certificate, then its chain.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Identity").finish_non_exhaustive()
    }
}

/// Why the backbone cannot start, or cannot take a certificate.
#[derive(Debug, thiserror::Error)]
pub enum BackboneError {
    /// An address cannot be bound.
    #[error("the backbone cannot listen on {address}: {error}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        error: std::io::Error,
    },
    /// There is nothing to listen on, or two addresses of a family.
    #[error("the backbone needs one address to listen on, or one of each family")]
    Addresses,
    /// A PEM text holds nothing that can be used.
    #[error("the {what} of this relay cannot be used for the backbone: {error}")]
    Identity {
        /// Which text.
        what: &'static str,
        /// The library's words.
        error: String,
    },
    /// The certificate is of another node, or of no relay.
    #[error("the certificate is not of relay {node:?}: make one for turnpike://relay/{node}")]
    Foreign {
        /// This relay.
        node: String,
    },
    /// A thread or a descriptor cannot be had.
    #[error("the backbone cannot start: {0}")]
    System(#[from] std::io::Error),
}
