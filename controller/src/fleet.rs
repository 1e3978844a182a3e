//! Nodes as the store and their reports show them (pure), and the watched view of them ([`FleetView`]).

mod bookkeeping;
mod claim;
pub mod drain;
mod links;
mod ownership;
pub mod revoked;
#[cfg(test)]
pub(crate) mod sample;
mod view;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use turn_core::Transport;

pub use bookkeeping::{FleetChange, FleetEvent};
pub(crate) use claim::owner_key;
pub use claim::{Claim, ClaimError, Lost, Reported};
pub use drain::{ByTransport, DrainRecord, Drains};
pub use links::{LinkPath, LinkRecord, LinkState};
pub use ownership::{Claimant, Decision, Granted, Patience, decide_owner};
pub use revoked::{Revoked, RevokedRecord};
pub use view::{FleetView, ViewOptions, unix_ms};
pub(crate) use waiting::Post;

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
    /// Whoever else is configured with the address is preferred.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub standby: bool,
    /// It waits for the address: the record is one of `waiting/<id>`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waiting: bool,
    /// Where other members reach its backbone, best first; none is a relay without one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backbone: Vec<SocketAddr>,
    /// Its relayed addresses are reached by the backbone alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cluster_only: bool,
}

/// A client-facing address of a node.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NodeListener {
    /// Transport.
    #[serde(with = "transport_name")]
    pub transport: Transport,
    /// Advertised address.
    pub address: SocketAddr,
    /// TLS and DTLS: the certificate of clients that ask for no name is valid for the address.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ip_in_certificate: bool,
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
    /// The allocations by transport; all 0 if the relay does not say.
    #[serde(default)]
    pub by_transport: ByTransport,
    /// Revision of the settings in force on the relay; 0 if it does not say.
    #[serde(default)]
    pub settings_revision: u64,
    /// When the relay ends itself because it was told to stop, Unix ms; 0 if it does not.
    #[serde(default)]
    pub ends_at: u64,
    /// Its journal cannot be written: its records are in the store alone.
    #[serde(default)]
    pub journal_failed: bool,
    /// It says itself that it has enough to do.
    #[serde(default)]
    pub overloaded: bool,
    /// Its end of every backbone link.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<LinkRecord>,
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
    /// An operator wants it empty.
    pub drain: Option<DrainRecord>,
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
    /// Takes no new clients.
    Draining,
    /// Above a threshold, or it says so itself: left out of discovery while others are not.
    Overloaded,
    /// Its stream is broken, or it vanished in a store outage: it may be gone.
    Suspect,
    /// It waits for its address, which another one owns.
    Standby,
}

impl std::fmt::Display for NodeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Overloaded => "overloaded",
            Self::Suspect => "suspect",
            Self::Standby => "standby",
        })
    }
}

impl NodeView {
    /// Whether it takes no new clients: an operator said so, or it says so itself, or it was told to stop.
    pub fn drains(&self) -> bool {
        self.drain.is_some() || self.load.draining || self.load.ends_at > 0
    }

    /// Whether at `now` (Unix ms) it is not empty yet and was to be.
    pub fn is_overdue(&self, now: u64) -> bool {
        self.load.allocations > 0 && self.drain.as_ref().is_some_and(|drain| (1..=now).contains(&drain.deadline))
    }

    /// Its state, worst reason first: suspect, draining, overloaded.
    pub fn state(&self, thresholds: &Thresholds) -> NodeState {
        let limit = self.record.max_allocations;
        let full = limit > 0
            && u128::from(self.load.allocations) * 100
                >= u128::from(limit) * u128::from(thresholds.allocations_percent);
        if self.record.waiting {
            NodeState::Standby
        } else if self.load.suspect {
            NodeState::Suspect
        } else if self.drains() {
            NodeState::Draining
        } else if self.load.overloaded || full || self.load.busiest_worker_permille >= thresholds.cpu_permille {
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
    /// Nodes that an operator wants empty, also those that are not there.
    pub drains: Drains,
    /// Relays whose certificates are refused, also those that are not there.
    pub revoked: Revoked,
    /// Relays that wait for an address which another one owns, by node id. They take no clients.
    pub waiting: BTreeMap<String, NodeRecord>,
    /// A node that is not in `nodes` is gone: its silence is nobody else's fault.
    pub settled: bool,
    /// Addresses whose owner was seen to live and to leave since silence was last somebody else's fault.
    pub departed: BTreeSet<IpAddr>,
    /// Replicas of the controller that live, as far as is known.
    pub controllers: u32,
}

impl Snapshot {
    /// Whether nobody serves a relay address for sure, so that a relay which waits for it may have it.
    pub fn is_vacant(&self, relay_address: IpAddr) -> bool {
        let is_served = self.nodes.values().any(|node| node.record.relay_address == relay_address);
        !is_served && (self.settled || self.departed.contains(&relay_address))
    }

    /// Every node, also those that wait for their address, in order of their ids: for people, never for clients.
    pub fn everyone(&self) -> Vec<NodeView> {
        let waiting = self.waiting.values().map(|record| NodeView {
            record: record.clone(),
            epoch: 0,
            load: LoadRecord::default(),
            drain: self.drains.get(&record.node_id).cloned(),
        });
        // One that has just lost its address, or got it, may be in both.
        let serves = |id: &str| self.nodes.get(id).is_some_and(|node| !node.load.suspect);
        let nodes = self.nodes.iter().filter(|(id, node)| !node.load.suspect || !self.waiting.contains_key(*id));
        let waiting = waiting.filter(|node| !serves(&node.record.node_id));
        let mut all: Vec<NodeView> = nodes.map(|(_, node)| node.clone()).chain(waiting).collect();
        all.sort_by(|a, b| a.record.node_id.cmp(&b.record.node_id));
        all
    }

    /// The relay that a standby gives its address back to: one that waits for it and is none itself.
    pub fn preferred(&self, relay_address: IpAddr) -> Option<&NodeRecord> {
        self.waiting.values().find(|record| record.relay_address == relay_address && !record.standby)
    }

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
