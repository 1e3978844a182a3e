use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::fleet::{LoadRecord, NodeListener, NodeRecord};

#[test]
fn the_asked_region_comes_first_then_the_nearest() {
    let fleet = fleet([node("eu-1", "eu"), node("us-1", "us"), node("ap-1", "ap")]);
    let cases: &[(&str, Option<&str>, &[&str], &str)] = &[
        ("asked", Some("us"), &["us-1", "eu-1", "ap-1"], "us"),
        ("home when none is asked", None, &["eu-1", "us-1", "ap-1"], "eu"),
        ("home when an unknown one is asked", Some("mars"), &["eu-1", "us-1", "ap-1"], "eu"),
        ("known by the table, without nodes", Some("sa"), &["us-1", "ap-1", "eu-1"], "us"),
    ];
    for (what, region, expected, served) in cases {
        let choice = choose(&fleet, &terms(), &query(*region, 3), &mut OwnPicks::default(), 7);
        // ap and eu are equally unknown from sa: their order is drawn.
        let mut ids = ids(&choice);
        let mut expected = expected.to_vec();
        ids[1..].sort_unstable();
        expected[1..].sort_unstable();
        if *region != Some("sa") {
            assert_eq!(self::ids(&choice), ids_by_distance(&choice), "{what}: in order of distance");
        }
        assert_eq!(ids, expected, "{what}");
        assert_eq!(choice.region(), *served, "{what}");
    }
}

#[test]
fn draining_suspect_and_overloaded_nodes_are_left_out_with_the_reason() {
    let mut draining = node("a", "eu");
    draining.load.draining = true;
    let mut suspect = node("b", "eu");
    suspect.load.suspect = true;
    let mut hot = node("c", "eu");
    hot.load.busiest_worker_permille = 850;
    let mut full = node("d", "eu");
    full.record.max_allocations = 10;
    full.load.allocations = 9;
    let far = node("e", "us");
    let choice =
        choose(&fleet([draining, suspect, hot, full, far]), &terms(), &query(None, 5), &mut OwnPicks::default(), 1);
    let outcomes: Vec<String> = choice.considered.iter().map(|c| format!("{}: {}", c.node_id, c.outcome)).collect();
    assert_eq!(
        outcomes,
        [
            "a: left out: draining",
            "b: left out: suspect",
            "c: left out: overloaded",
            "d: left out: overloaded",
            "e: chosen, place 1"
        ]
    );
    assert_eq!(choice.region(), "us");
    assert_eq!(choice.relays[0].distance_ms, 90);
    assert_eq!(choice.refusal(), None);
}

#[test]
fn the_least_loaded_serves_when_all_are_overloaded() {
    let loaded = |id, permille| {
        let mut node = node(id, "eu");
        node.load.busiest_worker_permille = permille;
        node
    };
    let fleet = fleet([loaded("a", 990), loaded("b", 900), loaded("c", 950)]);
    let choice = choose(&fleet, &terms(), &query(None, 2), &mut OwnPicks::default(), 3);
    assert_eq!(ids(&choice), ["b", "c"]);
}

#[test]
fn an_empty_answer_says_why() {
    let mut draining = node("a", "eu");
    draining.load.draining = true;
    let mut suspect = node("b", "eu");
    suspect.load.suspect = true;
    let mut tls = query(None, 2);
    tls.transports.insert(Transport::Tls);
    let cases = [
        ("nobody", fleet([]), query(None, 2), "no relay has joined the cluster"),
        (
            "unfit",
            fleet([draining, suspect]),
            query(None, 2),
            "no relay can be offered: of 2 known, 1 draining, 1 suspect (no connection to a controller)",
        ),
        (
            "transport",
            fleet([node("a", "eu")]),
            tls,
            "no relay can be offered: of 1 known, 1 without a listener for the transports asked for",
        ),
    ];
    for (what, fleet, query, expected) in cases {
        let choice = choose(&fleet, &terms(), &query, &mut OwnPicks::default(), 0);
        assert_eq!(choice.refusal().as_deref(), Some(expected), "{what}");
    }
}

#[test]
fn uris_are_those_of_rfc_7065_ipv4_first() {
    let mut node = node("a", "eu");
    node.record.listeners = [
        (Transport::Udp, "[2001:db8::1]:3478"),
        (Transport::Dtls, "198.51.100.1:5349"),
        (Transport::Tls, "198.51.100.1:5349"),
        (Transport::Tcp, "198.51.100.1:3478"),
        (Transport::Udp, "198.51.100.1:3478"),
        (Transport::Udp, "0.0.0.0:3478"),
    ]
    .map(|(transport, address)| listener(transport, address))
    .to_vec();
    let fleet = fleet([node]);
    let uris = |transports: &[Transport]| {
        let query = Query { transports: transports.iter().copied().collect(), ..Query::default() };
        let mut choice = choose(&fleet, &terms(), &query, &mut OwnPicks::default(), 0);
        choice.relays.pop().expect("one relay").uris
    };
    assert_eq!(
        uris(&[]),
        [
            "turn:198.51.100.1:3478?transport=udp",
            "turn:198.51.100.1:3478?transport=tcp",
            "turns:198.51.100.1:5349?transport=tcp",
            "turn:[2001:db8::1]:3478?transport=udp",
        ]
    );
    assert_eq!(uris(&[Transport::Dtls]), ["turns:198.51.100.1:5349?transport=udp"]);
    assert_eq!(uris(&[Transport::Tls]), ["turns:198.51.100.1:5349?transport=tcp"]);
}

#[test]
fn a_host_name_stands_in_the_uris_of_what_is_encrypted() {
    let mut node = node("a", "eu");
    node.record.public_host = "eu-1.turn.example.org".to_owned();
    node.record.listeners = [
        (Transport::Udp, "198.51.100.1:3478"),
        (Transport::Tls, "198.51.100.1:5349"),
        (Transport::Tls, "[2001:db8::1]:5349"),
        (Transport::Tls, "198.51.100.1:443"),
        (Transport::Dtls, "198.51.100.1:5349"),
    ]
    .map(|(transport, address)| listener(transport, address))
    .to_vec();
    let fleet = fleet([node]);
    let uris = |transports: &[Transport]| {
        let query = Query { transports: transports.iter().copied().collect(), ..Query::default() };
        let mut choice = choose(&fleet, &terms(), &query, &mut OwnPicks::default(), 0);
        choice.relays.pop().expect("one relay").uris
    };
    let tls = ["turns:eu-1.turn.example.org:443?transport=tcp", "turns:eu-1.turn.example.org:5349?transport=tcp"];
    assert_eq!(uris(&[]), ["turn:198.51.100.1:3478?transport=udp", tls[0], tls[1]]);
    assert_eq!(uris(&[Transport::Tls]), tls);
    assert_eq!(uris(&[Transport::Dtls]), ["turns:eu-1.turn.example.org:5349?transport=udp"]);
}

/// 1,000 clients between two reports, over three equal nodes: each within 15 % of its third as first choice, and within
/// 2 % counting every place, which blind draws would miss.
#[test]
fn a_burst_spreads() {
    for limit in [1, 2] {
        let fleet = fleet([node("a", "eu"), node("b", "eu"), node("c", "eu")]);
        let steering = Steering::new(terms(), 42);
        let mut first = BTreeMap::<String, u32>::new();
        let mut all = BTreeMap::<String, u32>::new();
        for _ in 0..1000 {
            let choice = steering.choose(&fleet, &query(None, limit));
            *first.entry(choice.relays[0].node_id.clone()).or_default() += 1;
            for relay in choice.relays {
                *all.entry(relay.node_id).or_default() += 1;
            }
        }
        for (counts, share, most) in [(first, 1000.0 / 3.0, 0.15), (all, 1000.0 * limit as f64 / 3.0, 0.02)] {
            assert_eq!(counts.len(), 3, "limit {limit}: {counts:?}");
            for (node, picks) in &counts {
                let off = (f64::from(*picks) - share).abs() / share;
                assert!(off < most, "limit {limit}: {node} got {picks} of {share:.0}: {counts:?}");
            }
        }
    }
}

#[test]
fn picks_count_until_the_next_report() {
    let mut fleet = fleet([node("a", "eu")]);
    let mut picks = OwnPicks::default();
    for _ in 0..3 {
        choose(&fleet, &terms(), &query(None, 1), &mut picks, 0);
    }
    assert_eq!(picks.since_report(&fleet.nodes["a"]), 3);
    fleet.nodes.get_mut("a").expect("a").load.reported_at += 1;
    assert_eq!(picks.since_report(&fleet.nodes["a"]), 0);
}

#[test]
fn picks_fill_a_node_to_its_limit() {
    let mut small = node("a", "eu");
    small.record.max_allocations = 10;
    let fleet = fleet([small, node("b", "us")]);
    let mut picks = OwnPicks::default();
    let answers: Vec<_> =
        (0..12).map(|seed| ids(&choose(&fleet, &terms(), &query(None, 1), &mut picks, seed))[0].to_owned()).collect();
    // The penalty for load sends clients away before the limit of 90 % does; beyond it nobody is sent there.
    let small = answers.iter().filter(|id| *id == "a").count();
    assert!((8..=9).contains(&small), "{answers:?}");
    assert_eq!(answers.last().map(String::as_str), Some("b"));
}

#[test]
fn picks_of_nodes_that_left_are_forgotten() {
    let mut picks = OwnPicks::default();
    for i in 0..100 {
        let fleet = fleet([node(&format!("n{i}"), "eu")]);
        choose(&fleet, &terms(), &query(None, 1), &mut picks, 0);
        assert!(picks.len() <= 2, "{} remembered", picks.len());
    }
}

#[test]
fn regions_count_nodes_health_and_allocations() {
    let mut draining = node("eu-2", "eu");
    draining.load.draining = true;
    draining.load.allocations = 5;
    let fleet = fleet([node("eu-1", "eu"), draining, node("us-1", "us")]);
    let seen: Vec<_> = regions(&fleet, &Thresholds::default())
        .into_iter()
        .map(|r| (r.name, r.nodes, r.healthy, r.allocations))
        .collect();
    assert_eq!(seen, [("eu".to_owned(), 2, 1, 5), ("us".to_owned(), 1, 1, 0)]);
}

proptest! {
    /// The rules that hold for every fleet, query and seed.
    #[test]
    fn rules(
        nodes in proptest::collection::vec(any_node(), 0..12),
        region in proptest::option::of(prop_oneof![Just("eu"), Just("us"), Just("ap"), Just("nowhere")]),
        limit in 0_usize..12,
        tcp_only: bool,
        seed: u64,
    ) {
        let fleet = Snapshot { nodes: nodes.into_iter().map(|n| (n.record.node_id.clone(), n)).collect() };
        let mut query = query(region, limit);
        if tcp_only {
            query.transports.insert(Transport::Tcp);
        }
        let mut picks = OwnPicks::default();
        let choice = choose(&fleet, &terms(), &query, &mut picks, seed);
        let fits = |n: &&NodeView| !tcp_only || n.record.listeners.iter().any(|l| l.transport == Transport::Tcp);
        let of = |wanted| fleet.nodes.values().filter(fits)
            .filter(move |n| n.state(&terms().thresholds) == wanted).count();
        let (ready, overloaded) = (of(NodeState::Ready), of(NodeState::Overloaded));
        let open = if ready > 0 { ready } else { overloaded };
        prop_assert_eq!(choice.relays.len(), open.min(limit.clamp(1, MAX_LIMIT)));
        prop_assert_eq!(choice.refusal().is_some(), open == 0);
        prop_assert_eq!(choice.considered.len(), fleet.nodes.len());

        let mut seen = std::collections::BTreeSet::new();
        for relay in &choice.relays {
            prop_assert!(seen.insert(&relay.node_id), "{} twice", relay.node_id);
            prop_assert!(!relay.uris.is_empty());
            let state = fleet.nodes[&relay.node_id].state(&terms().thresholds);
            prop_assert_eq!(state, if ready > 0 { NodeState::Ready } else { NodeState::Overloaded });
            prop_assert_eq!(picks.since_report(&fleet.nodes[&relay.node_id]), 1);
        }
        // The first relay is as near as any that could have been chosen.
        if ready > 0 {
            let score = |id: &str| choice.considered.iter().find(|c| c.node_id == id).map(|c| c.score_ms);
            let best = choice.considered.iter()
                .filter(|c| c.state == NodeState::Ready && c.outcome != Outcome::NoTransport)
                .map(|c| c.score_ms).min();
            prop_assert!(score(&choice.relays[0].node_id) <= best.map(|b| b + NEAR_MS));
        }
        let again = choose(&fleet, &terms(), &query, &mut OwnPicks::default(), seed);
        prop_assert_eq!(again, choice);
    }
}

fn any_node() -> impl Strategy<Value = NodeView> {
    (
        0_u8..20,
        prop_oneof![Just("eu"), Just("us"), Just("ap")],
        prop_oneof![Just(0_u64), 1_u64..20, any::<u64>()],
        prop_oneof![0_u64..20, any::<u64>()],
        0_u32..=1000,
        any::<bool>(),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(id, region, most, allocations, cpu, tcp, draining, suspect)| {
            let mut node = node(&format!("n{id}"), region);
            node.record.max_allocations = most;
            node.load.allocations = allocations;
            node.load.busiest_worker_permille = cpu;
            node.load.draining = draining;
            node.load.suspect = suspect;
            if !tcp {
                node.record.listeners.retain(|listener| listener.transport != Transport::Tcp);
            }
            node
        })
}

fn ids(choice: &Choice) -> Vec<&str> {
    choice.relays.iter().map(|relay| relay.node_id.as_str()).collect()
}

fn ids_by_distance(choice: &Choice) -> Vec<&str> {
    let mut relays: Vec<_> = choice.relays.iter().collect();
    relays.sort_by_key(|relay| relay.distance_ms);
    relays.into_iter().map(|relay| relay.node_id.as_str()).collect()
}

fn query(region: Option<&str>, limit: usize) -> Query {
    Query { region: region.map(str::to_owned), limit, ..Query::default() }
}

fn terms() -> Terms {
    let mut distances = Distances::default();
    distances.set("eu", "us", 90);
    distances.set("eu", "ap", 250);
    distances.set("us", "ap", 160);
    distances.set("sa", "us", 120);
    Terms { home: "eu".to_owned(), distances, thresholds: Thresholds::default() }
}

fn fleet<const N: usize>(nodes: [NodeView; N]) -> Snapshot {
    Snapshot { nodes: nodes.into_iter().map(|node| (node.record.node_id.clone(), node)).collect() }
}

fn node(id: &str, region: &str) -> NodeView {
    NodeView {
        record: NodeRecord {
            node_id: id.to_owned(),
            region: region.to_owned(),
            zone: String::new(),
            version: "0.1.0".to_owned(),
            relay_address: "198.51.100.1".parse().expect("literal"),
            relay_ips: Vec::new(),
            listeners: vec![
                listener(Transport::Udp, "198.51.100.1:3478"),
                listener(Transport::Tcp, "198.51.100.1:3478"),
            ],
            public_host: String::new(),
            relay_ports: (49152, 65535),
            workers: 1,
            max_allocations: 0,
            boot_id: "boot".to_owned(),
            registered_at: 0,
            lease: 0,
        },
        epoch: 1,
        load: LoadRecord::default(),
    }
}

fn listener(transport: Transport, address: &str) -> NodeListener {
    NodeListener { transport, address: address.parse().expect("literal") }
}
