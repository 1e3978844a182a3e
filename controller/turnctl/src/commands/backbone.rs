//! `turnctl backbone`: who reaches whom, how, and why that way.

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{LinkPath, LinkReport, LinkState, ListLinksRequest, ListLinksResponse, RelayLinks};

use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::Result;
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Loss from which a link is worth a look, thousandths.
const LOSSY: u32 = 10;

/// Show the links between relays: round trip and loss from each to each, and what does not take its link
#[derive(Args, Debug)]
#[command(visible_alias = "links", after_help = EXAMPLES)]
pub(crate) struct BackboneArgs {
    /// Go on showing it as it changes
    #[arg(short, long)]
    pub(crate) watch: bool,
}

const EXAMPLES: &str = "\
Examples:
  turnctl backbone
  turnctl backbone -o wide         every link with window, queue and counts
  turnctl backbone -o json | jq -r '.relays[].links[] | select(.path != \"direct\") | [.to, .path, .why] | @tsv'

A cell says how the relay of the row reaches that of the column: round trip and loss of its link; 'via eu-2'
where a third relay is the better way; 'plain udp' from relayed port to relayed port; 'nothing' where packets
are dropped.";

pub(crate) async fn run(args: &BackboneArgs, connection: &ConnectionOptions, output: Output) -> Result {
    if args.watch {
        return super::watch(connection, output, async |cluster| Ok(BackboneView::from(fetch(cluster).await?))).await;
    }
    let cluster = connection.connect().await?;
    output.show(&BackboneView::from(fetch(&cluster).await?))
}

async fn fetch(cluster: &Cluster) -> Result<ListLinksResponse> {
    let answer = AdminClient::new(cluster.channel.clone()).list_links(ListLinksRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|status| cluster.failure("list the links", &status))
}

#[derive(Serialize)]
struct BackboneView {
    relays: Vec<RelayView>,
    revoked: Vec<RevokedView>,
}

#[derive(Serialize)]
struct RelayView {
    node_id: String,
    region: String,
    backbone_addresses: Vec<String>,
    cluster_only: bool,
    reported_at: Option<String>,
    links: Vec<LinkView>,
}

#[derive(Serialize)]
struct LinkView {
    to: String,
    state: &'static str,
    path: &'static str,
    via: Option<String>,
    why: String,
    rtt_us: Option<u32>,
    loss_permille: u32,
    cwnd_bytes: u64,
    queued_bytes: u64,
    sent_packets: u64,
    sent_bytes: u64,
    received_packets: u64,
    received_bytes: u64,
    dropped: u64,
}

#[derive(Serialize)]
struct RevokedView {
    node_id: String,
    since: Option<String>,
    by: String,
    serials: Vec<String>,
}

impl From<ListLinksResponse> for BackboneView {
    fn from(answer: ListLinksResponse) -> Self {
        let revoked = answer.revoked.into_iter().map(|revoked| RevokedView {
            node_id: revoked.node_id,
            since: units::timestamp(revoked.since),
            by: revoked.by,
            serials: revoked.serials.iter().map(|serial| units::hex(serial)).collect(),
        });
        Self { revoked: revoked.collect(), relays: answer.relays.into_iter().map(Into::into).collect() }
    }
}

impl From<RelayLinks> for RelayView {
    fn from(relay: RelayLinks) -> Self {
        Self {
            node_id: relay.node_id,
            region: relay.region,
            backbone_addresses: relay.backbone_addresses,
            cluster_only: relay.cluster_only,
            reported_at: units::timestamp(relay.reported_at),
            links: relay.links.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<LinkReport> for LinkView {
    fn from(link: LinkReport) -> Self {
        let state = match link.state() {
            LinkState::Up => "up",
            LinkState::Suspect => "suspect",
            LinkState::Down => "down",
            LinkState::Unspecified => "unknown",
        };
        let path = match link.path() {
            LinkPath::Direct => "direct",
            LinkPath::Via => "via",
            LinkPath::PlainUdp => "plain_udp",
            LinkPath::None => "none",
            LinkPath::Unspecified => "unknown",
        };
        Self {
            to: link.node_id,
            state,
            path,
            via: Some(link.via).filter(|via| !via.is_empty()),
            why: link.why,
            rtt_us: Some(link.rtt_us).filter(|rtt| *rtt > 0),
            loss_permille: link.loss_permille,
            cwnd_bytes: link.cwnd,
            queued_bytes: link.queued_bytes,
            sent_packets: link.sent_packets,
            sent_bytes: link.sent_bytes,
            received_packets: link.received_packets,
            received_bytes: link.received_bytes,
            dropped: link.dropped,
        }
    }
}

impl LinkView {
    fn rtt(&self) -> String {
        self.rtt_us.map_or("-".into(), |rtt| units::measured(Duration::from_micros(rtt.into())))
    }

    fn way(&self) -> String {
        match (self.path, &self.via) {
            ("via", Some(via)) => format!("via {via}"),
            ("plain_udp", _) => "plain udp".into(),
            ("none", _) => "nothing".into(),
            (path, _) => path.into(),
        }
    }

    fn tone(&self) -> Tone {
        match self.path {
            "none" => Tone::Bad,
            "direct" if self.loss_permille < LOSSY => Tone::Good,
            _ => Tone::Attention,
        }
    }

    /// As a cell of the matrix.
    fn cell(&self) -> Cell {
        let measured = match self.loss_permille {
            0 => self.rtt(),
            loss => format!("{} {}", self.rtt(), units::permille(loss)),
        };
        let text = match self.path {
            "direct" => measured,
            "via" => format!("{} ({measured})", self.way()),
            _ => self.way(),
        };
        Cell::toned(text, self.tone())
    }
}

impl BackboneView {
    fn matrix(&self) -> Block {
        let head = ["FROM".to_owned()].into_iter().chain(self.relays.iter().map(|relay| relay.node_id.clone()));
        let row = |relay: &RelayView| {
            let to = |other: &RelayView| {
                if other.node_id == relay.node_id {
                    return Cell::toned("\u{b7}", Tone::Plain);
                }
                let link = relay.links.iter().find(|link| link.to == other.node_id);
                link.map_or_else(|| Cell::from(""), LinkView::cell)
            };
            [Cell::from(&relay.node_id)].into_iter().chain(self.relays.iter().map(to)).collect()
        };
        Block::Named { head: head.collect(), rows: self.relays.iter().map(row).collect() }
    }

    /// Whatever does not simply take its link, a line each.
    fn remarks(&self) -> Vec<Cell> {
        let mut lines = Vec::new();
        for relay in &self.relays {
            if relay.backbone_addresses.is_empty() {
                lines.push(Cell::from(format!("{} has no backbone: add the table [backbone]", relay.node_id)));
            }
            let odd = relay.links.iter().filter(|link| link.path != "direct");
            lines.extend(odd.map(|link| {
                let text = format!("{} -> {}: {}, {}", relay.node_id, link.to, link.way(), link.why);
                Cell::toned(text, link.tone())
            }));
        }
        lines.extend(self.revoked.iter().map(|revoked| {
            let which = match revoked.serials.len() {
                0 => "every certificate".to_owned(),
                count => format!("{count} of its certificates"),
            };
            Cell::toned(format!("{}: {which} revoked by {}", revoked.node_id, revoked.by), Tone::Attention)
        }));
        lines
    }

    fn links(&self) -> Block {
        let head =
            vec!["FROM", "TO", "STATE", "PATH", "RTT", "LOSS", "WINDOW", "QUEUE", "SENT", "RECEIVED", "DROPPED", "WHY"];
        let row = |relay: &RelayView, link: &LinkView| {
            vec![
                Cell::from(&relay.node_id),
                Cell::from(&link.to),
                Cell::from(link.state),
                Cell::toned(link.way(), link.tone()),
                Cell::from(link.rtt()),
                Cell::from(units::permille(link.loss_permille)),
                Cell::from(units::bytes(link.cwnd_bytes)),
                Cell::from(units::bytes(link.queued_bytes)),
                Cell::from(format!("{} ({})", link.sent_packets, units::bytes(link.sent_bytes))),
                Cell::from(format!("{} ({})", link.received_packets, units::bytes(link.received_bytes))),
                Cell::from(link.dropped.to_string()),
                Cell::from(&link.why),
            ]
        };
        let rows = self.relays.iter().flat_map(|relay| relay.links.iter().map(move |link| row(relay, link)));
        Block::Table { head, rows: rows.collect() }
    }
}

impl View for BackboneView {
    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let first = if wide { self.links() } else { self.matrix() };
        let remarks = self.remarks();
        let remarks = (!remarks.is_empty()).then_some(Block::Lines(remarks));
        [first].into_iter().chain(remarks).collect()
    }

    fn empty(&self) -> Option<&'static str> {
        (self.relays.is_empty() && self.revoked.is_empty()).then_some("no relay has joined")
    }
}
