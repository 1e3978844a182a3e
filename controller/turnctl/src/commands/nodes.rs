//! `turnctl nodes`, `turnctl regions`: the relays and where they are.

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::steering_client::SteeringClient;
use turnpike_proto::v1::{
    ListNodesRequest, Node, NodeDrain, NodeState, Region, RegionsRequest, Transport, TransportAllocations,
};

use super::{transport_name, watch};
use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::Result;
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Show the relays, their state and load
#[derive(Args, Debug)]
#[command(visible_alias = "node", after_help = NODES_EXAMPLES)]
pub(crate) struct NodesArgs {
    /// Only relays of this region
    #[arg(long)]
    region: Option<String>,
    /// Show them again each second
    #[arg(short, long)]
    pub(crate) watch: bool,
}

const NODES_EXAMPLES: &str = "\
Examples:
  turnctl nodes                   all relays
  turnctl nodes --region eu -w    those of one region, as they change
  turnctl nodes -o wide           with clients by transport, drains, versions";

/// Show the regions with their relays and allocations
#[derive(Args, Debug)]
#[command(visible_alias = "region", after_help = REGIONS_EXAMPLES)]
pub(crate) struct RegionsArgs {}

const REGIONS_EXAMPLES: &str = "\
Examples:
  turnctl regions
  turnctl regions -o json | jq '.regions[].name'";

pub(crate) async fn run(args: &NodesArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let region = args.region.clone().unwrap_or_default();
    if args.watch {
        return watch(connection, output, async |cluster| fetch(cluster, &region).await).await;
    }
    output.show(&fetch(&connection.connect().await?, &region).await?)
}

/// The relays of a region; of all when it is empty.
pub(crate) async fn fetch(cluster: &Cluster, region: &str) -> Result<NodesView> {
    let answer = AdminClient::new(cluster.channel.clone())
        .list_nodes(ListNodesRequest { region: region.to_owned() })
        .await
        .map_err(|status| cluster.failure("list the nodes", &status))?;
    let mut nodes: Vec<_> = answer.into_inner().nodes.into_iter().map(NodeView::from).collect();
    nodes.sort_by(|a, b| (&a.region, &a.node_id).cmp(&(&b.region, &b.node_id)));
    Ok(NodesView { nodes })
}

/// What `turnctl nodes` shows.
#[derive(Debug, Serialize)]
pub(crate) struct NodesView {
    pub(crate) nodes: Vec<NodeView>,
}

/// A relay as the controller sees it.
#[derive(Debug, Serialize)]
pub(crate) struct NodeView {
    pub(crate) node_id: String,
    pub(crate) region: String,
    zone: String,
    pub(crate) state: State,
    version: String,
    relay_address: String,
    listeners: Vec<ListenerView>,
    /// Host name in `turns:` URIs; empty is the IP.
    public_host: String,
    epoch: u64,
    workers: u32,
    pub(crate) load: LoadView,
    /// Told to drain by an operator.
    pub(crate) drain: Option<DrainView>,
    registered_at: Option<String>,
    last_report_at: Option<String>,
    #[serde(skip)]
    registered_at_ms: u64,
    #[serde(skip)]
    pub(crate) last_report_at_ms: u64,
}

#[derive(Debug, Serialize)]
struct ListenerView {
    transport: &'static str,
    address: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct LoadView {
    pub(crate) allocations: u64,
    pub(crate) by_transport: ByTransport,
    busiest_worker_permille: u32,
    bytes_per_second: u64,
    packets: u64,
    bytes: u64,
    dropped: u64,
    /// As the relay says of itself.
    pub(crate) draining: bool,
    overloaded: bool,
    /// Its records are in the store alone.
    pub(crate) journal_failed: bool,
    /// 0 if it does not say.
    settings_revision: u64,
    /// When it ends itself, because it was told to stop.
    ends_at: Option<String>,
    #[serde(skip)]
    ends_at_ms: u64,
}

/// Allocations by the transport of their clients; all 0 where a relay does not say.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub(crate) struct ByTransport {
    udp: u64,
    tcp: u64,
    tls: u64,
    dtls: u64,
}

impl ByTransport {
    fn new(counts: &[TransportAllocations]) -> Self {
        let of = |transport: Transport| {
            let counts = counts.iter().filter(|count| count.transport() == transport);
            counts.fold(0_u64, |sum, count| sum.saturating_add(count.allocations))
        };
        Self { udp: of(Transport::Udp), tcp: of(Transport::Tcp), tls: of(Transport::Tls), dtls: of(Transport::Dtls) }
    }

    /// `udp 9, tls 3`; `None` for none at all.
    pub(crate) fn text(&self) -> Option<String> {
        let counts = [("udp", self.udp), ("tcp", self.tcp), ("tls", self.tls), ("dtls", self.dtls)];
        let counts = counts.iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{name} {count}"));
        Some(counts.collect::<Vec<_>>().join(", ")).filter(|text| !text.is_empty())
    }
}

/// An operator's word that a relay shall get empty.
#[derive(Debug, Serialize)]
pub(crate) struct DrainView {
    since: Option<String>,
    deadline: Option<String>,
    by: String,
    #[serde(skip)]
    since_ms: u64,
    #[serde(skip)]
    deadline_ms: u64,
}

impl From<NodeDrain> for DrainView {
    fn from(drain: NodeDrain) -> Self {
        Self {
            since: units::timestamp(drain.since),
            deadline: units::timestamp(drain.deadline),
            by: drain.by,
            since_ms: drain.since,
            deadline_ms: drain.deadline,
        }
    }
}

/// State of a relay in the controller's eyes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Ready,
    Draining,
    Overloaded,
    Suspect,
    Standby,
    Unknown,
}

impl State {
    fn cell(self) -> Cell {
        match self {
            Self::Ready => Cell::toned("ready", Tone::Good),
            Self::Draining => Cell::toned("draining", Tone::Attention),
            Self::Overloaded => Cell::toned("overloaded", Tone::Attention),
            Self::Suspect => Cell::toned("suspect", Tone::Bad),
            Self::Standby => Cell::toned("standby", Tone::Good),
            Self::Unknown => Cell::toned("unknown", Tone::Attention),
        }
    }
}

impl From<Node> for NodeView {
    fn from(node: Node) -> Self {
        let state = match node.state() {
            NodeState::Ready => State::Ready,
            NodeState::Draining => State::Draining,
            NodeState::Overloaded => State::Overloaded,
            NodeState::Suspect => State::Suspect,
            NodeState::Standby => State::Standby,
            NodeState::Unspecified => State::Unknown,
        };
        let load = node.load.unwrap_or_default();
        let listener = |listener: turnpike_proto::v1::Listener| ListenerView {
            transport: transport_name(listener.transport),
            address: listener.address,
        };
        Self {
            state,
            node_id: node.node_id,
            region: node.region,
            zone: node.zone,
            version: node.version,
            relay_address: node.relay_address,
            listeners: node.listeners.into_iter().map(listener).collect(),
            public_host: node.public_host,
            epoch: node.epoch,
            workers: node.workers,
            load: LoadView {
                allocations: load.allocations,
                by_transport: ByTransport::new(&load.by_transport),
                draining: load.draining,
                overloaded: load.overloaded,
                journal_failed: load.journal_failed,
                settings_revision: load.settings_revision,
                ends_at: units::timestamp(load.ends_at),
                ends_at_ms: load.ends_at,
                busiest_worker_permille: load.busiest_worker_permille,
                bytes_per_second: load.bytes_per_second,
                packets: load.packets,
                bytes: load.bytes,
                dropped: load.dropped,
            },
            drain: node.drain.map(DrainView::from),
            registered_at: units::timestamp(node.registered_at),
            last_report_at: units::timestamp(node.last_report_at),
            registered_at_ms: node.registered_at,
            last_report_at_ms: node.last_report_at,
        }
    }
}

impl View for NodesView {
    fn empty(&self) -> Option<&'static str> {
        self.nodes.is_empty().then_some("no nodes")
    }

    fn blocks(&self, wide: bool, now_ms: u64) -> Vec<Block> {
        let mut head = vec!["NODE", "REGION", "STATE", "ADDRESS", "ALLOCATIONS", "CPU", "TRAFFIC", "EPOCH", "AGE"];
        if wide {
            head.extend(["CLIENTS", "DRAINING", "DEADLINE", "SETTINGS"]);
            head.extend(["ZONE", "VERSION", "WORKERS", "PACKETS", "BYTES", "DROPPED", "REPORT", "HOST", "LISTENERS"]);
        }
        let rows = self.nodes.iter().map(|node| node.row(wide, now_ms)).collect();
        vec![Block::Table { head, rows }]
    }
}

impl NodeView {
    fn row(&self, wide: bool, now_ms: u64) -> Vec<Cell> {
        let load = &self.load;
        let mut row = vec![
            Cell::from(&self.node_id),
            Cell::from(&self.region),
            self.state.cell(),
            Cell::from(&self.relay_address),
            Cell::from(load.allocations.to_string()),
            Cell::from(units::permille(load.busiest_worker_permille)),
            Cell::from(units::bit_rate(load.bytes_per_second)),
            Cell::from(self.epoch.to_string()),
            Cell::from(units::age(self.registered_at_ms, now_ms)),
        ];
        if wide {
            let listeners: Vec<_> =
                self.listeners.iter().map(|it| format!("{}/{}", it.address, it.transport)).collect();
            row.extend([
                Cell::from(load.by_transport.text().unwrap_or_default()),
                Cell::from(self.drain.as_ref().map_or_else(String::new, |drain| units::age(drain.since_ms, now_ms))),
                self.deadline(now_ms),
                Cell::from(if load.settings_revision > 0 { load.settings_revision.to_string() } else { String::new() }),
                Cell::from(&self.zone),
                Cell::from(&self.version),
                Cell::from(self.workers.to_string()),
                Cell::from(load.packets.to_string()),
                Cell::from(units::bytes(load.bytes)),
                Cell::from(load.dropped.to_string()),
                Cell::from(units::age(self.last_report_at_ms, now_ms)),
                Cell::from(&self.public_host),
                Cell::from(listeners.join(",")),
            ]);
        }
        row
    }
}

impl NodeView {
    /// By when it shall be empty, or ends itself.
    fn deadline(&self, now_ms: u64) -> Cell {
        let deadline_ms = self.drain.as_ref().map_or(0, |drain| drain.deadline_ms);
        match (self.load.ends_at_ms, deadline_ms) {
            (0, 0) => Cell::from(""),
            (0, past) if past <= now_ms => {
                let tone = if self.load.allocations > 0 { Tone::Bad } else { Tone::Plain };
                Cell::toned(format!("{} ago", units::age(past, now_ms)), tone)
            }
            (0, deadline) => Cell::from(format!("in {}", units::left(deadline, now_ms))),
            (ends, _) => {
                Cell::from(format!("ends in {}", units::span(Duration::from_millis(ends.saturating_sub(now_ms)))))
            }
        }
    }
}

pub(crate) async fn regions(_: &RegionsArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let answer = SteeringClient::new(cluster.channel.clone())
        .regions(RegionsRequest {})
        .await
        .map_err(|status| cluster.failure("list the regions", &status))?;
    let mut regions: Vec<_> = answer.into_inner().regions.into_iter().map(RegionView::from).collect();
    regions.sort_by(|a, b| a.name.cmp(&b.name));
    output.show(&RegionsView { regions })
}

#[derive(Debug, Serialize)]
struct RegionsView {
    regions: Vec<RegionView>,
}

#[derive(Debug, Serialize)]
struct RegionView {
    name: String,
    healthy_nodes: u32,
    nodes: u32,
    allocations: u64,
}

impl From<Region> for RegionView {
    fn from(region: Region) -> Self {
        Self {
            name: region.name,
            healthy_nodes: region.healthy_nodes,
            nodes: region.nodes,
            allocations: region.allocations,
        }
    }
}

impl View for RegionsView {
    fn empty(&self) -> Option<&'static str> {
        self.regions.is_empty().then_some("no regions")
    }

    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let row = |region: &RegionView| {
            let tone = match region.healthy_nodes {
                0 => Tone::Bad,
                healthy if healthy < region.nodes => Tone::Attention,
                _ => Tone::Good,
            };
            vec![
                Cell::from(&region.name),
                Cell::toned(format!("{}/{}", region.healthy_nodes, region.nodes), tone),
                Cell::from(region.allocations.to_string()),
            ]
        };
        vec![Block::Table {
            head: vec!["REGION", "HEALTHY", "ALLOCATIONS"],
            rows: self.regions.iter().map(row).collect(),
        }]
    }
}
