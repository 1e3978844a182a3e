//! What is known of each relay, and the rates between its reports (pure).

use std::cmp::Reverse;
use std::collections::HashMap;

use clap::ValueEnum;
use serde::Serialize;
use turnpike_proto::v1::{Node, NodeState};

use crate::output::{Block, Cell, Tone, View};
use crate::units;

/// What relays are ordered by.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum Sort {
    Node,
    Packets,
    #[default]
    Traffic,
    Allocations,
    Cpu,
    Rtt,
    Drops,
}

/// Counters of a relay's last report, and what its rates were then.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    reported_at: u64,
    packets: u64,
    dropped: u64,
    rates: Option<Rates>,
}

#[derive(Clone, Copy, Debug)]
struct Rates {
    packets: u64,
    dropped: u64,
}

/// The relays as last heard of.
#[derive(Debug, Default)]
pub(crate) struct Board {
    relays: Vec<Relay>,
    counted: HashMap<String, Counted>,
}

/// A relay this second.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Relay {
    pub(crate) node_id: String,
    pub(crate) region: String,
    pub(crate) state: &'static str,
    /// `null` before its second report.
    pub(crate) packets_per_second: Option<u64>,
    pub(crate) bytes_per_second: u64,
    pub(crate) allocations: u64,
    /// Of its busiest worker.
    pub(crate) cpu_permille: u32,
    /// Longest round trip of its backbone links; `null` without a measured one.
    pub(crate) rtt_us: Option<u32>,
    /// `null` before its second report.
    pub(crate) dropped_per_second: Option<u64>,
    /// What is said of its drain; empty when it does not drain.
    pub(crate) drain: String,
}

impl Board {
    /// Takes in what a controller says of the relays at `now_ms`.
    pub(crate) fn update(&mut self, nodes: Vec<Node>, now_ms: u64) {
        self.counted.retain(|id, _| nodes.iter().any(|node| node.node_id == *id));
        self.relays.clear();
        for node in nodes {
            let rates = self.rates(&node);
            self.relays.push(Relay::new(node, rates, now_ms));
        }
    }

    /// Whether a relay that reports has reported but once.
    pub(crate) fn lacks_rates(&self) -> bool {
        self.counted.values().any(|counted| counted.reported_at > 0 && counted.rates.is_none())
    }

    pub(crate) fn len(&self) -> usize {
        self.relays.len()
    }

    /// The relays in this order, the greatest first; by name from the first letter.
    pub(crate) fn sorted(&self, sort: Sort) -> Vec<&Relay> {
        let mut relays: Vec<&Relay> = self.relays.iter().collect();
        relays.sort_by(|a, b| (&a.region, &a.node_id).cmp(&(&b.region, &b.node_id)));
        match sort {
            Sort::Node => {}
            Sort::Packets => relays.sort_by_key(|relay| Reverse(relay.packets_per_second)),
            Sort::Traffic => relays.sort_by_key(|relay| Reverse(relay.bytes_per_second)),
            Sort::Allocations => relays.sort_by_key(|relay| Reverse(relay.allocations)),
            Sort::Cpu => relays.sort_by_key(|relay| Reverse(relay.cpu_permille)),
            Sort::Rtt => relays.sort_by_key(|relay| Reverse(relay.rtt_us)),
            Sort::Drops => relays.sort_by_key(|relay| Reverse(relay.dropped_per_second)),
        }
        relays
    }

    /// As one table.
    pub(crate) fn view(&self, sort: Sort) -> TopView {
        TopView { relays: self.sorted(sort).into_iter().cloned().collect() }
    }

    fn rates(&mut self, node: &Node) -> Option<Rates> {
        let load = node.load.clone().unwrap_or_default();
        let counted = self.counted.entry(node.node_id.clone()).or_default();
        if node.last_report_at > counted.reported_at {
            let ms = node.last_report_at - counted.reported_at;
            let rate = |now: u64, before: u64| now.saturating_sub(before).saturating_mul(1000) / ms;
            // A counter that went back belongs to a new process.
            let goes_on = counted.reported_at > 0 && load.packets >= counted.packets;
            counted.rates = goes_on.then(|| Rates {
                packets: rate(load.packets, counted.packets),
                dropped: rate(load.dropped, counted.dropped),
            });
            counted.reported_at = node.last_report_at;
            (counted.packets, counted.dropped) = (load.packets, load.dropped);
        }
        counted.rates
    }
}

impl Relay {
    fn new(node: Node, rates: Option<Rates>, now_ms: u64) -> Self {
        let state = match node.state() {
            NodeState::Ready => "ready",
            NodeState::Draining => "draining",
            NodeState::Overloaded => "overloaded",
            NodeState::Suspect => "suspect",
            NodeState::Standby => "standby",
            NodeState::Unspecified => "unknown",
        };
        let load = node.load.unwrap_or_default();
        let deadline = node.drain.as_ref().map_or(0, |drain| drain.deadline);
        let drain = match (&node.drain, load.ends_at) {
            (_, ends_at @ 1..) => format!("ends in {}", units::left(ends_at, now_ms)),
            (Some(_), 0) if load.allocations == 0 => "empty".to_owned(),
            (Some(_), 0) if deadline == 0 => "no deadline".to_owned(),
            (Some(_), 0) if deadline <= now_ms => "overdue".to_owned(),
            (Some(_), 0) => format!("{} left", units::left(deadline, now_ms)),
            (None, 0) => String::new(),
        };
        Self {
            state,
            packets_per_second: rates.map(|rates| rates.packets),
            dropped_per_second: rates.map(|rates| rates.dropped),
            bytes_per_second: load.bytes_per_second,
            allocations: load.allocations,
            cpu_permille: load.busiest_worker_permille,
            rtt_us: load.links.iter().map(|link| link.rtt_us).max().filter(|rtt| *rtt > 0),
            node_id: node.node_id,
            region: node.region,
            drain,
        }
    }

    pub(crate) fn tone(&self) -> Tone {
        match self.state {
            "ready" | "standby" => Tone::Good,
            "suspect" => Tone::Bad,
            _ => Tone::Attention,
        }
    }

    pub(crate) fn rtt(&self) -> String {
        self.rtt_us.map_or_else(|| "-".to_owned(), |us| units::measured(std::time::Duration::from_micros(us.into())))
    }
}

/// A count, or that it is not known yet.
pub(crate) fn rate(rate: Option<u64>) -> String {
    rate.map_or_else(|| "-".to_owned(), |rate| rate.to_string())
}

/// What `--once` shows.
#[derive(Debug, Serialize)]
pub(crate) struct TopView {
    relays: Vec<Relay>,
}

/// Headings of the table.
pub(crate) const HEAD: [&str; 10] =
    ["NODE", "REGION", "STATE", "PACKETS/S", "TRAFFIC", "ALLOCATIONS", "CPU", "RTT", "DROPS/S", "DRAIN"];

impl View for TopView {
    fn empty(&self) -> Option<&'static str> {
        self.relays.is_empty().then_some("no nodes")
    }

    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let row = |relay: &Relay| {
            vec![
                Cell::from(&relay.node_id),
                Cell::from(&relay.region),
                Cell::toned(relay.state, relay.tone()),
                Cell::from(rate(relay.packets_per_second)),
                Cell::from(units::bit_rate(relay.bytes_per_second)),
                Cell::from(relay.allocations.to_string()),
                Cell::from(units::permille(relay.cpu_permille)),
                Cell::from(relay.rtt()),
                Cell::from(rate(relay.dropped_per_second)),
                Cell::from(&relay.drain),
            ]
        };
        vec![Block::Table { head: HEAD.to_vec(), rows: self.relays.iter().map(row).collect() }]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use turnpike_proto::v1::{LinkReport, Load, NodeDrain};

    use super::*;

    pub(crate) fn node(id: &str, state: NodeState, reported_at: u64, packets: u64) -> Node {
        let links =
            vec![LinkReport { rtt_us: 700, ..Default::default() }, LinkReport { rtt_us: 84_000, ..Default::default() }];
        Node {
            node_id: id.to_owned(),
            region: id[..2].to_owned(),
            state: state.into(),
            last_report_at: reported_at,
            load: Some(Load {
                allocations: 4,
                packets,
                dropped: packets / 100,
                bytes_per_second: packets,
                busiest_worker_permille: 412,
                links,
                ..Load::default()
            }),
            ..Node::default()
        }
    }

    #[test]
    fn rates_are_those_between_two_reports() {
        let mut board = Board::default();
        let packets =
            |board: &Board| board.sorted(Sort::Node).iter().map(|it| it.packets_per_second).collect::<Vec<_>>();
        board.update(vec![node("eu-1", NodeState::Ready, 10_000, 500)], 10_000);
        assert!(board.lacks_rates());
        assert_eq!(packets(&board), [None]);
        board.update(vec![node("eu-1", NodeState::Ready, 12_000, 2_500)], 12_000);
        assert!(!board.lacks_rates());
        assert_eq!(packets(&board), [Some(1000)]);
        // Heard of again without a new report: as it was.
        board.update(vec![node("eu-1", NodeState::Ready, 12_000, 2_500)], 12_500);
        assert_eq!(packets(&board), [Some(1000)]);
        // A new process counts from nothing.
        board.update(vec![node("eu-1", NodeState::Ready, 13_000, 3)], 13_000);
        assert_eq!(packets(&board), [None]);
        board.update(vec![node("eu-1", NodeState::Ready, 14_000, 13)], 14_000);
        assert_eq!(packets(&board), [Some(10)]);
        assert_eq!(board.sorted(Sort::Node)[0].rtt_us, Some(84_000), "the longest");
        board.update(Vec::new(), 15_000);
        assert!(board.counted.is_empty());
        // One that never reports is not waited for.
        board.update(vec![node("eu-1", NodeState::Standby, 0, 0)], 16_000);
        assert!(!board.lacks_rates());
    }

    #[test]
    fn the_greatest_come_first_and_names_in_their_order() {
        let mut board = Board::default();
        let nodes = [("us-1", 5), ("eu-2", 9), ("eu-1", 7)];
        for at in [1000, 2000] {
            let nodes = nodes.map(|(id, packets)| node(id, NodeState::Ready, at, packets * at));
            board.update(nodes.to_vec(), at);
        }
        let ids = |sort| board.sorted(sort).iter().map(|relay| relay.node_id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(Sort::Packets), ["eu-2", "eu-1", "us-1"]);
        assert_eq!(ids(Sort::Node), ["eu-1", "eu-2", "us-1"]);
        assert_eq!(ids(Sort::Cpu), ["eu-1", "eu-2", "us-1"], "alike: by name");
    }

    #[test]
    fn drains_are_told_in_a_word_or_two() {
        let draining = |deadline, ends_at, allocations| {
            let mut node = node("eu-1", NodeState::Draining, 1000, 0);
            node.drain = Some(NodeDrain { since: 1, deadline, by: "admin/me".to_owned() });
            let load = node.load.get_or_insert_default();
            (load.ends_at, load.allocations) = (ends_at, allocations);
            Relay::new(node, None, 100_000).drain
        };
        assert_eq!(draining(0, 0, 3), "no deadline");
        assert_eq!(draining(220_000, 0, 3), "2m left");
        assert_eq!(draining(90_000, 0, 3), "overdue");
        assert_eq!(draining(90_000, 0, 0), "empty");
        assert_eq!(draining(0, 130_000, 0), "ends in 30s");
        assert_eq!(Relay::new(node("eu-1", NodeState::Ready, 1, 1), None, 2).drain, "");
    }
}
