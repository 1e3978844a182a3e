//! `turnctl netcheck`: round trips from here to the regions of the cluster.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::steering_client::SteeringClient;
use turnpike_proto::v1::{MeasuredRegion, NetcheckTarget, NetcheckTargetsRequest, ReportNetcheckRequest};

use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::stun;
use crate::units;

/// Bindings sent to each relay; the quickest answer counts, because what delays others is not the way.
const TRIES: usize = 4;
const PATIENCE: Duration = Duration::from_secs(2);

/// Measure the round trip from this machine to the regions that are worth it (STUN over UDP)
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct NetcheckArgs {
    /// Tell the controller (role operator): from now on it counts for clients of this network
    #[arg(long)]
    report: bool,
    /// IP by which clients of this network reach the cluster, where the controller is reached by another
    #[arg(long, value_name = "ADDR")]
    client: Option<IpAddr>,
}

const EXAMPLES: &str = "\
Examples:
  turnctl netcheck
  turnctl netcheck --report --client 203.0.113.7

The controller names a relay of each of the five regions that it takes to be the
nearest, and of a few others. Without --report the role viewer is enough.
Exit code 5: none of them answered.";

pub(crate) async fn run(args: &NetcheckArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let (client, targets) = targets(&cluster, args.client).await?;
    let mut view = NetcheckView { client, regions: measure(targets).await, reported: None };
    if args.report {
        view.reported = Some(report(&cluster, args.client, &view.regions).await?);
    }
    output.show(&view)?;
    if view.regions.iter().any(|region| region.rtt_ms.is_some()) {
        return Ok(());
    }
    Err(Failure::new(Exit::Unreachable, "no relay answered over UDP")
        .remedy("'turnctl nat' says what of this network is blocked"))
}

/// What the controller wants measured, and the client's address as it takes it.
pub(crate) async fn targets(cluster: &Cluster, client: Option<IpAddr>) -> Result<(String, Vec<NetcheckTarget>)> {
    let client = client.map(|client| client.to_string()).unwrap_or_default();
    let answer = SteeringClient::new(cluster.channel.clone())
        .netcheck_targets(NetcheckTargetsRequest { client })
        .await
        .map_err(|status| cluster.failure("ask what to measure", &status))?
        .into_inner();
    Ok((answer.client, answer.targets))
}

async fn report(cluster: &Cluster, client: Option<IpAddr>, regions: &[RegionView]) -> Result<u32> {
    let measured = regions.iter().filter_map(|region| {
        let rtt_us = (region.rtt_ms? * 1e3).round() as u32;
        Some(MeasuredRegion { region: region.region.clone(), rtt_us: rtt_us.max(1) })
    });
    let client = client.map(|client| client.to_string()).unwrap_or_default();
    let request = ReportNetcheckRequest { client, regions: measured.collect() };
    let answer = SteeringClient::new(cluster.channel.clone()).report_netcheck(request).await;
    Ok(answer.map_err(|status| cluster.failure("report", &status))?.into_inner().taken)
}

/// Measures all of them at once, nearest first in the answer, silent ones last.
pub(crate) async fn measure(targets: Vec<NetcheckTarget>) -> Vec<RegionView> {
    let mut waiting = tokio::task::JoinSet::new();
    for target in targets {
        waiting.spawn_blocking(move || {
            let rtt = target.address.parse().ok().and_then(quickest);
            RegionView {
                region: target.region,
                node_id: target.node_id,
                address: target.address,
                rtt_ms: rtt.map(|rtt| (rtt.as_secs_f64() * 1e6).round() / 1e3),
            }
        });
    }
    let mut regions = Vec::new();
    while let Some(measured) = waiting.join_next().await {
        regions.extend(measured.ok());
    }
    regions.sort_by(|a, b| a.sort_key().total_cmp(&b.sort_key()).then_with(|| a.region.cmp(&b.region)));
    regions
}

fn quickest(server: SocketAddr) -> Option<Duration> {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    let mut best: Option<Duration> = None;
    for _ in 0..TRIES {
        // Who has not answered the first is not waited for three times more.
        let answer = stun::binding(&socket, server, 0, PATIENCE).ok()??;
        best = Some(best.map_or(answer.round_trip, |best| best.min(answer.round_trip)));
    }
    best
}

#[derive(Debug, Serialize)]
struct NetcheckView {
    /// The address that the controller takes this network by.
    client: String,
    regions: Vec<RegionView>,
    /// Regions that the controller took.
    reported: Option<u32>,
}

/// A region and how far it is.
#[derive(Debug, Serialize)]
pub(crate) struct RegionView {
    pub(crate) region: String,
    pub(crate) node_id: String,
    pub(crate) address: String,
    /// `None`: no answer.
    pub(crate) rtt_ms: Option<f64>,
}

impl RegionView {
    fn sort_key(&self) -> f64 {
        self.rtt_ms.unwrap_or(f64::INFINITY)
    }

    /// Columns of a table.
    pub(crate) fn row(&self) -> Vec<Cell> {
        let rtt = match self.rtt_ms {
            Some(ms) => Cell::from(units::measured(Duration::from_secs_f64(ms / 1e3))),
            None => Cell::toned("no answer", Tone::Bad),
        };
        vec![Cell::from(&self.region), rtt, Cell::from(&self.node_id), Cell::from(&self.address)]
    }
}

impl View for NetcheckView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let rows = self.regions.iter().map(RegionView::row).collect();
        let mut blocks = vec![Block::Table { head: vec!["REGION", "ROUND TRIP", "NODE", "ADDRESS"], rows }];
        if let Some(taken) = self.reported {
            let what = format!("reported: {taken} regions count for the network of {} now", self.client);
            blocks.push(Block::Lines(vec![Cell::from(what)]));
        }
        blocks
    }

    fn empty(&self) -> Option<&'static str> {
        self.regions.is_empty().then_some("no relay is ready to be measured")
    }
}
