use std::collections::BTreeMap;

use proptest::prelude::*;
use turn_core::Transport;

use super::estimate::{Basis, Measured, Partner};
use super::*;
use crate::fleet::drain::{Objection, objection};
use crate::fleet::sample::node_record;
use crate::fleet::{DrainRecord, LoadRecord, NodeListener, NodeView, Thresholds};

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
        let choice = choose(&fleet, &terms(), &query(*region, 3), &Evidence::default(), &mut OwnPicks::default(), 7);
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
    let fleet = fleet([draining, suspect, hot, full, far]);
    let (query, evidence) = (query(None, 5), Evidence::default());
    let (choice, mut considered) = explain(&fleet, &terms(), &query, &evidence, &OwnPicks::default(), 1);
    considered.sort_by(|a, b| a.node_id.cmp(&b.node_id));
    let outcomes: Vec<String> = considered.iter().map(|c| format!("{}: {}", c.node_id, c.outcome)).collect();
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
    assert_eq!(choice.relays[0].rtt.rtt_ms, 90);
    assert_eq!(choice.refusal, None);
}

#[test]
fn the_least_loaded_serves_when_all_are_overloaded() {
    let loaded = |id, permille| {
        let mut node = node(id, "eu");
        node.load.busiest_worker_permille = permille;
        node
    };
    let fleet = fleet([loaded("a", 990), loaded("b", 900), loaded("c", 950)]);
    let choice = choose(&fleet, &terms(), &query(None, 2), &Evidence::default(), &mut OwnPicks::default(), 3);
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
        let choice = choose(&fleet, &terms(), &query, &Evidence::default(), &mut OwnPicks::default(), 0);
        assert_eq!(choice.refusal.as_deref(), Some(expected), "{what}");
    }
}

#[test]
fn uris_are_those_of_rfc_7065_ipv4_first() {
    let mut node = node("a", "eu");
    node.record.listeners = listeners([
        (Transport::Udp, "[2001:db8::1]:3478"),
        (Transport::Dtls, "198.51.100.1:5349"),
        (Transport::Tls, "198.51.100.1:5349"),
        (Transport::Tcp, "198.51.100.1:3478"),
        (Transport::Udp, "198.51.100.1:3478"),
        (Transport::Udp, "0.0.0.0:3478"),
    ]);
    let uris = |transports| uris_of(&node, transports);
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
    node.record.listeners = listeners([
        (Transport::Udp, "198.51.100.1:3478"),
        (Transport::Tls, "198.51.100.1:5349"),
        (Transport::Tls, "[2001:db8::1]:5349"),
        (Transport::Tls, "198.51.100.1:443"),
        (Transport::Dtls, "198.51.100.1:5349"),
    ]);
    let uris = |transports| uris_of(&node, transports);
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
        let steering = Steering::new(terms().into(), None, 42);
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
        choose(&fleet, &terms(), &query(None, 1), &Evidence::default(), &mut picks, 0);
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
    let answers: Vec<_> = (0..12)
        .map(|seed| {
            ids(&choose(&fleet, &terms(), &query(None, 1), &Evidence::default(), &mut picks, seed))[0].to_owned()
        })
        .collect();
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
        choose(&fleet, &terms(), &query(None, 1), &Evidence::default(), &mut picks, 0);
        assert!(picks.len() <= 2, "{} remembered", picks.len());
    }
}

#[test]
fn a_region_keeps_a_relay_that_takes_clients() {
    let fleet = |states: &[(&str, &str, bool)]| {
        let node = |(id, region, drains): &(&str, &str, bool)| {
            let mut node = node(id, region);
            node.drain = drains.then(DrainRecord::default);
            ((*id).to_owned(), node)
        };
        Snapshot { nodes: states.iter().map(node).collect(), ..Snapshot::default() }
    };
    let two = fleet(&[("eu-1", "eu", false), ("eu-2", "eu", false), ("us-1", "us", false)]);
    let one = fleet(&[("eu-1", "eu", false), ("eu-2", "eu", true), ("us-1", "us", true)]);
    let cases = [
        ("another is left", &two, &["eu-1"][..], None),
        ("none is left", &two, &["eu-1", "eu-2"], Some(Objection::Region("eu".to_owned()))),
        ("the only one of its region", &two, &["us-1"], Some(Objection::Region("us".to_owned()))),
        ("all of them", &two, &["eu-1", "eu-2", "us-1"], Some(Objection::Cluster)),
        ("the last of all", &one, &["eu-1"], Some(Objection::Cluster)),
        ("a region that has none anyway", &one, &["us-1"], None),
        ("nobody", &two, &["eu-3"], Some(Objection::Unknown("eu-3".to_owned()))),
    ];
    for (what, fleet, ids, expected) in cases {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        assert_eq!(objection(fleet, &Thresholds::default(), &ids), expected, "{what}");
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

/// A client of a network from which these regions were measured.
fn measured(rtts: &[(&str, u32)]) -> Evidence {
    let measured = rtts.iter().map(|(region, rtt_ms)| Measured {
        region: (*region).into(),
        rtt_ms: *rtt_ms,
        age: std::time::Duration::from_secs(5),
    });
    Evidence { measured: measured.collect(), ..Evidence::default() }
}

#[test]
fn what_clients_measured_decides_unless_a_region_is_asked_for() {
    let fleet = fleet([node("eu-1", "eu"), node("us-1", "us"), node("ap-1", "ap")]);
    let evidence = measured(&[("us", 20), ("eu", 95)]);
    for (region, expected) in [(None, ["us-1", "eu-1", "ap-1"]), (Some("eu"), ["eu-1", "us-1", "ap-1"])] {
        let choice = choose(&fleet, &terms(), &query(region, 3), &evidence, &mut OwnPicks::default(), 7);
        assert_eq!(ids(&choice), expected);
        assert_eq!(choice.origin.as_deref(), region);
    }
    let choice = choose(&fleet, &terms(), &query(Some("mars"), 1), &evidence, &mut OwnPicks::default(), 7);
    assert_eq!(ids(&choice), ["us-1"], "an unknown region is none");
    assert!(matches!(choice.relays[0].rtt.basis, Basis::Measured { .. }));
}

#[test]
fn a_loaded_nearest_relay_sheds_and_says_so() {
    let mut near = node("eu-1", "eu");
    near.record.max_allocations = 100;
    let evidence = measured(&[("eu", 20), ("us", 32)]);
    let query = query(None, 1);
    for (allocations, expected, outcome) in [
        (0, "eu-1", "chosen, place 1"),
        (70, "eu-1", "chosen, place 1"),
        (89, "us-1", "3 ms behind the best score"),
        (90, "us-1", "left out: overloaded"),
    ] {
        near.load.allocations = allocations;
        let fleet = fleet([near.clone(), node("us-1", "us")]);
        let (choice, considered) = explain(&fleet, &terms(), &query, &evidence, &OwnPicks::default(), 3);
        assert_eq!(ids(&choice), [expected], "{allocations}");
        let near = considered.iter().find(|it| it.node_id == "eu-1").expect("considered");
        assert_eq!(near.outcome.to_string(), outcome, "{allocations}: {near:?}");
    }
}

#[test]
fn a_home_region_is_left_only_for_ten_milliseconds_and_a_third() {
    let fleet = fleet([node("eu-1", "eu"), node("us-1", "us")]);
    let cases = [
        ("far more", 100, 50, "us-1"),
        ("ten and no more", 25, 15, "eu-1"),
        ("eleven of twenty-five", 25, 14, "us-1"),
        ("twenty, but not a third", 90, 70, "eu-1"),
        ("the home is nearer anyway", 20, 70, "eu-1"),
    ];
    for (what, eu, us, expected) in cases {
        let evidence = measured(&[("eu", eu), ("us", us)]);
        for (home, expected) in [(Some("eu"), expected), (Some("ap"), if eu < us { "eu-1" } else { "us-1" })] {
            let query = Query { home: home.map(str::to_owned), ..query(None, 1) };
            let (choice, considered) = explain(&fleet, &terms(), &query, &evidence, &OwnPicks::default(), 5);
            assert_eq!(ids(&choice), [expected], "{what}, from {home:?}");
            let kept = considered.iter().any(|it| it.outcome == Outcome::NotHome);
            assert_eq!(kept, home == Some("eu") && expected == "eu-1", "{what}, from {home:?}");
        }
    }
    // A home whose relays are gone is none.
    let mut gone = fleet;
    gone.nodes.get_mut("eu-1").expect("there").load.suspect = true;
    let query = Query { home: Some("eu".to_owned()), ..query(None, 1) };
    let choice = choose(&gone, &terms(), &query, &Evidence::default(), &mut OwnPicks::default(), 5);
    assert_eq!(ids(&choice), ["us-1"]);
}

#[test]
fn both_ends_of_a_session_get_one_relay_or_the_cheapest_pair() {
    let fleet = fleet([node("eu-1", "eu"), node("eu-2", "eu"), node("us-1", "us"), node("us-2", "us")]);
    let partner = |node: &str, region: &str| Some(Partner { node_id: node.to_owned(), region: region.to_owned() });
    let cases = [
        ("one region, one relay", [("eu", 20), ("us", 110)], partner("eu-2", "eu"), "eu-2"),
        ("the other way round", [("eu", 110), ("us", 20)], partner("us-1", "us"), "us-1"),
        // 20 + 90 + 5 by a relay of its own against 180 straight to the partner's.
        ("the pair is cheaper", [("eu", 180), ("us", 20)], partner("eu-1", "eu"), "us-"),
        ("straight is cheaper", [("eu", 100), ("us", 20)], partner("eu-1", "eu"), "eu-1"),
        ("the partner's relay is gone", [("eu", 20), ("us", 110)], partner("eu-9", "eu"), "eu-"),
    ];
    for (what, rtts, partner, expected) in cases {
        for seed in 0..20 {
            let evidence = Evidence { partner: partner.clone(), affinity: Some(1), ..measured(&rtts) };
            let choice = choose(&fleet, &terms(), &query(None, 1), &evidence, &mut OwnPicks::default(), seed);
            assert!(ids(&choice)[0].starts_with(expected), "{what}: {:?}", ids(&choice));
        }
    }
    // Replicas that know nothing of each other send both ends of a region to one relay, and calls to all of them.
    let mut relays = std::collections::BTreeSet::new();
    for call in 0..32_u64 {
        let ends: Vec<_> = (0..2)
            .map(|replica| {
                let steering = Steering::new(terms().into(), None, replica);
                let session = Some(call.to_be_bytes().to_vec());
                steering.choose(&fleet, &Query { session, ..query(None, 1) }).relays.remove(0).node_id
            })
            .collect();
        assert_eq!(ends[0], ends[1]);
        relays.extend(ends);
    }
    assert_eq!(relays.len(), 2, "{relays:?}");
}

#[test]
fn a_running_controller_remembers_measurements_and_sessions_and_explains_without_counting() {
    let fleet = fleet([node("eu-1", "eu"), node("us-1", "us")]);
    let steering = Steering::new(terms().into(), None, 1);
    let client: std::net::IpAddr = "203.0.113.7".parse().expect("literal");
    let from = |client, session: Option<&[u8]>| Query {
        client: Some(client),
        session: session.map(<[u8]>::to_vec),
        ..query(None, 1)
    };
    assert_eq!(ids(&steering.choose(&fleet, &from(client, None))), ["eu-1"], "the home region");
    let rtts = [("us".to_owned(), 20.0), ("mars".to_owned(), 1.0), ("eu".to_owned(), 104.0)];
    assert_eq!(steering.report(&fleet, client, &rtts), 2, "mars has no relay");
    let neighbour = "203.0.113.200".parse().expect("literal");
    assert_eq!(ids(&steering.choose(&fleet, &from(neighbour, Some(b"call")))), ["us-1"]);
    let other = "198.51.100.1".parse().expect("literal");
    for _ in 0..3 {
        let explained = steering.explain(&fleet, &from(other, Some(b"call")));
        let expected = [
            "nobody has measured from 198.51.100.0/24",
            "there is no geo database",
            "distances are taken from region eu, this controller's own",
            "the other end of the session is on us-1 in us",
        ];
        assert_eq!(explained.evidence, expected);
        // 90 straight to us-1, 90 and a hop by way of eu-1.
        assert_eq!(ids(&explained.choice), ["us-1"]);
        let eu = explained.considered.iter().find(|it| it.node_id == "eu-1").expect("considered");
        assert_eq!((eu.rtt.rtt_ms, eu.session_ms, eu.score_ms, eu.own_picks), (0, 95, 95, 1));
    }
    let targets = steering.targets(&fleet, client);
    let regions: Vec<_> = targets.iter().map(|target| target.region.as_str()).collect();
    assert_eq!(regions, ["us", "eu"], "nearest first");
    assert_eq!(targets[0].address.to_string(), "198.51.100.1:3478");
    assert_eq!(steering.targets(&fleet, "2001:db8::1".parse().expect("literal")), [], "no relay has IPv6");
}

#[test]
fn the_picks_of_other_replicas_are_taken_to_be_as_many() {
    let mut small = node("a", "eu");
    small.record.max_allocations = 100;
    let mut fleet = fleet([small, node("b", "us")]);
    fleet.controllers = 3;
    let mut picks = OwnPicks::default();
    let count = (0..100)
        .filter(|seed| {
            let evidence = Evidence::default();
            ids(&choose(&fleet, &terms(), &query(None, 1), &evidence, &mut picks, *seed)) == ["a"]
        })
        .count();
    assert_eq!(count, 30, "90 of all three");
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
        let fleet = Snapshot {
            nodes: nodes.into_iter().map(|n| (n.record.node_id.clone(), n)).collect(),
            ..Snapshot::default()
        };
        let mut query = query(region, limit);
        if tcp_only {
            query.transports.insert(Transport::Tcp);
        }
        let mut picks = OwnPicks::default();
        let (explained, considered) = explain(&fleet, &terms(), &query, &Evidence::default(), &picks, seed);
        let choice = choose(&fleet, &terms(), &query, &Evidence::default(), &mut picks, seed);
        prop_assert_eq!(&explained, &choice);
        let fits = |n: &&NodeView| !tcp_only || n.record.listeners.iter().any(|l| l.transport == Transport::Tcp);
        let of = |wanted| fleet.nodes.values().filter(fits)
            .filter(move |n| n.state(&terms().thresholds) == wanted).count();
        let (ready, overloaded) = (of(NodeState::Ready), of(NodeState::Overloaded));
        let open = if ready > 0 { ready } else { overloaded };
        prop_assert_eq!(choice.relays.len(), open.min(limit.clamp(1, MAX_LIMIT)));
        prop_assert_eq!(choice.refusal.is_some(), open == 0);
        prop_assert_eq!(considered.len(), fleet.nodes.len());

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
            let score = |id: &str| considered.iter().find(|c| c.node_id == id).map(|c| c.score_ms);
            let best = considered.iter()
                .filter(|c| c.state == NodeState::Ready && c.outcome != Outcome::NoTransport)
                .map(|c| c.score_ms).min();
            prop_assert!(score(&choice.relays[0].node_id) <= best.map(|b| b + NEAR_MS));
        }
        let again = choose(&fleet, &terms(), &query, &Evidence::default(), &mut OwnPicks::default(), seed);
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
    relays.sort_by_key(|relay| relay.rtt.rtt_ms);
    relays.into_iter().map(|relay| relay.node_id.as_str()).collect()
}

/// What a client that asks for these transports is given of the only node.
fn uris_of(node: &NodeView, transports: &[Transport]) -> Vec<String> {
    let query = Query { transports: transports.iter().copied().collect(), ..Query::default() };
    let mut choice =
        choose(&fleet([node.clone()]), &terms(), &query, &Evidence::default(), &mut OwnPicks::default(), 0);
    choice.relays.pop().expect("one relay").uris
}

fn query(region: Option<&str>, limit: usize) -> Query {
    Query { region: region.map(str::to_owned), limit, ..Query::default() }
}

pub(super) fn terms() -> Terms {
    let mut distances = Distances::default();
    distances.set("eu", "us", 90);
    distances.set("eu", "ap", 250);
    distances.set("us", "ap", 160);
    distances.set("sa", "us", 120);
    Terms { home: "eu".to_owned(), distances, ..Terms::default() }
}

pub(super) fn fleet<const N: usize>(nodes: [NodeView; N]) -> Snapshot {
    let nodes = nodes.into_iter().map(|node| (node.record.node_id.clone(), node)).collect();
    Snapshot { nodes, ..Snapshot::default() }
}

pub(crate) fn node(id: &str, region: &str) -> NodeView {
    let record = node_record(id, region, [198, 51, 100, 1].into());
    NodeView { record, epoch: 1, load: LoadRecord::default(), drain: None }
}

fn listeners<const N: usize>(written: [(Transport, &str); N]) -> Vec<NodeListener> {
    written.map(|(transport, address)| listener(transport, address)).to_vec()
}

pub(super) fn listener(transport: Transport, address: &str) -> NodeListener {
    NodeListener { transport, address: address.parse().expect("literal"), ip_in_certificate: false }
}
