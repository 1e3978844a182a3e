//! `turnctl nodes`, `turnctl regions`: the relays and where they are.

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::steering_client::SteeringClient;
use turnpike_proto::v1::{ListNodesRequest, Node, NodeState, Region, RegionsRequest};

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
  turnctl nodes -o wide           with listeners, versions and totals";

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
    load: LoadView,
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
struct LoadView {
    allocations: u64,
    busiest_worker_permille: u32,
    bytes_per_second: u64,
    packets: u64,
    bytes: u64,
    dropped: u64,
}

/// State of a relay in the controller's eyes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Ready,
    Draining,
    Overloaded,
    Suspect,
    Unknown,
}

impl State {
    fn cell(self) -> Cell {
        match self {
            Self::Ready => Cell::toned("ready", Tone::Good),
            Self::Draining => Cell::toned("draining", Tone::Attention),
            Self::Overloaded => Cell::toned("overloaded", Tone::Attention),
            Self::Suspect => Cell::toned("suspect", Tone::Bad),
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
                busiest_worker_permille: load.busiest_worker_permille,
                bytes_per_second: load.bytes_per_second,
                packets: load.packets,
                bytes: load.bytes,
                dropped: load.dropped,
            },
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
