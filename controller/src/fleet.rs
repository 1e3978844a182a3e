//! Nodes as the store and their reports show them (pure), and the watched view of them ([`FleetView`]).

mod bookkeeping;
mod claim;
mod ownership;
mod view;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use turn_core::Transport;

pub use bookkeeping::{FleetChange, FleetEvent};
pub(crate) use claim::owner_key;
pub use claim::{Claim, ClaimError, Lost};
pub use ownership::{Claimant, Decision, Granted, decide_owner};
pub use view::{FleetView, ViewOptions, unix_ms};

/// `nodes/<id>`: what a relay said of itself when it joined. JSON in the store, so that `etcdctl get` can be read.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NodeRecord {
    /// Identity, from the certificate.
    pub node_id: String,
    /// Region it serves.
    pub region: String,
    /// Zone inside it; may be empty.
    pub zone: String,
    /// Version of its binary.
    pub version: String,
    /// Identity of its allocations.
    pub relay_address: IpAddr,
    /// Advertised relay IPs.
    pub relay_ips: Vec<IpAddr>,
    /// Where clients reach it.
    pub listeners: Vec<NodeListener>,
    /// Host name of its TLS and DTLS listeners; empty is their IP.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub public_host: String,
    /// Ports of relayed addresses, inclusive.
    pub relay_ports: (u16, u16),
    /// Worker threads.
    pub workers: u32,
    /// 0 is no limit.
    pub max_allocations: u64,
    /// Random per process.
    pub boot_id: String,
    /// Unix ms.
    pub registered_at: u64,
    /// The lease of this node's keys, so that any replica can renew it.
    pub lease: i64,
}

/// A client-facing address of a node.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NodeListener {
    /// Transport.
    #[serde(with = "transport_name")]
    pub transport: Transport,
    /// Advertised address.
    pub address: SocketAddr,
}

/// `owners/<relay address>`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct OwnerRecord {
    /// Who.
    pub node_id: String,
    /// Under which epoch.
    pub epoch: u64,
    /// Random per control session and drawn anew after every write of unknown outcome: a guard on the whole value
    /// then also refuses what an older session, or a delayed copy of an older transaction, still tries to write.
    #[serde(default)]
    pub session: String,
}

/// `load/<id>`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct LoadRecord {
    /// Allocations held.
    pub allocations: u64,
    /// Relayed packets since the process began.
    pub packets: u64,
    /// Relayed bytes since the process began.
    pub bytes: u64,
    /// Relayed bytes in the last second.
    pub bytes_per_second: u64,
    /// CPU of the busiest worker, 0..=1000.
    pub busiest_worker_permille: u32,
    /// Packets dropped since the process began.
    pub dropped: u64,
    /// Asked to be left out of discovery.
    pub draining: bool,
    /// Its stream broke; the lease still runs.
    #[serde(default)]
    pub suspect: bool,
    /// Unix ms.
    pub reported_at: u64,
}

/// A node with everything known of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeView {
    /// What it said when it joined.
    pub record: NodeRecord,
    /// Epoch under which it owns its address.
    pub epoch: u64,
    /// Its last report.
    pub load: LoadRecord,
}

/// Above these a node is overloaded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Thresholds {
    /// CPU of the busiest worker, 1..=1000 thousandths.
    pub cpu_permille: u32,
    /// Share of `max_allocations` in use, 1..=100 per cent; a node without a limit has no such threshold.
    pub allocations_percent: u64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { cpu_permille: 850, allocations_percent: 90 }
    }
}

/// What a node is good for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum NodeState {
    /// Takes new clients.
    Ready,
    /// Asked to be left out of discovery.
    Draining,
    /// Above a threshold: left out of discovery while others are not.
    Overloaded,
    /// Its stream is broken, or it vanished in a store outage: it may be gone.
    Suspect,
}

impl std::fmt::Display for NodeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Overloaded => "overloaded",
            Self::Suspect => "suspect",
        })
    }
}

impl NodeView {
    /// Its state, worst reason first: suspect, draining, overloaded.
    pub fn state(&self, thresholds: &Thresholds) -> NodeState {
        let limit = self.record.max_allocations;
        let full = limit > 0
            && u128::from(self.load.allocations) * 100
                >= u128::from(limit) * u128::from(thresholds.allocations_percent);
        if self.load.suspect {
            NodeState::Suspect
        } else if self.load.draining {
            NodeState::Draining
        } else if full || self.load.busiest_worker_permille >= thresholds.cpu_permille {
            NodeState::Overloaded
        } else {
            NodeState::Ready
        }
    }
}

/// The fleet at one moment: what steering, the console and the CLI look at. Kept by a watch, replaced whole.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Snapshot {
    /// By node id.
    pub nodes: BTreeMap<String, NodeView>,
}

impl Snapshot {
    /// The node that serves a relay address: the one that owns it, else one that says it is its address.
    pub fn node_of(&self, relay_address: IpAddr) -> Option<&NodeView> {
        self.nodes.values().filter(|node| node.record.relay_address == relay_address).max_by_key(|node| node.epoch)
    }
}

mod transport_name {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use turn_core::Transport;

    pub(super) fn serialize<S: Serializer>(transport: &Transport, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
            Transport::Tls => "tls",
            Transport::Dtls => "dtls",
        })
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Transport, D::Error> {
        match String::deserialize(d)?.as_str() {
            "udp" => Ok(Transport::Udp),
            "tcp" => Ok(Transport::Tcp),
            "tls" => Ok(Transport::Tls),
            "dtls" => Ok(Transport::Dtls),
            other => Err(D::Error::custom(format!("unknown transport {other:?}"))),
        }
    }
}
