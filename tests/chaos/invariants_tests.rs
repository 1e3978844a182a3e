//! Each promise is seen to fail: a run in which all is well, and the same run with one thing wrong.

use std::net::IpAddr;

use turn_core::{AllocationId, FiveTuple, PeerTransport, Record, RelayedAddr};

use super::*;
use crate::evidence::{Held, Sighting, Written};

fn s(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([198, 18, 0, 2], port))
}

/// Messages each 50 ms from `from` to `until`, but for those sent in a silence.
fn flow(from: f64, until: f64, silences: &[(f64, f64)]) -> Flow {
    let mut flow = Flow::default();
    let mut now = from;
    while now < until {
        let number = flow.send(s(now));
        if !silences.iter().any(|(start, end)| now >= *start && now < *end) {
            flow.arrive(number, s(now + 0.001));
        }
        now += 0.05;
    }
    flow
}

/// A call at relay 0 that lasts from 1 s to the end.
fn call(number: u32, transport: Transport, silences: &[(f64, f64)]) -> Call {
    Call {
        number,
        relay: 0,
        transport,
        relayed: address(50_000 + u16::try_from(number).expect("a small number")),
        born: s(1.0),
        bound: Some(s(1.1)),
        ended: None,
        broke: None,
        refusals: Vec::new(),
        up: flow(1.1, 60.0, silences),
        down: flow(1.1, 60.0, silences),
        foreign: 0,
        damaged: 0,
    }
}

fn timeline(faults: &[(Fault, f64, f64)]) -> Timeline {
    let mut timeline = Timeline::default();
    for (number, (fault, from, until)) in faults.iter().enumerate() {
        timeline.begin(number, *fault, s(*from));
        timeline.end(number, s(*until));
    }
    timeline
}

fn record(epoch: u64, sequence: u64) -> Vec<u8> {
    let client = FiveTuple { client: address(4000), server: address(3478), transport: Transport::Udp };
    let record = Record {
        relay_address: IpAddr::from([198, 18, 0, 2]),
        epoch,
        sequence,
        id: AllocationId([7; 16]),
        five_tuple: client,
        relayed: vec![RelayedAddr { bound: address(50_000), advertised: address(50_000) }],
        peer_transport: PeerTransport::Udp,
        mobility: None,
        proxy: None,
        transaction_id: None,
        address_error: None,
        reservation: None,
        username: b"user".to_vec(),
        session: None,
        created_at: 1,
        expires_at: 2,
        family_expires_at: Vec::new(),
        permissions: Vec::new(),
        channels: Vec::new(),
    };
    record.seal(&turn_core::KeyRing::default())
}

fn written(revision: i64, key: &str, value: Option<Vec<u8>>) -> Written {
    Written { revision, key: format!("{}{key}", harness::etcd::PREFIX), value }
}

fn owner(revision: i64, node: &str, epoch: u64) -> Written {
    let text = format!("{{\"node_id\":{node:?},\"epoch\":{epoch}}}");
    written(revision, "owners/198.18.0.2", Some(text.into_bytes()))
}

const KEY: &str = "allocations/198.18.0.2/A";

/// Relay 0 is killed from 20 to 22 s and was silent until 23 s; all is well.
fn well() -> Evidence {
    let silence = [(20.0, 23.0)];
    let mut tcp = call(3, Transport::Tcp, &silence);
    tcp.broke = Some((s(20.1), "the server closed the connection".to_owned()));
    let calls = vec![call(1, Transport::Udp, &silence), call(2, Transport::Udp, &silence), tcp];
    let everybody: BTreeSet<String> = (0..RELAYS).map(node).collect();
    let probe =
        |from, until, outcome| Probe { relay: 0, transport: Transport::Udp, from: s(from), until: s(until), outcome };
    Evidence {
        timeline: timeline(&[(Fault::KillRelay(0), 20.0, 22.0)]),
        calls,
        probes: vec![
            probe(10.0, 10.1, Ok(())),
            probe(20.5, 24.5, Err("no answer".to_owned())),
            probe(30.0, 30.1, Ok(())),
        ],
        sightings: vec![Sighting { controller: 0, at: s(30.0), nodes: Ok(everybody) }],
        history: vec![
            written(1, "epochs/198.18.0.2", Some(b"1 boot".to_vec())),
            owner(2, "relay-0", 1),
            written(3, KEY, Some(record(1, 1))),
            written(4, KEY, Some(record(1, 2))),
            owner(5, "relay-0", 2),
            // What the journal had and the store had not.
            written(6, KEY, Some(record(1, 3))),
            written(7, KEY, Some(record(2, 4))),
            written(8, KEY, None),
        ],
        untrue: Vec::new(),
        settled: Some(s(23.0)),
        held: vec![Held { at: s(30.0), by: [HOME].into() }],
        answering: 1,
        died: Vec::new(),
        end: s(60.0),
    }
}

fn wrong(evidence: &Evidence) -> Vec<String> {
    check(evidence, Duration::from_secs(5))
}

#[test]
fn nothing_is_wrong_where_all_is_well() {
    assert_eq!(wrong(&well()), Vec::<String>::new());
}

#[test]
fn every_promise_can_be_broken() {
    type Break = fn(&mut Evidence);
    let cases: &[(&str, Break, &str)] = &[
        ("a UDP call is told that it is gone", |e| e.calls[0].broke = Some((s(24.0), "437".into())), "lost at 24.00"),
        ("a call falls silent", |e| e.calls[0].up = flow(1.1, 60.0, &[(20.0, 60.0)]), "nothing to the peer"),
        (
            "a call is silent too long after the start",
            |e| e.calls[0].down = flow(1.1, 60.0, &[(20.0, 24.5)]),
            "nothing to the client",
        ),
        ("messages are lost for nothing", |e| e.calls[1].up.arrived[100] = None, "1 messages to the peer lost"),
        ("437 to a living allocation", |e| e.calls[0].refusals.push((s(22.5), Method::Refresh, 437)), "437 to Refresh"),
        (
            "401 to a living allocation",
            |e| e.calls[0].refusals.push((s(22.5), Method::ChannelBind, 401)),
            "401 to ChannelBind",
        ),
        (
            "438 to a living allocation",
            |e| e.calls[0].refusals.push((s(22.5), Method::CreatePermission, 438)),
            "438 to CreatePermission",
        ),
        (
            "437 to an allocation nobody had to keep, which lives again",
            |e| {
                e.timeline = timeline(&[(Fault::WipeRelay(0), 1.2, 3.0)]);
                e.calls[0] = call(1, Transport::Udp, &[]);
                e.calls[0].refusals.push((s(4.0), Method::Refresh, 437));
            },
            "437 to Refresh",
        ),
        (
            "a TCP call dies though its relay lives",
            |e| {
                e.timeline = timeline(&[(Fault::FreezeRelay(0), 20.0, 22.0)]);
            },
            "Tcp, relay 0, 198.18.0.2:50003, born 1.00 s): lost at 20.10",
        ),
        ("messages of another call", |e| e.calls[0].foreign = 1, "of another call"),
        ("damaged messages", |e| e.calls[0].damaged = 1, "damaged"),
        ("one address for two calls", |e| e.calls[1].relayed = e.calls[0].relayed, "is call 1's and call 2's"),
        ("a newcomer is not served", |e| e.probes[2].outcome = Err("no answer".into()), "was not served"),
        ("a newcomer waits", |e| e.probes[2].until = s(34.0), "waited 4.00 s"),
        (
            "discovery names a dead node",
            |e| {
                e.timeline = timeline(&[(Fault::KillRelay(1), 21.0, 40.0)]);
                e.calls.clear();
                e.settled = Some(s(41.0));
            },
            "names relay-1, which is dead",
        ),
        (
            "discovery names a node that an operator drains",
            |e| e.timeline = timeline(&[(Fault::KillRelay(0), 20.0, 22.0), (Fault::DrainRelay(1), 27.0, 31.0)]),
            "names relay-1, which is drained",
        ),
        ("two machines have an address", |e| _ = e.held[0].by.insert(STANDBY), "two machines have relay 2's address"),
        ("two machines answer for it", |e| e.answering = 2, "2 machines answer"),
        ("the store is true late", |e| e.settled = Some(s(28.0)), "true only 6.00 s"),
        ("the store is never true", |e| e.settled = None, "never true"),
        ("a relay dies", |e| e.died.push("relay-0".into()), "ended by itself"),
        ("a record goes back", |e| e.history[6].value = Some(record(1, 1)), "(1, 1) over (1, 3)"),
        ("a record comes back", |e| e.history.push(written(9, KEY, Some(record(2, 4)))), "back after it was deleted"),
        ("a write of a future epoch", |e| e.history[3].value = Some(record(9, 1)), "epoch 9 was written"),
        (
            "a write without an owner",
            |e| {
                e.history.truncate(4);
                e.history.insert(3, written(3, "owners/198.18.0.2", None));
            },
            "while nobody owned",
        ),
        ("an epoch goes back", |e| e.history.push(owner(9, "relay-0", 1)), "epoch 1 of relay-0 after 2"),
        (
            "two owners of one epoch",
            |e| {
                e.history.push(written(9, "owners/198.18.0.2", None));
                e.history.push(owner(10, "other", 2));
            },
            "same epoch 2",
        ),
        ("an address taken from the living", |e| e.history.push(owner(9, "other", 3)), "whose lease lived"),
        (
            "the former owner writes on",
            |e| {
                e.history.truncate(5);
                e.history.push(written(6, "owners/198.18.0.2", None));
                e.history.push(owner(7, "other", 3));
                e.history.push(written(8, KEY, Some(record(2, 9))));
            },
            "of an epoch before other took",
        ),
    ];
    for (what, change, expected) in cases {
        let mut evidence = well();
        change(&mut evidence);
        let found = wrong(&evidence);
        assert!(found.iter().any(|line| line.contains(expected)), "{what}: {found:?}");
    }
}

/// A machine that is gone from 20 to 30 s; its standby serves from `until`.
fn moved(until: f64) -> Evidence {
    let mut evidence = well();
    evidence.timeline = timeline(&[(Fault::MachineGone, 20.0, 30.0)]);
    evidence.settled = Some(s(30.0));
    let silence = [(20.0, until)];
    evidence.calls = [Transport::Udp, Transport::Tcp].map(|t| Call { relay: HOME, ..call(1, t, &silence) }).to_vec();
    evidence.calls[1].relayed = address(50_002);
    evidence.calls[1].broke = Some((s(26.0), "the server closed the connection".to_owned()));
    evidence.probes.clear();
    evidence
}

#[test]
fn a_machine_that_is_gone_is_succeeded_in_time() {
    assert_eq!(wrong(&moved(26.5)), Vec::<String>::new());
    type Break = fn(&mut Evidence);
    let cases: &[(&str, Break, &str)] = &[
        ("the standby is late", |e| *e = moved(27.5), "nothing to the client from 19.95 to 27.50 s"),
        (
            "it comes back, and takes calls",
            |e| e.calls[0].up = flow(1.1, 60.0, &[(20.0, 26.0), (30.0, 32.0)]),
            "lost outside",
        ),
        (
            "discovery names the machine that is gone",
            |e| e.sightings = vec![Sighting { controller: 1, at: s(29.0), nodes: Ok([node(HOME)].into()) }],
            "controller 1 names relay-2, which is dead",
        ),
    ];
    for (what, change, expected) in cases {
        let mut evidence = moved(26.5);
        change(&mut evidence);
        let found = wrong(&evidence);
        assert!(found.iter().any(|line| line.contains(expected)), "{what}: {found:?}");
    }
    // One that is cut off from the controllers alone serves until it sees that another one does.
    let mut evidence = moved(26.5);
    evidence.timeline = timeline(&[(Fault::CutRelay(HOME), 20.0, 30.0)]);
    evidence.calls.clear();
    evidence.held = [24.0, 26.0, 30.0].map(|at| Held { at: s(at), by: [HOME, STANDBY].into() }).to_vec();
    assert_eq!(wrong(&evidence), ["two machines have relay 2's address at 30.00 s"]);
    // A call that the store did not know yet when the machine went, and one that it did.
    for (from, covered) in [(20.0, true), (1.5, false)] {
        for fault in [Fault::MachineGone, Fault::CutRelay(HOME)] {
            let call = Call { relay: HOME, ..call(1, Transport::Udp, &[]) };
            assert_eq!(fate(&call, &timeline(&[(fault, from, from + 10.0)])).is_none(), covered, "{fault} at {from} s");
        }
    }
}

#[test]
fn the_truth_is_that_all_agree() {
    let both: BTreeSet<SocketAddr> = [address(50_001), address(50_002)].into();
    let everybody: BTreeSet<String> = (0..RELAYS).map(node).collect();
    let truth =
        Truth { stored: both.clone(), bound: both, twice: BTreeSet::new(), named: vec![Ok(everybody); CONTROLLERS] };
    let clients = [call(1, Transport::Udp, &[]), call(2, Transport::Udp, &[])];
    assert_eq!(untrue(&truth, &clients), Vec::<String>::new());
    type Break = fn(&mut Truth);
    let cases: &[(&str, Break, &str)] = &[
        ("one too many stored", |t| _ = t.stored.insert(address(50_009)), "50009 is stored"),
        ("one not stored", |t| _ = t.stored.remove(&address(50_001)), "50001 is a client's"),
        ("one of which the relay does not know", |t| _ = t.bound.remove(&address(50_001)), "50001 is stored"),
        ("one of two relays", |t| _ = t.twice.insert(address(50_001)), "two relays have"),
        ("both of a pair are named", |t| t.named[1] = Ok((0..=STANDBY).map(node).collect()), "controller 1 names"),
        ("a node is missing", |t| t.named[1] = Ok([node(0)].into()), "controller 1 names"),
        ("a controller is silent", |t| t.named[0] = Err("silent".into()), "controller 0 names"),
    ];
    for (what, change, expected) in cases {
        let mut truth = truth.clone();
        change(&mut truth);
        let found = untrue(&truth, &clients);
        assert!(found.iter().any(|line| line.contains(expected)), "{what}: {found:?}");
    }
}

#[test]
fn a_call_that_no_promise_covers_may_be_lost() {
    type Case = (&'static str, &'static [(Fault, f64, f64)], Transport, bool);
    let cases: &[Case] = &[
        ("kill -9", &[(Fault::KillRelay(0), 20.0, 22.0)], Transport::Udp, true),
        ("kill -9 under a TCP client", &[(Fault::KillRelay(0), 20.0, 22.0)], Transport::Tcp, false),
        ("SIGSTOP under a TCP client", &[(Fault::FreezeRelay(0), 20.0, 22.0)], Transport::Tcp, true),
        ("state deleted", &[(Fault::WipeRelay(0), 20.0, 22.0)], Transport::Udp, true),
        ("state deleted at once", &[(Fault::WipeRelay(0), 2.0, 3.0)], Transport::Udp, false),
        (
            "state deleted without a store",
            &[(Fault::StoreGone, 10.0, 21.0), (Fault::WipeRelay(0), 20.0, 22.0)],
            Transport::Udp,
            false,
        ),
        ("told to end, and TCP until then", &[(Fault::EndRelay(0), 0.5, 5.0)], Transport::Tcp, false),
        ("another relay's", &[(Fault::WipeRelay(1), 2.0, 3.0)], Transport::Udp, true),
        ("no store", &[(Fault::StoreGone, 20.0, 22.0)], Transport::Tcp, true),
    ];
    for (what, faults, transport, covered) in cases {
        assert_eq!(fate(&call(1, *transport, &[]), &timeline(faults)).is_none(), *covered, "{what}");
    }
}
