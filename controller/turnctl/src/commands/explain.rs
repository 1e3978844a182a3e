//! `turnctl explain`: why a client is sent to which relay.

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::steering_client::SteeringClient;
use turnpike_proto::v1::{ConsideredRelay, EstimateBasis, ExplainRequest, ExplainResponse, Relay};

use super::discover::{Via, wire};
use crate::connection::ConnectionOptions;
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Show which relays a client would get and why: round trip, load and health of every relay
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExplainArgs {
    /// IP of the client
    #[arg(long, value_name = "ADDR")]
    client: Option<IpAddr>,
    /// Region that the client asks for
    #[arg(long, default_value = "", hide_default_value = true)]
    region: String,
    /// Name of the call that it is for
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    session: String,
    /// Region that the client uses now
    #[arg(long, value_name = "REGION", default_value = "", hide_default_value = true)]
    home: String,
    /// Only these ways to a relay
    #[arg(long, value_enum, value_delimiter = ',')]
    transport: Vec<Via>,
    /// At most this many relays; 0 leaves it to the controller
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    limit: u32,
}

const EXAMPLES: &str = "\
Examples:
  turnctl explain --client 203.0.113.7
  turnctl explain --client 203.0.113.7 --session call-42 -o json
  turnctl explain --region us

Nothing is counted or remembered. The answer is that of the controller asked: each
has measurements, picks and sessions of its own.
Exit code 3: no relay can be offered.";

pub(crate) async fn run(args: &ExplainArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let request = ExplainRequest {
        client: args.client.map(|client| client.to_string()).unwrap_or_default(),
        region: args.region.clone(),
        session: args.session.clone().into_bytes(),
        transports: wire(&args.transport),
        limit: args.limit,
        home: args.home.clone(),
    };
    let cluster = connection.connect().await?;
    let answer = SteeringClient::new(cluster.channel.clone())
        .explain(request)
        .await
        .map_err(|status| cluster.failure("explain", &status))?;
    let view = ExplainView::from(answer.into_inner());
    output.show(&view)?;
    if view.relays.is_empty() {
        return Err(Failure::new(Exit::Unhealthy, view.refusal).remedy("'turnctl nodes' shows their states"));
    }
    Ok(())
}

/// The name of a basis, for people and programs.
fn basis_name(basis: i32) -> &'static str {
    match EstimateBasis::try_from(basis) {
        Ok(EstimateBasis::Measured) => "measured",
        Ok(EstimateBasis::Neighbours) => "neighbours",
        Ok(EstimateBasis::Geo) => "geo",
        Ok(EstimateBasis::Regions) => "regions",
        Ok(EstimateBasis::Unknown | EstimateBasis::Unspecified) | Err(_) => "unknown",
    }
}

#[derive(Debug, Serialize)]
struct ExplainView {
    relays: Vec<String>,
    refusal: String,
    evidence: Vec<String>,
    considered: Vec<ConsideredView>,
}

#[derive(Debug, Serialize)]
struct ConsideredView {
    node_id: String,
    region: String,
    rtt_ms: u32,
    basis: &'static str,
    age_seconds: Option<u32>,
    load_permille: u64,
    penalty_ms: u64,
    session_ms: u32,
    score_ms: u64,
    allocations: u64,
    own_picks: u64,
    state: String,
    outcome: String,
    place: Option<u32>,
}

impl From<ExplainResponse> for ExplainView {
    fn from(answer: ExplainResponse) -> Self {
        Self {
            relays: answer.relays.into_iter().map(|relay: Relay| relay.node_id).collect(),
            refusal: answer.refusal,
            evidence: answer.evidence,
            considered: answer.considered.into_iter().map(ConsideredView::from).collect(),
        }
    }
}

impl From<ConsideredRelay> for ConsideredView {
    fn from(relay: ConsideredRelay) -> Self {
        let basis = basis_name(relay.basis);
        Self {
            basis,
            age_seconds: matches!(basis, "measured" | "neighbours").then_some(relay.age_seconds),
            node_id: relay.node_id,
            region: relay.region,
            rtt_ms: relay.rtt_ms,
            load_permille: relay.load_permille,
            penalty_ms: relay.penalty_ms,
            session_ms: relay.session_ms,
            score_ms: relay.score_ms,
            allocations: relay.allocations,
            own_picks: relay.own_picks,
            state: relay.state,
            outcome: relay.outcome,
            place: (relay.place > 0).then_some(relay.place),
        }
    }
}

impl ConsideredView {
    fn row(&self, wide: bool) -> Vec<Cell> {
        let basis = match self.age_seconds {
            Some(age) => format!("{}, {} ago", self.basis, units::span(Duration::from_secs(age.into()))),
            None => self.basis.to_owned(),
        };
        let tone = if self.place.is_some() { Tone::Good } else { Tone::Plain };
        let load = u32::try_from(self.load_permille).unwrap_or(u32::MAX);
        let mut row = vec![
            Cell::from(&self.node_id),
            Cell::from(&self.region),
            Cell::from(format!("{} ms", self.rtt_ms)),
            Cell::from(basis),
            Cell::from(units::permille(load)),
            Cell::from(format!("{} ms", self.score_ms)),
            Cell::toned(&self.outcome, tone),
        ];
        if wide {
            row.extend([
                Cell::from(format!("{} ms", self.penalty_ms)),
                Cell::from(format!("{} ms", self.session_ms)),
                Cell::from(self.allocations.to_string()),
                Cell::from(self.own_picks.to_string()),
                Cell::from(&self.state),
            ]);
        }
        row
    }
}

impl View for ExplainView {
    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let mut head = vec!["NODE", "REGION", "RTT", "BASIS", "LOAD", "SCORE", "OUTCOME"];
        if wide {
            head.extend(["PENALTY", "SESSION", "ALLOCATIONS", "PICKS", "STATE"]);
        }
        vec![
            Block::Lines(self.evidence.iter().map(Cell::from).collect()),
            Block::Table { head, rows: self.considered.iter().map(|relay| relay.row(wide)).collect() },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Format, render};

    #[test]
    fn every_relay_has_its_reason() {
        let relay = |node: &str, rtt_ms, score_ms, basis: EstimateBasis, outcome: &str, place| ConsideredRelay {
            node_id: node.into(),
            region: node[..2].into(),
            rtt_ms,
            basis: basis.into(),
            age_seconds: 90,
            load_permille: 412,
            score_ms,
            state: "ready".into(),
            outcome: outcome.into(),
            place,
            ..ConsideredRelay::default()
        };
        let view = ExplainView::from(ExplainResponse {
            relays: vec![Relay { node_id: "eu-1".into(), ..Relay::default() }],
            evidence: vec!["clients of 203.0.113.0/24 have measured 1 regions, the newest 90 s ago".into()],
            considered: vec![
                relay("eu-1", 21, 21, EstimateBasis::Measured, "chosen, place 1", 1),
                relay("us-1", 98, 98, EstimateBasis::Geo, "77 ms behind the best score", 0),
            ],
            ..ExplainResponse::default()
        });
        let expected = "\
clients of 203.0.113.0/24 have measured 1 regions, the newest 90 s ago

NODE   REGION   RTT     BASIS                 LOAD    SCORE   OUTCOME
eu-1   eu       21 ms   measured, 1m30s ago   41.2%   21 ms   chosen, place 1
us-1   us       98 ms   geo                   41.2%   98 ms   77 ms behind the best score
";
        assert_eq!(render(&view, Format::Table, false, 0).expect("renders"), expected);
        let json = render(&view, Format::Json, false, 0).expect("renders");
        assert!(json.contains("\"age_seconds\": 90") && json.contains("\"age_seconds\": null"), "{json}");
    }
}
