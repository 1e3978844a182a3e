//! What the console and `/v1/nodes` show, as JSON. No secrets in it.

use std::collections::HashMap;

use serde::Serialize;
use turn_core::Transport;
use turn_core::text::escape;

use super::draining;
use crate::allocations::{AllocationChange, AllocationEvent, Found};
use crate::fleet::{
    ByTransport, DrainRecord, FleetChange, FleetEvent, LinkPath, LinkRecord, NodeState, NodeView, Snapshot, Thresholds,
};

/// A relay.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeJson {
    id: String,
    region: String,
    zone: String,
    state: String,
    /// Why it is not ready; empty when it is.
    reason: String,
    /// `udp://192.0.2.1:3478`.
    listeners: Vec<String>,
    /// Host name in `turns:` URIs; empty is the IP.
    public_host: String,
    allocations: u64,
    by_transport: ByTransport,
    /// Told to drain by an operator; `null` when it is not.
    drain: Option<DrainJson>,
    /// When it ends itself, Unix ms; 0 when it does not.
    ends_at: u64,
    /// Its records are in the store alone: its journal cannot be written.
    journal_failed: bool,
    packets_per_second: u64,
    bytes_per_second: u64,
    cpu_permille: u32,
    epoch: u64,
    version: String,
    /// `null` before the first report.
    last_report_ms_ago: Option<u64>,
    /// Its end of every backbone link.
    links: Vec<LinkJson>,
}

/// One end of a backbone link.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkJson {
    to: String,
    path: LinkPath,
    /// The relay in between, else empty.
    via: String,
    why: String,
    /// 0 before the first measurement.
    rtt_us: u32,
    loss_permille: u32,
}

impl LinkJson {
    fn new(link: &LinkRecord) -> Self {
        let LinkRecord { to, path, via, why, rtt_us, loss_permille, .. } = link.clone();
        Self { to, path, via, why, rtt_us, loss_permille }
    }
}

impl NodeJson {
    /// The node as it looks at `now` (Unix ms).
    pub fn new(node: &NodeView, thresholds: &Thresholds, rates: &Rates, now: u64) -> Self {
        let NodeView { record, load, epoch, drain } = node;
        let listener = |l: &crate::fleet::NodeListener| format!("{}://{}", transport_name(l.transport), l.address);
        Self {
            id: record.node_id.clone(),
            region: record.region.clone(),
            zone: record.zone.clone(),
            state: node.state(thresholds).to_string(),
            reason: reason(node, thresholds, now),
            listeners: record.listeners.iter().map(listener).collect(),
            public_host: record.public_host.clone(),
            allocations: load.allocations,
            by_transport: load.by_transport,
            drain: drain.as_ref().map(|drain| DrainJson::new(drain, now)),
            ends_at: load.ends_at,
            journal_failed: load.journal_failed,
            packets_per_second: rates.of(&record.node_id),
            bytes_per_second: load.bytes_per_second,
            cpu_permille: load.busiest_worker_permille,
            epoch: *epoch,
            version: record.version.clone(),
            last_report_ms_ago: (load.reported_at > 0).then(|| now.saturating_sub(load.reported_at)),
            links: load.links.iter().map(LinkJson::new).collect(),
        }
    }
}

/// An operator's word that a relay shall get empty.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DrainJson {
    by: String,
    since_ms_ago: u64,
    /// `null` without a deadline; negative past it.
    deadline_in_ms: Option<i64>,
}

impl DrainJson {
    fn new(drain: &DrainRecord, now: u64) -> Self {
        let until = |deadline: u64| i64::try_from(i128::from(deadline) - i128::from(now)).unwrap_or(i64::MAX);
        Self {
            by: drain.by.clone(),
            since_ms_ago: now.saturating_sub(drain.since),
            deadline_in_ms: (drain.deadline > 0).then(|| until(drain.deadline)),
        }
    }
}

/// An allocation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AllocationJson {
    id: String,
    node: String,
    /// As [`escape`] writes it.
    user: String,
    client: String,
    transport: &'static str,
    /// Advertised, several separated by a space.
    relayed: String,
    permissions: usize,
    channels: usize,
    age_s: u64,
    expires_s: u64,
}

impl AllocationJson {
    /// The allocation as it looks at `now` (Unix ms). Permissions and channels that have run out are not counted.
    pub fn new(found: &Found, now: u64) -> Self {
        let record = &found.record;
        let relayed: Vec<String> = record.relayed.iter().map(|relayed| relayed.advertised.to_string()).collect();
        Self {
            id: record.id.to_text(),
            node: found.node_id.clone(),
            user: escape(&record.username),
            client: record.five_tuple.client.to_string(),
            transport: transport_name(record.five_tuple.transport),
            relayed: relayed.join(" "),
            permissions: record.permissions.iter().filter(|(_, until)| *until > now).count(),
            channels: record.channels.iter().filter(|(_, _, until)| *until > now).count(),
            age_s: now.saturating_sub(record.created_at) / 1000,
            expires_s: record.expires_at.saturating_sub(now) / 1000,
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EventJson {
    /// Unix ms.
    at: u64,
    kind: &'static str,
    node: String,
    detail: String,
}

impl EventJson {
    /// Something happened to a node.
    pub fn of_node(event: &FleetEvent) -> Self {
        let (kind, detail) = match &event.change {
            FleetChange::Joined => ("node_joined", ""),
            FleetChange::Left => ("node_left", ""),
            FleetChange::Changed(detail) => ("node_changed", detail.as_str()),
        };
        Self { at: event.at, kind, node: event.node_id.clone(), detail: detail.to_owned() }
    }
}

impl EventJson {
    /// An allocation came or went; the fleet says on which node.
    pub fn of_allocation(event: &AllocationEvent, snapshot: &Snapshot) -> Self {
        let node = snapshot.node_of(event.relay_address);
        Self {
            at: event.at,
            kind: match event.change {
                AllocationChange::Created => "allocation_created",
                AllocationChange::Ended => "allocation_ended",
            },
            node: node.map_or_else(|| event.relay_address.to_string(), |node| node.record.node_id.clone()),
            detail: escape(&event.username),
        }
    }
}

/// Why a node is not ready at `now` (Unix ms), for people; empty when it is.
pub fn reason(node: &NodeView, thresholds: &Thresholds, now: u64) -> String {
    match node.state(thresholds) {
        NodeState::Ready => String::new(),
        NodeState::Draining => draining::describe(node, now),
        NodeState::Standby => format!("waits for {}", node.record.relay_address),
        NodeState::Suspect => "lost its connection to the controllers".to_owned(),
        NodeState::Overloaded if node.load.busiest_worker_permille >= thresholds.cpu_permille => {
            format!("busiest worker at {} %", node.load.busiest_worker_permille / 10)
        }
        NodeState::Overloaded if node.load.overloaded => "it says it has enough to do".to_owned(),
        NodeState::Overloaded => {
            format!("{} of at most {} allocations", node.load.allocations, node.record.max_allocations)
        }
    }
}

/// The transport as URIs of listeners write it.
pub fn transport_name(transport: Transport) -> &'static str {
    match transport {
        Transport::Udp => "udp",
        Transport::Tcp => "tcp",
        Transport::Tls => "tls",
        Transport::Dtls => "dtls",
    }
}

/// Packets a second of every node, from the counters in its reports.
#[derive(Debug, Default)]
pub struct Rates(HashMap<String, Rate>);

#[derive(Debug)]
struct Rate {
    reported_at: u64,
    packets: u64,
    per_second: u64,
}

impl Rates {
    /// Takes in what was reported since the last call.
    pub fn update(&mut self, snapshot: &Snapshot) {
        self.0.retain(|id, _| snapshot.nodes.contains_key(id));
        for (id, node) in &snapshot.nodes {
            let (reported_at, packets) = (node.load.reported_at, node.load.packets);
            let before = self.0.get(id);
            let per_second = match before {
                Some(rate) if rate.reported_at == reported_at => rate.per_second,
                // A counter that went back belongs to a new process.
                Some(rate) => {
                    let more = packets.saturating_sub(rate.packets);
                    more.saturating_mul(1000) / reported_at.saturating_sub(rate.reported_at).max(1)
                }
                None => 0,
            };
            self.0.insert(id.clone(), Rate { reported_at, packets, per_second });
        }
    }

    /// Packets a second of a node over its last two reports.
    pub fn of(&self, node_id: &str) -> u64 {
        self.0.get(node_id).map_or(0, |rate| rate.per_second)
    }
}
