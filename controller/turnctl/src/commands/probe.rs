//! `turnctl probe`: does a relay carry packets.

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::DiscoverRequest;

use super::allocations::{UserName, user_name};
use super::discover::{self, Via};
use crate::connection::ConnectionOptions;
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::probe::{self, Login, Outcome, Plan, ProbeReport, Step, TurnUri};
use crate::units;

/// Carry packets between two clients through a relay, each step timed
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ProbeArgs {
    /// A TURN server of any make, turn:HOST[:PORT][?transport=udp|tcp] [default: what discovery gives]
    #[arg(long, value_name = "URI", requires_all = ["username", "password"])]
    server: Option<TurnUri>,
    /// User name at --server
    #[arg(long, requires = "server", value_parser = user_name)]
    username: Option<UserName>,
    /// Password at --server; TURNCTL_PASSWORD keeps it out of the process list
    #[arg(long, env = "TURNCTL_PASSWORD", hide_env = true, hide_env_values = true)]
    password: Option<String>,
    /// Region to discover relays for
    #[arg(long, default_value = "", hide_default_value = true, conflicts_with = "server")]
    region: String,
    /// Only these ways to a discovered relay: udp, tcp
    #[arg(long, value_enum, value_delimiter = ',', hide_possible_values = true, conflicts_with = "server")]
    transport: Vec<Via>,
    /// Relays to discover and probe; from two on also the way from each to the next
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100), conflicts_with = "server")]
    relays: u32,
    /// Packets to send there and back
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
}

const EXAMPLES: &str = "\
Examples:
  turnctl probe              the nearest relay, each way to it
  turnctl probe --region us --transport tcp
  turnctl probe --relays 3   three relays, and from each to the next
  turnctl probe --server turn:example.org --username alice --password secret

Two clients make an allocation each, permit each other and send packets there
and back: on a channel one way, in Send indications the other.

Exit codes: 0 packets passed, 1 the credentials were refused, 3 the relay
answers but does not carry packets, 5 it does not answer.
Discovery needs role operator.";

pub(crate) async fn run(args: &ProbeArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let plans = match &args.server {
        Some(server) => vec![plan_of(args, server)],
        None => discovered(args, connection, output).await?,
    };
    let mut view = ProbeView { ok: true, probes: Vec::new() };
    for plan in &plans {
        let report = probe::run(plan).await;
        view.ok &= report.ok;
        view.probes.push(report);
    }
    output.show(&view)?;
    match view.probes.iter().find_map(|probe| probe.exit) {
        None => Ok(()),
        Some(exit) => Err(view.failure(exit)),
    }
}

fn plan_of(args: &ProbeArgs, server: &TurnUri) -> Plan {
    let login = Login {
        username: args.username.as_ref().map(|username| username.0.clone()).unwrap_or_default(),
        password: args.password.clone().unwrap_or_default().into_bytes(),
    };
    Plan { a: server.clone(), b: server.clone(), login, count: args.count }
}

async fn discovered(args: &ProbeArgs, connection: &ConnectionOptions, output: Output) -> Result<Vec<Plan>> {
    let cluster = connection.connect().await?;
    let request = DiscoverRequest {
        region: args.region.clone(),
        transports: discover::wire(&args.transport),
        user: b"turnctl-probe".to_vec(),
        limit: args.relays,
        ttl_seconds: 600,
        ..DiscoverRequest::default()
    };
    let answer = discover::ask(&cluster, request).await?;
    let credential = answer.credential.ok_or_else(|| Failure::failed("discovery gave no credentials"))?;
    let login = Login { username: credential.username, password: credential.password.into_bytes() };

    let mut plans = Vec::new();
    let mut firsts: Vec<TurnUri> = Vec::new();
    let plan = |a: &TurnUri, b: &TurnUri| Plan { a: a.clone(), b: b.clone(), login: login.clone(), count: args.count };
    for relay in &answer.relays {
        let mut first = None;
        for text in &relay.uris {
            match text.parse::<TurnUri>() {
                Ok(uri) => {
                    plans.push(plan(&uri, &uri));
                    first.get_or_insert(uri);
                }
                Err(reason) => output.note(&format!("passing over {text} of {}: {reason}", relay.node_id)),
            }
        }
        firsts.extend(first);
    }
    plans.extend(firsts.windows(2).map(|pair| plan(&pair[0], &pair[1])));
    if plans.is_empty() {
        return Err(Failure::new(Exit::Unhealthy, "discovery gave no relay that can be probed")
            .remedy("'turnctl status' says which relays are well"));
    }
    Ok(plans)
}

#[derive(Debug, Serialize)]
struct ProbeView {
    ok: bool,
    probes: Vec<ProbeReport>,
}

impl ProbeView {
    fn failure(&self, exit: Exit) -> Failure {
        let failed: Vec<_> = self.probes.iter().filter(|probe| !probe.ok).collect();
        let what = failed.first().map_or_else(String::new, |probe| probe.complaint());
        let failure = match failed.len() {
            0 | 1 => Failure::new(exit, what),
            more => Failure::new(exit, format!("{what}, and {} more probes failed", more - 1)),
        };
        match failed.first().and_then(|probe| probe.hint) {
            Some(hint) => failure.remedy(hint),
            None => failure,
        }
    }
}

impl ProbeReport {
    fn route(&self) -> String {
        if self.server == self.peer_server {
            self.server.clone()
        } else {
            format!("{} -> {}", self.server, self.peer_server)
        }
    }

    /// What went wrong.
    fn complaint(&self) -> String {
        match self.steps.iter().find(|step| step.outcome == Outcome::Failed) {
            Some(step) => format!("{} fails at {}: {}", self.route(), step.name, step.detail),
            None => format!("{} fails", self.route()),
        }
    }

    fn row(&self) -> Vec<Cell> {
        let verdict = match (self.ok, self.packets_returned < self.packets_sent) {
            (true, false) => Cell::toned("carries packets", Tone::Good),
            (true, true) => Cell::toned("loses packets", Tone::Attention),
            (false, _) => Cell::toned("fails", Tone::Bad),
        };
        let allocate = self.steps.iter().find(|step| step.name == "allocate a" && step.outcome == Outcome::Ok);
        let round_trip = self.round_trip_ms.map(|ms| units::measured(Duration::from_secs_f64(ms / 1e3)));
        vec![
            verdict,
            Cell::from(self.route()),
            Cell::from(allocate.map(|step| units::measured(step.took)).unwrap_or_default()),
            Cell::from(round_trip.unwrap_or_default()),
            Cell::from(format!("{} of {}", self.packets_returned, self.packets_sent)),
        ]
    }
}

/// More probes than this are a summary; the steps of those that failed, or of all with `-o wide`, stand before it.
const IN_FULL: usize = 2;

impl View for ProbeView {
    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let mut blocks = Vec::new();
        let in_full = wide || self.probes.len() <= IN_FULL;
        for probe in self.probes.iter().filter(|probe| in_full || !probe.ok) {
            blocks.push(Block::Lines(vec![Cell::toned(probe.route(), Tone::Heading)]));
            let rows = probe.steps.iter().map(step_row).collect();
            blocks.push(Block::Table { head: vec!["STEP", "RESULT", "TIME", "DETAIL"], rows });
        }
        blocks.push(Block::Table {
            head: vec!["VERDICT", "SERVER", "ALLOCATE", "ROUND TRIP", "PACKETS"],
            rows: self.probes.iter().map(ProbeReport::row).collect(),
        });
        blocks
    }
}

fn step_row(step: &Step) -> Vec<Cell> {
    let (outcome, tone) = match step.outcome {
        Outcome::Ok => ("ok", Tone::Good),
        Outcome::Lossy => ("lossy", Tone::Attention),
        Outcome::Failed => ("failed", Tone::Bad),
    };
    let time = Cell::from(units::measured(step.took));
    vec![Cell::from(step.name), Cell::toned(outcome, tone), time, Cell::from(&step.detail)]
}
