//! `turnctl status`: is the cluster well, and what to do when it is not.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{StatusRequest, StatusResponse};

use super::nodes::{self, NodesView, State};
use super::{PERIOD, watch};
use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Show whether the cluster is well, and what to do if not
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct StatusArgs {
    /// Show it again each second
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// Wait until the cluster is well, five minutes unless --timeout says otherwise
    #[arg(long, conflicts_with = "watch")]
    pub(crate) wait: bool,
}

const EXAMPLES: &str = "\
Examples:
  turnctl status                       exit code 3 when something is wrong
  turnctl status --wait --timeout 1m   in a script, after an update
  turnctl status -o json | jq .problems";

pub(crate) async fn run(args: &StatusArgs, connection: &ConnectionOptions, output: Output) -> Result {
    if args.watch {
        return watch(connection, output, fetch).await;
    }
    let once = async || fetch(&connection.connect().await?).await;
    let mut last = String::new();
    loop {
        let fetched = once().await;
        let why = match &fetched {
            Ok(status) if status.healthy => return output.show(status),
            Ok(status) => status.verdict(),
            Err(failure) if failure.is_passing() => failure.to_string(),
            Err(_) => String::new(),
        };
        if args.wait && !why.is_empty() {
            if why != last {
                output.note(&format!("waiting: {why}"));
                last = why;
            }
            tokio::time::sleep(PERIOD).await;
            continue;
        }
        output.show(&fetched?)?;
        return Err(Failure::new(Exit::Unhealthy, why));
    }
}

async fn fetch(cluster: &Cluster) -> Result<StatusView> {
    let mut admin = AdminClient::new(cluster.channel.clone());
    let status = admin.status(StatusRequest {}).await.map_err(|status| cluster.failure("read the status", &status))?;
    let nodes = nodes::fetch(cluster, "").await?;
    Ok(StatusView::new(status.into_inner(), &nodes, units::now_ms()))
}

/// What `turnctl status` shows.
#[derive(Debug, Serialize)]
struct StatusView {
    /// Whether no problem is an error.
    healthy: bool,
    controller: ControllerView,
    store: StoreView,
    nodes: u32,
    healthy_nodes: u32,
    regions: u32,
    allocations: u64,
    problems: Vec<Problem>,
}

#[derive(Debug, Serialize)]
struct ControllerView {
    id: String,
    version: String,
    uptime_seconds: u64,
}

#[derive(Debug, Serialize)]
struct StoreView {
    kind: String,
    version: String,
    healthy: bool,
}

#[derive(Debug, Serialize)]
struct Problem {
    severity: Severity,
    message: String,
    hint: Option<String>,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    /// Calls fail or will; the exit code says so.
    Error,
    /// Worth knowing; calls go on.
    Warning,
}

impl StatusView {
    fn new(status: StatusResponse, nodes: &NodesView, now_ms: u64) -> Self {
        let problems = problems(&status, nodes, now_ms);
        Self {
            healthy: problems.iter().all(|problem| problem.severity == Severity::Warning),
            controller: ControllerView {
                id: status.controller_id,
                version: status.version,
                uptime_seconds: status.uptime_seconds,
            },
            store: StoreView { kind: status.store, version: status.store_version, healthy: status.store_healthy },
            nodes: status.nodes,
            healthy_nodes: status.healthy_nodes,
            regions: status.regions,
            allocations: status.allocations,
            problems,
        }
    }

    fn verdict(&self) -> String {
        let mut errors = self.problems.iter().filter(|problem| problem.severity == Severity::Error);
        let first = errors.next().map_or_else(String::new, |problem| problem.message.clone());
        match errors.count() {
            0 => format!("the cluster is unhealthy: {first}"),
            more => format!("the cluster is unhealthy: {first}, and {more} more"),
        }
    }
}

fn problems(status: &StatusResponse, nodes: &NodesView, now_ms: u64) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut warnings = status.warnings.clone();
    let mut add = |severity, message: String, hint: &str| {
        // The controller may say the same and go on with the reason: then its words are the better ones.
        let same = warnings.iter().position(|warning| warning.starts_with(&message));
        let message = same.map_or(message, |at| warnings.remove(at));
        problems.push(Problem { severity, message, hint: Some(hint.into()) });
    };
    if !status.store_healthy {
        let hint = "calls go on, discovery answers from memory; mend the store before relays have to move";
        let message = match status.store_problem.as_str() {
            "" => format!("the {} store does not answer", status.store),
            problem => problem.to_owned(),
        };
        add(Severity::Error, message, hint);
    }
    if nodes.nodes.is_empty() {
        let hint = "start a relay with this controller in its 'controllers'; its log says why it cannot join";
        add(Severity::Error, "no relay has joined".into(), hint);
    }
    let mut ready_in: BTreeMap<&str, usize> = BTreeMap::new();
    for node in &nodes.nodes {
        let ready = ready_in.entry(&node.region).or_default();
        let id = &node.node_id;
        if node.load.journal_failed {
            let hint = "make room in its state_dir; until then its records are in the store alone";
            add(Severity::Warning, format!("relay {id} cannot write its journal"), hint);
        }
        match node.state {
            State::Ready => *ready += 1,
            // As it should be: the owner of its address is in this list too.
            State::Standby => {}
            State::Draining => {
                add(
                    Severity::Warning,
                    format!("relay {id} is draining"),
                    "'turnctl nodes -o wide' shows what is left, 'turnctl uncordon' ends it",
                );
            }
            State::Overloaded => {
                let hint = "add a relay to its region, or raise its limits";
                add(Severity::Warning, format!("relay {id} is overloaded"), hint);
            }
            State::Suspect => {
                let silent = units::age(node.last_report_at_ms, now_ms);
                let hint = format!("last report {silent} ago; look at its process and at its way to the controllers");
                add(Severity::Error, format!("relay {id} is suspect"), &hint);
            }
            State::Unknown => {
                add(
                    Severity::Warning,
                    format!("relay {id} is in a state this turnctl does not know"),
                    "update turnctl",
                );
            }
        }
    }
    for (region, _) in ready_in.iter().filter(|(_, ready)| **ready == 0) {
        let hint = "its clients are sent to other regions; bring a relay back or add one";
        add(Severity::Error, format!("region {region} has no ready relay"), hint);
    }
    let further = |message| Problem { severity: Severity::Warning, message, hint: None };
    problems.extend(warnings.into_iter().map(further));
    problems.sort_by_key(|problem| problem.severity);
    problems
}

impl View for StatusView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let uptime = units::span(Duration::from_secs(self.controller.uptime_seconds));
        let store = format!("{} {}", self.store.kind, self.store.version);
        let good = |good, text: String| Cell::toned(text, if good { Tone::Good } else { Tone::Bad });
        let store_health = if self.store.healthy { "answers" } else { "not healthy" };
        let regions = match self.regions {
            1 => "1 region".into(),
            several => format!("{several} regions"),
        };
        let verdict = match (self.healthy, self.problems.is_empty()) {
            (true, true) => Cell::toned("healthy", Tone::Good),
            (true, false) => Cell::toned("healthy, with warnings", Tone::Attention),
            (false, _) => Cell::toned("unhealthy", Tone::Bad),
        };
        let mut blocks = vec![Block::Fields(vec![
            ("Cluster", verdict),
            ("Controller", format!("{} {}, up {uptime}", self.controller.id, self.controller.version).into()),
            ("Store", good(self.store.healthy, format!("{}, {store_health}", store.trim_end()))),
            (
                "Relays",
                good(
                    self.healthy_nodes > 0,
                    format!("{} of {} healthy, in {}", self.healthy_nodes, self.nodes, regions),
                ),
            ),
            ("Allocations", self.allocations.to_string().into()),
        ])];
        if !self.problems.is_empty() {
            let lines = self.problems.iter().flat_map(|problem| {
                let (mark, tone) = match problem.severity {
                    Severity::Error => ("x", Tone::Bad),
                    Severity::Warning => ("!", Tone::Attention),
                };
                let message = Cell::toned(format!("{mark} {}", problem.message), tone);
                let hint = problem.hint.iter().map(|hint| Cell::toned(format!("  -> {hint}"), Tone::Plain));
                std::iter::once(message).chain(hint)
            });
            blocks.push(Block::Lines(lines.collect()));
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use turnpike_proto::v1::{Node, NodeState};

    use super::*;
    use crate::output::{Format, render};

    const NOW: u64 = 1_700_000_100_000;

    fn view(store_healthy: bool, states: &[(&str, &str, NodeState)], warnings: &[&str]) -> StatusView {
        let node = |(id, region, state): &(&str, &str, NodeState)| Node {
            node_id: (*id).into(),
            region: (*region).into(),
            state: *state as i32,
            last_report_at: NOW - 4_000,
            ..Node::default()
        };
        let nodes: Vec<_> = states.iter().map(|state| node(state).into()).collect();
        let status = StatusResponse {
            controller_id: "c1".into(),
            version: "0.1.0".into(),
            store: "embedded".into(),
            store_healthy,
            nodes: states.len() as u32,
            healthy_nodes: states.iter().filter(|state| state.2 == NodeState::Ready).count() as u32,
            regions: 2,
            allocations: 12,
            uptime_seconds: 192,
            warnings: warnings.iter().map(ToString::to_string).collect(),
            ..StatusResponse::default()
        };
        StatusView::new(status, &NodesView { nodes }, NOW)
    }

    #[test]
    fn a_healthy_cluster_is_five_lines() {
        let view = view(true, &[("eu-1", "eu", NodeState::Ready), ("us-1", "us", NodeState::Ready)], &[]);
        assert!(view.healthy);
        let table = render(&view, Format::Table, false, NOW).expect("renders");
        let expected = "\
Cluster       healthy
Controller    c1 0.1.0, up 3m12s
Store         embedded, answers
Relays        2 of 2 healthy, in 2 regions
Allocations   12
";
        assert_eq!(table, expected);
    }

    #[test]
    fn each_problem_has_its_hint_and_errors_come_first() {
        let states = [("eu-1", "eu", NodeState::Draining), ("us-1", "us", NodeState::Suspect)];
        let view = view(false, &states, &["relay us-1 is suspect: no session", "something else"]);
        assert!(!view.healthy);
        let table = render(&view, Format::Table, false, NOW).expect("renders");
        let problems = table.split_once("\n\n").expect("problems").1;
        let expected = "\
x the embedded store does not answer
  -> calls go on, discovery answers from memory; mend the store before relays have to move
x relay us-1 is suspect: no session
  -> last report 4s ago; look at its process and at its way to the controllers
x region eu has no ready relay
  -> its clients are sent to other regions; bring a relay back or add one
x region us has no ready relay
  -> its clients are sent to other regions; bring a relay back or add one
! relay eu-1 is draining
  -> 'turnctl nodes -o wide' shows what is left, 'turnctl uncordon' ends it
! something else
";
        assert_eq!(problems, expected);
        assert_eq!(view.verdict(), "the cluster is unhealthy: the embedded store does not answer, and 3 more");
    }

    #[test]
    fn warnings_alone_leave_it_healthy_and_no_relay_does_not() {
        assert!(view(true, &[("eu-1", "eu", NodeState::Ready), ("eu-2", "eu", NodeState::Draining)], &["w"]).healthy);
        assert!(!view(true, &[], &[]).healthy);
    }
}
