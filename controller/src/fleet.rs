//! Nodes as the store and their reports show them (pure).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use turn_core::Transport;

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

/// The fleet at one moment: what steering, the console and the CLI look at. Kept by a watch, replaced whole.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Snapshot {
    /// By node id.
    pub nodes: BTreeMap<String, NodeView>,
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
