//! `turnctl drain`, `turnctl uncordon`: relays that take no new clients, and take them again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{CordonedNode, DrainNodesRequest, UncordonNodesRequest};

use super::PERIOD;
use super::nodes::{self, ByTransport, NodeView};
use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Have relays take no new clients, so that they get empty (role operator)
///
/// Discovery leaves them out at once and they send new clients to others; what they hold goes on. It holds whatever
/// restarts, until 'turnctl uncordon'. Said again it keeps its deadline, unless another is given.
#[derive(Args, Debug)]
#[command(after_help = DRAIN_EXAMPLES)]
pub(crate) struct DrainArgs {
    /// Relays, as 'turnctl nodes' shows them; all of them or none
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
    /// Time to get empty in, as 30m or 2h; what is left then goes on, and --wait gives up
    #[arg(long, value_name = "TIME", value_parser = units::parse_span)]
    deadline: Option<Duration>,
    /// Wait until no allocation is left, and show what is
    #[arg(long)]
    pub(crate) wait: bool,
    /// Also where a region is left without a ready relay, and relays that are not there now
    #[arg(long)]
    force: bool,
}

const DRAIN_EXAMPLES: &str = "\
Examples:
  turnctl drain eu-1
  turnctl drain eu-1 --deadline 30m --wait && systemctl restart turnpike-relay
  turnctl nodes -o wide                    what is left, of which transport

A relay that is restarted before it is empty hands its allocations over UDP on
to its successor; clients over TCP, TLS and DTLS connect anew.

Exit codes: 1 refused (see --force), or a relay left or was uncordoned during
--wait; 4 no such relay; 124 allocations were left at the deadline.";

/// Have relays take new clients again (role operator)
#[derive(Args, Debug)]
#[command(after_help = UNCORDON_EXAMPLES)]
pub(crate) struct UncordonArgs {
    /// Relays, as 'turnctl nodes' shows them; all of them or none
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
}

const UNCORDON_EXAMPLES: &str = "\
Examples:
  turnctl uncordon eu-1
  turnctl nodes -o json | jq -r '.nodes[] | select(.drain) | .node_id' |
      xargs turnctl uncordon";

pub(crate) async fn drain(args: &DrainArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let request = DrainNodesRequest {
        node_ids: args.nodes.clone(),
        deadline_seconds: args.deadline.map_or(0, whole_seconds),
        force: args.force,
    };
    let told = AdminClient::new(cluster.channel.clone()).drain_nodes(request).await.map_err(|status| {
        let failure = cluster.failure(&format!("drain {}", args.nodes.join(", ")), &status);
        match status.code() {
            tonic::Code::FailedPrecondition => failure.remedy("--force drains all the same"),
            tonic::Code::NotFound => failure.remedy("'turnctl nodes' lists them; --force drains it when it joins"),
            _ => failure,
        }
    })?;
    let mut drains: Vec<_> = told.into_inner().nodes.into_iter().map(Drain::new).collect();
    // Of several, the last one: nobody is given up on before its time.
    let kept = drains.iter().filter_map(|drain| drain.told.drain.as_ref()).map(|drain| drain.deadline);
    let kept = kept.max().filter(|deadline| *deadline > 0);
    let left = kept.map(|deadline| Duration::from_millis(deadline.saturating_sub(units::now_ms())));
    let until = args.deadline.or(left).map(|deadline| Instant::now() + deadline);
    let seen = nodes::fetch(&cluster, "").await?;
    for drain in &mut drains {
        drain.look(&seen.nodes);
        output.show_line(&drain.view())?;
    }
    if args.wait { wait(drains, until, connection, cluster, output).await } else { Ok(()) }
}

pub(crate) async fn uncordon(args: &UncordonArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let request = UncordonNodesRequest { node_ids: args.nodes.clone() };
    let answer = AdminClient::new(cluster.channel.clone()).uncordon_nodes(request).await.map_err(|status| {
        let failure = cluster.failure(&format!("uncordon {}", args.nodes.join(", ")), &status);
        if status.code() == tonic::Code::NotFound { failure.remedy("'turnctl nodes' lists them") } else { failure }
    })?;
    for node in answer.into_inner().nodes {
        output.show_line(&UncordonedView {
            node_id: node.node_id,
            uncordoned: !node.unchanged,
            present: !node.absent,
        })?;
    }
    Ok(())
}

/// Shows what is left whenever it changes, until nothing is.
async fn wait(
    mut drains: Vec<Drain>,
    until: Option<Instant>,
    connection: &ConnectionOptions,
    mut cluster: Cluster,
    output: Output,
) -> Result {
    let mut connected = true;
    while drains.iter().any(|drain| !drain.is_over()) {
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(overdue(&mut drains, output));
        }
        tokio::time::sleep(PERIOD).await;
        let fetched = async {
            if !connected {
                cluster = connection.connect().await?;
            }
            nodes::fetch(&cluster, "").await
        };
        let seen = match fetched.await {
            Ok(seen) => seen.nodes,
            Err(failure) if failure.is_passing() => {
                if connected {
                    output.note(&format!("{failure}; trying on, the relays go on draining"));
                }
                connected = false;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        connected = true;
        for drain in drains.iter_mut().filter(|drain| !drain.is_over()) {
            if drain.look(&seen) {
                output.show_line(&drain.view())?;
            }
        }
    }
    let lost: Vec<_> = drains.iter().filter_map(Drain::lost).collect();
    if lost.is_empty() { Ok(()) } else { Err(Failure::failed(lost.join(", "))) }
}

fn overdue(drains: &mut [Drain], output: Output) -> Failure {
    let mut left = Vec::new();
    for drain in drains.iter_mut().filter(|drain| !drain.is_over()) {
        drain.state = State::Overdue;
        // Nobody reads: the exit code still says it.
        let _ = output.show_line(&drain.view());
        left.push(format!("{} has {}", drain.told.node_id, drain.left()));
    }
    Failure::new(Exit::Timeout, format!("not drained by the deadline: {}", left.join(", ")))
        .remedy("what is left goes on; a restart of the relay hands its UDP allocations on")
}

fn whole_seconds(span: Duration) -> u32 {
    u32::try_from(span.as_secs_f64().ceil() as u64).unwrap_or(u32::MAX)
}

/// Reports of a relay after which an empty one is believed, where it does not say itself that it drains: the first may
/// be older than the drain, the second may have been made while the relay was being told.
const REPORTS: usize = 3;

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Draining,
    Drained,
    /// Not empty at the deadline.
    Overdue,
    /// Not there: told all the same.
    Absent,
    /// It was there, not empty, and left.
    Gone,
    /// Somebody took the word back meanwhile.
    Uncordoned,
}

/// A relay that was told to drain, as it is seen since.
struct Drain {
    told: CordonedNode,
    state: State,
    allocations: u64,
    by_transport: ByTransport,
    /// Times of the reports seen.
    reports: BTreeSet<u64>,
}

impl Drain {
    fn new(told: CordonedNode) -> Self {
        let state = if told.absent { State::Absent } else { State::Draining };
        Self { told, state, allocations: 0, by_transport: ByTransport::default(), reports: BTreeSet::new() }
    }

    fn is_over(&self) -> bool {
        !matches!(self.state, State::Draining)
    }

    /// Takes in what the controller shows; whether there is news.
    fn look(&mut self, nodes: &[NodeView]) -> bool {
        let before = (self.state, self.allocations, self.by_transport);
        match nodes.iter().find(|node| node.node_id == self.told.node_id) {
            Some(node) => {
                (self.allocations, self.by_transport) = (node.load.allocations, node.load.by_transport);
                self.reports.insert(node.last_report_at_ms);
                let known = node.load.draining || self.reports.len() >= REPORTS;
                self.state = match node.drain {
                    // A controller that has only heard of it later may show an older picture for a moment.
                    None if self.reports.len() > REPORTS => State::Uncordoned,
                    _ if self.allocations == 0 && known => State::Drained,
                    _ => State::Draining,
                };
            }
            None if self.told.absent => {}
            None if self.allocations == 0 => self.state = State::Drained,
            None => self.state = State::Gone,
        }
        before != (self.state, self.allocations, self.by_transport)
    }

    /// Why waiting for it came to nothing.
    fn lost(&self) -> Option<String> {
        let id = &self.told.node_id;
        match self.state {
            State::Gone => Some(format!("relay {id} left the cluster with {}", self.held())),
            State::Uncordoned => Some(format!("relay {id} was uncordoned meanwhile")),
            _ => None,
        }
    }

    fn held(&self) -> String {
        let noun = if self.allocations == 1 { "allocation" } else { "allocations" };
        format!("{} {noun}", self.allocations)
    }

    fn left(&self) -> String {
        match self.by_transport.text() {
            Some(by) => format!("{} left: {by}", self.held()),
            None => format!("{} left", self.held()),
        }
    }

    fn view(&self) -> DrainView {
        let drain = self.told.drain.clone().unwrap_or_default();
        DrainView {
            node_id: self.told.node_id.clone(),
            state: self.state,
            already: self.told.unchanged,
            allocations: self.allocations,
            by_transport: self.by_transport,
            since: units::timestamp(drain.since),
            deadline: units::timestamp(drain.deadline),
            by: drain.by,
            left: self.left(),
            deadline_ms: drain.deadline,
        }
    }
}

/// A line of `turnctl drain`.
#[derive(Debug, Serialize)]
struct DrainView {
    node_id: String,
    state: State,
    /// It was told to drain before.
    already: bool,
    allocations: u64,
    by_transport: ByTransport,
    since: Option<String>,
    deadline: Option<String>,
    by: String,
    #[serde(skip)]
    left: String,
    #[serde(skip)]
    deadline_ms: u64,
}

impl View for DrainView {
    fn blocks(&self, _wide: bool, now_ms: u64) -> Vec<Block> {
        let (id, left) = (&self.node_id, &self.left);
        let to_go = match self.deadline_ms {
            0 => String::new(),
            deadline => format!("; {} to go", units::span(Duration::from_millis(deadline.saturating_sub(now_ms)))),
        };
        let (text, tone) = match self.state {
            State::Draining => (format!("relay {id} draining, {left}{to_go}"), Tone::Plain),
            State::Drained => (format!("relay {id} drained"), Tone::Good),
            State::Overdue => (format!("relay {id} not drained, {left}"), Tone::Bad),
            State::Absent => (format!("relay {id} draining when it joins; it is not there now"), Tone::Attention),
            State::Gone => (format!("relay {id} left the cluster, {left}"), Tone::Bad),
            State::Uncordoned => (format!("relay {id} uncordoned by somebody"), Tone::Bad),
        };
        vec![Block::Lines(vec![Cell::toned(text, tone)])]
    }
}

/// A line of `turnctl uncordon`.
#[derive(Debug, Serialize)]
struct UncordonedView {
    node_id: String,
    /// False if it was not told to drain.
    uncordoned: bool,
    present: bool,
}

impl View for UncordonedView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let what = if self.uncordoned { "uncordoned" } else { "was not told to drain" };
        let away = if self.present { "" } else { "; it is not there now" };
        vec![Block::Lines(vec![Cell::from(format!("relay {} {what}{away}", self.node_id))])]
    }
}

#[cfg(test)]
mod tests {
    use turnpike_proto::v1::{Load, Node, NodeDrain, Transport, TransportAllocations};

    use super::*;
    use crate::output::{Format, render};

    const NOW: u64 = 1_700_000_100_000;

    fn told(absent: bool) -> Drain {
        let drain = NodeDrain { since: NOW, deadline: NOW + 1_800_000, by: "admin/me".into() };
        Drain::new(CordonedNode { node_id: "eu-1".into(), absent, drain: Some(drain), ..CordonedNode::default() })
    }

    fn node(report: u64, counts: &[(Transport, u64)], drain: bool, says_so: bool) -> NodeView {
        let count = |(transport, allocations): &(Transport, u64)| TransportAllocations {
            transport: (*transport).into(),
            allocations: *allocations,
        };
        let load = Load {
            allocations: counts.iter().map(|(_, count)| count).sum(),
            by_transport: counts.iter().map(count).collect(),
            draining: says_so,
            ..Load::default()
        };
        let drain = drain.then(NodeDrain::default);
        Node { node_id: "eu-1".into(), last_report_at: report, load: Some(load), drain, ..Node::default() }.into()
    }

    #[test]
    fn progress_is_a_line_a_change() {
        let mut drain = told(false);
        let mut line = |nodes: &[NodeView]| {
            drain.look(nodes).then(|| render(&drain.view(), Format::Table, false, NOW).expect("renders"))
        };
        let held = [(Transport::Udp, 9), (Transport::Tls, 3)];
        let expected = "relay eu-1 draining, 12 allocations left: udp 9, tls 3; 30m to go\n";
        assert_eq!(line(&[node(1, &held, true, true)]).as_deref(), Some(expected));
        assert_eq!(line(&[node(2, &held, true, true)]), None);
        let expected = "relay eu-1 draining, 1 allocation left: tls 1; 30m to go\n";
        assert_eq!(line(&[node(3, &[(Transport::Tls, 1)], true, true)]).as_deref(), Some(expected));
        assert_eq!(line(&[node(4, &[], true, true)]).as_deref(), Some("relay eu-1 drained\n"));
    }

    /// A report that is older than the drain may show an empty relay.
    #[test]
    fn an_empty_relay_is_believed_when_it_knows() {
        let mut drain = told(false);
        drain.look(&[node(1, &[], true, false)]);
        drain.look(&[node(2, &[], true, false)]);
        assert_eq!(drain.state, State::Draining);
        drain.look(&[node(3, &[], true, false)]);
        assert_eq!(drain.state, State::Drained);
    }

    #[test]
    fn waiting_ends_when_there_is_nothing_to_wait_for() {
        let gone_empty = {
            let mut drain = told(false);
            drain.look(&[node(1, &[], true, false)]);
            drain.look(&[]);
            drain
        };
        assert_eq!((gone_empty.state, gone_empty.lost()), (State::Drained, None));
        let mut gone = told(false);
        gone.look(&[node(1, &[(Transport::Udp, 2)], true, true)]);
        gone.look(&[]);
        assert_eq!(gone.lost().as_deref(), Some("relay eu-1 left the cluster with 2 allocations"));
        let mut uncordoned = told(false);
        for report in 1..=4 {
            uncordoned.look(&[node(report, &[(Transport::Udp, 2)], false, false)]);
        }
        assert_eq!(uncordoned.state, State::Uncordoned);
        let mut absent = told(true);
        absent.look(&[]);
        assert_eq!((absent.is_over(), absent.lost()), (true, None));
    }

    #[test]
    fn the_keys_of_json_stay() {
        let mut drain = told(false);
        drain.look(&[node(1, &[(Transport::Udp, 2)], true, true)]);
        assert_eq!(
            serde_json::to_value(drain.view()).expect("JSON"),
            serde_json::json!({
                "node_id": "eu-1",
                "state": "draining",
                "already": false,
                "allocations": 2,
                "by_transport": {"udp": 2, "tcp": 0, "tls": 0, "dtls": 0},
                "since": "2023-11-14T22:15:00Z",
                "deadline": "2023-11-14T22:45:00Z",
                "by": "admin/me",
            })
        );
    }
}
