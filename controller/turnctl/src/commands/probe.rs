//! `turnctl probe`: does a relay carry packets.

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::DiscoverRequest;

use super::allocations::{UserName, user_name};
use super::discover::{self, Via};
use crate::connection::ConnectionOptions;
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::probe::{self, Login, Outcome, Plan, ProbeReport, TurnUri};
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
        let what = failed.first().map_or_else(String::new, |probe| probe.verdict());
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

    fn verdict(&self) -> String {
        match self.steps.iter().find(|step| step.outcome == Outcome::Failed) {
            Some(step) => format!("{} fails at {}: {}", self.route(), step.name, step.detail),
            None if self.packets_returned < self.packets_sent => {
                format!("{} loses {} of {} packets", self.route(), self.packets_sent - self.packets_returned, self.packets_sent)
            }
            None => format!("{} carries packets", self.route()),
        }
    }
}

impl View for ProbeView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let mut blocks = Vec::new();
        for probe in &self.probes {
            let row = |step: &probe::Step| {
                let (outcome, tone) = match step.outcome {
                    Outcome::Ok => ("ok", Tone::Good),
                    Outcome::Lossy => ("lossy", Tone::Attention),
                    Outcome::Failed => ("failed", Tone::Bad),
                };
                vec![
                    Cell::from(step.name),
                    Cell::toned(outcome, tone),
                    Cell::from(units::measured(step.took)),
                    Cell::from(&step.detail),
                ]
            };
            blocks.push(Block::Lines(vec![Cell::toned(probe.route(), Tone::Heading)]));
            let rows = probe.steps.iter().map(row).collect();
            blocks.push(Block::Table { head: vec!["STEP", "RESULT", "TIME", "DETAIL"], rows });
        }
        let verdict = |probe: &ProbeReport| {
            let (mark, tone) = match (probe.ok, probe.packets_returned < probe.packets_sent) {
                (true, false) => ("ok", Tone::Good),
                (true, true) => ("! ", Tone::Attention),
                (false, _) => ("x ", Tone::Bad),
            };
            Cell::toned(format!("{mark} {}", probe.verdict()), tone)
        };
        blocks.push(Block::Lines(self.probes.iter().map(verdict).collect()));
        blocks
    }
}
