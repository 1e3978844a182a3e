//! The relay's side of a drain, from outside: the real binary, a scripted controller, real TURN clients, signals.

#![allow(clippy::print_stderr, reason = "what the relay logs belongs to the test's output")]
#![allow(dead_code, reason = "tests share a module of which each uses a part")]

mod controller;
mod relay;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use controller::{Controller, Session, settings};
use relay::{Relay, TurnClient, eventually, own_ip};
use turn_core::client::{Event, Failure};
use turnpike_proto::v1::controller_message::Body as Say;
use turnpike_proto::v1::relay_message::Body as Hear;
use turnpike_proto::v1::{self, Transport};

/// Where the other member is.
const OTHER: &str = "127.99.0.1";

fn start(directory: &Path, ip: Ipv4Addr, controller: &Controller, more: &str) -> Relay {
    let more = format!(
        "{more}\ncontrollers = [{:?}]\ntls = {{ ca = \"ca.pem\", certificate = \"node.pem\", key = \"node.key\" }}",
        controller.url
    );
    Relay::start(directory, ip, &more)
}

/// A relay that has joined, with another member beside it that takes new clients.
fn joined(directory: &Path, controller: &Controller, ip: Ipv4Addr, more: &str) -> (Relay, Session) {
    let relay = start(directory, ip, controller, more);
    let mut session = controller.session();
    session.welcome(1, settings(1));
    session.resync();
    let member = v1::Member { node_id: "eu-2".into(), relay_ips: vec![OTHER.into()], ..Default::default() };
    session.say(Say::Members(v1::Members { revision: 2, members: vec![member], ..v1::Members::default() }));
    session.say(Say::Redirects(v1::Redirects { targets: vec![target("eu-2", OTHER)] }));
    relay.wait_for("/readyz", 200);
    (relay, session)
}

fn target(node: &str, ip: &str) -> v1::RedirectTarget {
    v1::RedirectTarget { node_id: node.into(), transport: Transport::Udp.into(), address: format!("{ip}:3478") }
}

fn code(event: &Event) -> u16 {
    match event {
        Event::Failed(_, Failure::Refused(code)) => code.code(),
        Event::Allocated { .. } => 0,
        other => panic!("unexpected: {other:?}"),
    }
}

/// What a new client gets.
fn ask(relay: &Relay) -> u16 {
    code(&TurnClient::new(relay.address(), "alice", "secret").perform(|client, now| client.allocate(now)))
}

fn wait_for_redirects(relay: &Relay, session: &mut Session) {
    eventually("new clients are sent away", || {
        // What is not acknowledged would hold up what comes after it.
        session.load();
        (ask(relay) == 300).then_some(())
    });
}

/// Waits for a load report of which this holds.
fn load(session: &mut Session, what: &str, holds: impl Fn(&v1::Load) -> bool) -> v1::Load {
    eventually(what, || Some(session.load()).filter(|load| holds(load)))
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("fits")
}

#[test]
fn an_operator_drains_and_takes_it_back() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (relay, mut session) = joined(directory.path(), &controller, own_ip(), "");
    let mut held = TurnClient::new(relay.address(), "alice", "secret");
    held.allocate();
    session.say(Say::Drain(v1::Drain { draining: true, deadline: 0 }));
    relay.log("an operator drains this relay");
    let reported = load(&mut session, "it says so", |load| load.draining);
    assert_eq!(reported.ends_at, 0, "it does not end for that");
    wait_for_redirects(&relay, &mut session);
    assert_eq!(relay.wait_for("/readyz", 503), "not ready: draining: takes no new clients, serves those it has\n");
    assert_eq!(relay.wait_for("/livez", 200), "alive\n");
    relay.metric("turn_draining 1");
    assert!(matches!(held.perform(|client, now| client.refresh(now, 600)), Event::Refreshed(600)));

    session.say(Say::Drain(v1::Drain::default()));
    relay.wait_for("/readyz", 200);
    load(&mut session, "it says so", |load| !load.draining);
    relay.metric("turn_draining 0");
    assert_eq!(ask(&relay), 0);
    let counted =
        |load: &v1::Load| load.by_transport.iter().map(|t| (t.transport(), t.allocations)).collect::<Vec<_>>();
    load(
        &mut session,
        "allocations by transport",
        |load| matches!(counted(load)[..], [(Transport::Udp, allocations)] if allocations == load.allocations),
    );
}

#[test]
fn nobody_is_sent_to_a_stranger_and_without_a_target_everybody_is_served() {
    // Promise P8.
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let ip = own_ip();
    let (relay, mut session) = joined(directory.path(), &controller, ip, "");
    let strangers = vec![target("eu-2", "127.99.0.2"), target("eu-9", OTHER), target("eu-1", &ip.to_string())];
    session.say(Say::Redirects(v1::Redirects { targets: strangers }));
    session.say(Say::Drain(v1::Drain { draining: true, deadline: 0 }));
    relay.wait_for("/readyz", 503);
    load(&mut session, "it says so", |load| load.draining);
    // Longer than it takes to send the first one away.
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        assert_eq!(ask(&relay), 0);
        std::thread::sleep(Duration::from_millis(200));
    }
    session.say(Say::Redirects(v1::Redirects { targets: vec![target("eu-2", OTHER)] }));
    wait_for_redirects(&relay, &mut session);
}

#[test]
fn a_full_relay_sends_new_clients_away_and_takes_them_again() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let more = "max_allocations = 10\noverload = { allocations_percent = 30, seconds = 1 }";
    let (relay, mut session) = joined(directory.path(), &controller, own_ip(), more);
    let mut clients: Vec<_> = (0..3).map(|_| TurnClient::new(relay.address(), "alice", "secret")).collect();
    for client in &mut clients {
        client.allocate();
    }
    relay.log("overloaded: new clients are sent to other relays");
    let said = load(&mut session, "it says so", |load| load.overloaded);
    assert!(!said.draining);
    wait_for_redirects(&relay, &mut session);
    relay.metric("turn_overloaded 1");
    relay.wait_for("/readyz", 200);
    for client in &mut clients {
        client.perform(|client, now| client.refresh(now, 0));
    }
    load(&mut session, "it has room again", |load| !load.overloaded);
    eventually("new clients are served", || (ask(&relay) == 0).then_some(()));
}

/// What a session says until it ends: whether an allocation ended, and whether it said Goodbye.
fn last_words(session: &mut Session) -> (Vec<v1::EndReason>, bool) {
    let mut ends = Vec::new();
    loop {
        match session.hear() {
            Hear::Records(batch) => {
                let ended = batch.changes.iter().filter(|change| change.record.is_empty());
                ends.extend(ended.map(v1::RecordChange::ended));
            }
            Hear::Goodbye(_) => return (ends, true),
            _ => {}
        }
    }
}

#[test]
fn sigterm_drains_until_the_deadline_and_hands_the_rest_on() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let ip = own_ip();
    let (mut relay, mut session) = joined(directory.path(), &controller, ip, "drain_deadline = 5");
    let mut held = TurnClient::new(relay.address(), "alice", "secret");
    held.allocate();
    let mut stream = stream_client(relay.address());
    let (told, wall) = (Instant::now(), unix_ms());
    relay.signal("TERM");
    let reported = load(&mut session, "it says when it ends", |load| load.ends_at != 0);
    assert!(reported.draining);
    assert!((wall + 4900..=wall + 7000).contains(&reported.ends_at), "{} after {wall}", reported.ends_at);
    wait_for_redirects(&relay, &mut session);
    assert!(matches!(held.perform(|client, now| client.refresh(now, 600)), Event::Refreshed(600)));
    assert_eq!(relay.wait().code(), Some(0));
    let took = told.elapsed();
    assert!((Duration::from_secs(5)..Duration::from_secs(15)).contains(&took), "{took:?}");
    // Only the stream's allocation ended, and the client was told.
    let (ends, goodbye) = last_words(&mut session);
    assert!(goodbye && ends.contains(&v1::EndReason::Closed), "{ends:?}");
    assert!(ends.iter().all(|end| *end == v1::EndReason::Closed), "{ends:?}");
    assert_eq!(std::io::Read::read(&mut stream, &mut [0; 16]).expect("no reset"), 0);

    let relay = start(directory.path(), ip, &controller, "");
    relay.log("ready");
    assert!(matches!(held.perform(|client, now| client.refresh(now, 600)), Event::Refreshed(600)));
}

/// A TCP client with an allocation.
fn stream_client(relay: SocketAddr) -> std::net::TcpStream {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(relay).expect("it listens");
    stream.set_read_timeout(Some(relay::PATIENCE)).expect("set");
    let config = turn_core::client::ClientConfig {
        transport: turn_core::Transport::Tcp,
        username: b"alice".to_vec(),
        password: b"secret".to_vec(),
        family: None,
        lifetime: None,
        seed: [3; 32],
    };
    let mut client = turn_core::client::Client::new(config);
    client.allocate(Instant::now());
    let mut buffer = [0; 2048];
    loop {
        while let Some(packet) = client.poll_transmit() {
            stream.write_all(&packet).expect("sent");
        }
        let length = stream.read(&mut buffer).expect("answered");
        client.handle_packet(Instant::now(), &buffer[..length]);
        match client.poll_event() {
            Some(Event::Allocated { .. }) => return stream,
            Some(other) => panic!("no allocation: {other:?}"),
            None => {}
        }
    }
}

#[test]
fn a_second_sigterm_or_an_interrupt_ends_at_once_and_keeps_the_calls() {
    for signals in [&["TERM", "TERM"][..], &["TERM", "INT"], &["INT"]] {
        let directory = tempfile::tempdir().expect("tempdir");
        let controller = Controller::start(directory.path(), Vec::new());
        let ip = own_ip();
        let (mut relay, mut session) = joined(directory.path(), &controller, ip, "drain_deadline = 600");
        let mut held = TurnClient::new(relay.address(), "alice", "secret");
        held.allocate();
        for (index, signal) in signals.iter().enumerate() {
            if index > 0 {
                relay.log("told to stop: ending when the last call has");
            }
            relay.signal(signal);
        }
        let told = Instant::now();
        assert_eq!(relay.wait().code(), Some(0), "{signals:?}");
        assert!(told.elapsed() < Duration::from_secs(6), "{:?} for {signals:?}", told.elapsed());
        assert_eq!(last_words(&mut session), (Vec::new(), true), "{signals:?}");
        let relay = start(directory.path(), ip, &controller, "");
        assert!(relay.log("ready").contains("restored=1"), "{signals:?}");
    }
}

#[test]
fn a_relay_without_calls_ends_once_clients_cannot_be_told_of_it_any_more() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (mut relay, mut session) = joined(directory.path(), &controller, own_ip(), "drain_deadline = 600");
    let mut held = TurnClient::new(relay.address(), "alice", "secret");
    held.allocate();
    relay.signal("TERM");
    let reported = load(&mut session, "it drains", |load| load.draining);
    assert_eq!(reported.allocations, 1);
    held.perform(|client, now| client.refresh(now, 0));
    relay.log("empty: ending");
    assert_eq!(relay.wait().code(), Some(0));
    let (ends, goodbye) = last_words(&mut session);
    assert!(goodbye && ends == [v1::EndReason::Deleted], "{ends:?}");
}
