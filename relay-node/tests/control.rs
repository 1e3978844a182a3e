//! The relay's control session against a scripted controller: the real binary, real mTLS, a real TURN client.

#![allow(clippy::print_stderr, reason = "what the relay logs belongs to the test's output")]
#![allow(dead_code, reason = "tests share a module of which each uses a part")]

mod controller;
mod relay;
#[path = "../turn-core/tests/support/sample.rs"]
mod sample;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use controller::{Controller, Session, Tunnel, rings, settings};
use relay::{Relay, TurnClient, own_ip};
use turn_core::client::Event;
use turn_core::{AllocationId, Record};
use turnpike_proto::v1::controller_message::Body as Say;
use turnpike_proto::v1::relay_message::Body as Hear;
use turnpike_proto::v1::{self, RecordChange};

/// A relay of this controller, its state in `directory`.
fn start(directory: &Path, ip: Ipv4Addr, controllers: &[&str]) -> Relay {
    let more = format!(
        "controllers = {controllers:?}\ntls = {{ ca = \"ca.pem\", certificate = \"node.pem\", key = \"node.key\" }}"
    );
    Relay::start(directory, ip, &more)
}

/// A relay that has joined and has nothing to tell.
fn joined(directory: &Path, controller: &Controller, ip: Ipv4Addr) -> (Relay, Session) {
    let relay = start(directory, ip, &[&controller.url]);
    let mut session = controller.session();
    session.welcome(1, settings(1));
    assert_eq!(session.resync(), []);
    (relay, session)
}

#[test]
fn it_joins_says_who_it_is_and_reports() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let ip = own_ip();
    let relay = start(directory.path(), ip, &[&controller.url]);
    let mut session = controller.session();
    let hello = session.hello.clone();
    assert_eq!((hello.node_id.as_str(), hello.region.as_str(), hello.protocol), ("eu-1", "eu", 2));
    assert_eq!((hello.claimed_epoch, hello.workers), (1, 2));
    assert_eq!(hello.relay_address, ip.to_string());
    let listeners: Vec<_> = hello.listeners.iter().map(|l| (l.transport(), l.address.clone())).collect();
    let at = format!("{ip}:3478");
    assert_eq!(listeners, [(v1::Transport::Udp, at.clone()), (v1::Transport::Tcp, at)]);

    // An epoch above the claimed one is taken over.
    session.welcome(7, settings(1));
    relay.metric("turn_epoch 7");
    assert_eq!(std::fs::read_to_string(directory.path().join("state/epoch")).expect("kept"), "7\n");
    assert_eq!(relay.wait_for("/readyz", 200), "ready\n");
    relay.metric("turn_control_connected 1");

    for _ in 0..2 {
        assert_eq!(session.load().allocations, 0);
    }
}

#[test]
fn allocations_are_told_and_their_ends() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (relay, mut session) = joined(directory.path(), &controller, own_ip());
    relay.wait_for("/readyz", 200);
    let mut client = TurnClient::new(relay.address(), "alice", "secret");
    let relayed = client.allocate();
    let born = session.change();
    let record = Record::open(&born.record, &rings().1).expect("sealed under the cluster's key");
    assert_eq!(record.relayed[0].advertised, relayed);
    assert_eq!(record.username, b"alice");
    assert_eq!(record.id.0.to_vec(), born.allocation_id);

    let refreshed = client.perform(|client, now| client.refresh(now, 0));
    assert_eq!(refreshed, Event::Refreshed(0));
    let gone = session.change();
    assert_eq!(gone.allocation_id, born.allocation_id);
    assert_eq!((gone.record.is_empty(), gone.ended()), (true, v1::EndReason::Deleted));
    assert!(gone.sequence > born.sequence);
}

#[test]
fn a_broken_session_is_replaced_and_restates_everything() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (relay, session) = joined(directory.path(), &controller, own_ip());
    relay.wait_for("/readyz", 200);
    // Nothing of this session is ever acknowledged.
    let mut clients: Vec<_> = (0..3).map(|_| TurnClient::new(relay.address(), "alice", "secret")).collect();
    let mut expected: Vec<_> = clients.iter_mut().map(TurnClient::allocate).collect();
    drop(session);

    let mut session = controller.session();
    // One that is made, and one that ends, while there is no session.
    expected.push(TurnClient::new(relay.address(), "alice", "secret").allocate());
    clients[0].perform(|client, now| client.refresh(now, 0));
    expected.remove(0);
    assert_eq!(session.hello.claimed_epoch, 1, "the same process, the same epoch");
    session.welcome(1, settings(1));
    let mut restated: Vec<SocketAddr> = session.resync().iter().map(relayed_of).collect();
    restated.sort();
    expected.sort();
    assert_eq!(restated, expected);
    relay.metric("turn_resyncs_total 2");
    relay.metric("turn_control_reconnects_total 1");
}

#[test]
fn a_superseded_relay_stops_at_once() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (mut relay, session) = joined(directory.path(), &controller, own_ip());
    session.say(Say::Superseded(v1::Superseded { epoch: 9, owner: "eu-2".into() }));
    let line = relay.log("ERROR");
    assert!(line.contains("relay \"eu-2\" owns this relay address under epoch 9: this one stops serving"), "{line}");
    assert_eq!(relay.wait().code(), Some(1));
}

#[test]
fn a_relay_superseded_before_it_serves_does_not_begin() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let mut relay = start(directory.path(), own_ip(), &[&controller.url]);
    controller.session().say(Say::Superseded(v1::Superseded { epoch: 9, owner: "eu-2".into() }));
    let line = relay.log("ERROR");
    assert!(line.contains("relay \"eu-2\" owns this relay address"), "{line}");
    assert_eq!(relay.wait().code(), Some(1));
}

/// The controller that it asks for its records says nothing: it is not waited for.
#[test]
fn told_to_stop_before_it_serves_it_ends_at_once() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let mut relay = start(directory.path(), own_ip(), &[&controller.url]);
    let _silent = controller.session();
    assert_eq!(relay.terminate().code(), Some(0));
    relay.log("told to stop before it served");
}

#[test]
fn an_orderly_end_is_said() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (mut relay, mut session) = joined(directory.path(), &controller, own_ip());
    assert_eq!(relay.terminate().code(), Some(0));
    while !matches!(session.hear(), Hear::Goodbye(_)) {}
}

#[test]
fn settings_outlive_the_controller() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let ip = own_ip();
    let (mut relay, session) = joined(directory.path(), &controller, ip);
    relay.wait_for("/readyz", 200);
    let relayed = TurnClient::new(relay.address(), "alice", "secret").allocate();
    relay.kill();
    drop(session);
    let url = controller.url.clone();
    drop(controller);

    let relay = start(directory.path(), ip, &[&url]);
    assert!(relay.log("ready").contains("restored=1"));
    assert_eq!(relay.wait_for("/readyz", 200), "ready\n");
    relay.metric("turn_epoch 2");
    let other = TurnClient::new(relay.address(), "alice", "secret").allocate();
    assert_ne!(other, relayed, "the first allocation lives on");
}

#[test]
fn a_relay_without_a_journal_restores_from_the_store() {
    let directory = tempfile::tempdir().expect("tempdir");
    let ip = own_ip();
    let stored = stored_record(ip);
    let (_, record_keys) = rings();
    let mut older = stored.clone();
    older.epoch -= 1;
    let mut foreign = stored.clone();
    foreign.relay_address = [192, 0, 2, 77].into();
    foreign.id = AllocationId([8; 16]);
    // Refused one by one: one that no key sealed, one of another relay, one under a key that is not its own.
    let mut records = vec![vec![1, 2, 3]];
    records.extend([older, stored.clone(), foreign].map(|record| record.seal(&record_keys)));
    let controller = Controller::start(directory.path(), records);
    let relay = start(directory.path(), ip, &[&controller.url]);
    let mut session = controller.session();
    session.welcome(5, settings(1));
    assert!(relay.log("ready").contains("restored=1"));
    let restated = session.resync();
    assert_eq!(restated.iter().map(relayed_of).collect::<Vec<_>>(), [stored.relayed[0].advertised]);
    assert_eq!(controller.restores(), 1);
    relay.metric("turn_restored_allocations_total{source=\"store\"} 1");
    for reason in ["seal", "foreign", "replayed"] {
        relay.metric(&format!("turn_refused_records_total{{source=\"store\",reason=\"{reason}\"}} 1"));
    }
}

#[test]
fn what_the_store_holds_is_restored_late_rather_than_wiped() {
    let directory = tempfile::tempdir().expect("tempdir");
    let ip = own_ip();
    let stored = stored_record(ip);
    let controller = Controller::start(directory.path(), vec![stored.seal(&rings().1)]);
    // It serves before the controller says a word.
    let relay = start(directory.path(), ip, &[&controller.url]);
    let unwelcome = controller.session();
    assert!(relay.log("ready").contains("restored=0"));
    drop(unwelcome);
    let mut session = controller.session();
    session.welcome(5, settings(1));
    let restated = session.resync();
    assert_eq!(restated.iter().map(relayed_of).collect::<Vec<_>>(), [stored.relayed[0].advertised]);
}

#[test]
fn an_operator_revokes() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (relay, mut session) = joined(directory.path(), &controller, own_ip());
    relay.wait_for("/readyz", 200);
    TurnClient::new(relay.address(), "alice", "secret").allocate();
    let allocation_id = session.change().allocation_id;
    session.say(Say::Revoke(v1::RevokeAllocation { allocation_id: allocation_id.clone() }));
    let gone = session.change();
    assert_eq!((gone.allocation_id.clone(), gone.ended()), (allocation_id, v1::EndReason::Revoked));
}

#[test]
fn controllers_are_tried_in_turn_and_a_silent_one_is_left() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    // It takes connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = format!("https://{}", silent.local_addr().expect("bound"));
    let relay = start(directory.path(), own_ip(), &[&silent, &controller.url]);
    let mut session = controller.session();
    session.welcome(1, settings(1));
    assert_eq!(session.resync(), []);
    // The store was asked before anything was served: the lines come in this order.
    relay.log("joined the cluster");
    relay.log("ready");
    assert_eq!(controller.restores(), 1);
}

#[test]
fn a_controller_that_falls_silent_is_left_within_seconds() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let tunnel = Tunnel::to(&controller.url);
    let relay = start(directory.path(), own_ip(), &[&tunnel.url, &controller.url]);
    let mut session = controller.session();
    session.welcome(1, settings(1));
    assert_eq!(session.resync(), []);
    relay.wait_for("/readyz", 200);

    // The connection stays open, and nothing comes any more: a frozen process, a lost route.
    let since = std::time::Instant::now();
    tunnel.freeze();
    let other = controller.session();
    let gap = since.elapsed();
    other.welcome(1, settings(1));
    // A ping each second, two seconds for its answer, the first wait of the backoff.
    assert!(gap < std::time::Duration::from_secs(5), "{gap:?}");
    relay.metric("turn_control_reconnects_total 1");
    assert_eq!(relay.wait_for("/readyz", 200), "ready\n", "credentials outlive the session");
}

/// A store that is slow makes every controller look as if it had lost it: a relay that went from one to the next each few
/// seconds would never be done with restating what it has.
#[test]
fn moves_from_controller_to_controller_come_ever_later() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let other = Tunnel::to(&controller.url);
    let _relay = start(directory.path(), own_ip(), &[&controller.url, &other.url]);
    let away = || Say::Store(v1::StoreState { away: true });
    let mut session = controller.session();
    session.welcome(1, settings(1));
    session.resync();
    let mut moves = Vec::new();
    for _ in 0..2 {
        let since = std::time::Instant::now();
        session.say(away());
        let mut next = controller.session();
        next.welcome(1, settings(1));
        next.resync();
        moves.push(since.elapsed());
        session = next;
    }
    assert!(moves[0] < std::time::Duration::from_secs(3), "the first at once: {moves:?}");
    assert!(moves[1] > std::time::Duration::from_secs(4), "the second not soon: {moves:?}");
}

/// A controller behind a slow store takes longer for its Welcome than a relay waits at first; the claim lands all the same.
#[test]
fn a_slow_controller_is_waited_for_in_the_end() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let _relay = start(directory.path(), own_ip(), &[&controller.url]);
    // The start asks for 2 s, the first session for 3 s.
    let _unanswered = [controller.session(), controller.session()];
    let mut session = controller.session();
    std::thread::sleep(std::time::Duration::from_millis(3800));
    session.welcome(1, settings(1));
    assert_eq!(session.resync(), []);
}

/// P1: one that owned its address, and waits for it, goes on although a controller takes its call and says nothing.
#[test]
fn the_last_owner_goes_on_beside_a_controller_that_does_not_decide() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let ip = own_ip();
    let more = format!(
        "relay_ip = \"{ip}\"\npublic_ip = \"{ip}\"\ncontrollers = [{:?}]\n\
         tls = {{ ca = \"ca.pem\", certificate = \"node.pem\", key = \"node.key\" }}\n[address]\nwait = true",
        controller.url
    );
    let mut relay = Relay::start(directory.path(), ip, &more);
    let mut session = controller.session();
    session.welcome(1, settings(1));
    session.resync();
    relay.wait_for("/readyz", 200);
    relay.kill();
    drop(session);

    let since = std::time::Instant::now();
    let relay = Relay::start(directory.path(), ip, &more);
    let _silent = controller.session();
    relay.wait_for("/readyz", 200);
    assert!(since.elapsed() < std::time::Duration::from_millis(3200), "{:?}", since.elapsed());
}

/// One whose address moves nowhere has nobody to ask after a pause, and answers at once.
#[test]
fn a_relay_that_stood_still_goes_on_where_nobody_can_have_followed() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (relay, session) = joined(directory.path(), &controller, own_ip());
    relay.wait_for("/readyz", 200);
    let mut client = TurnClient::new(relay.address(), "alice", "secret");
    client.allocate();
    drop((session, controller));
    relay.signal("STOP");
    std::thread::sleep(std::time::Duration::from_millis(3600));
    relay.signal("CONT");
    let since = std::time::Instant::now();
    let refreshed = client.perform(|client, now| client.refresh(now, 600));
    assert_eq!(refreshed, Event::Refreshed(600));
    assert!(since.elapsed() < std::time::Duration::from_millis(1500), "{:?}", since.elapsed());
}

#[test]
fn newer_settings_come_into_force_and_older_ones_do_not() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (relay, mut session) = joined(directory.path(), &controller, own_ip());
    relay.wait_for("/readyz", 200);
    let mut newer = settings(2);
    newer.static_users[0].password = b"changed".to_vec();
    newer.user_quota = 2;
    newer.record_keys.insert(0, v1::Secret { id: 3, value: b"another record key".to_vec() });
    session.say(Say::Settings(newer));
    // A new record key seals everything anew.
    assert_eq!(session.resync(), []);
    TurnClient::new(relay.address(), "alice", "changed").allocate();
    session.say(Say::Settings(settings(1)));
    relay.log("this relay keeps its newer ones of revision 2");
    TurnClient::new(relay.address(), "alice", "changed").allocate();
    let third = TurnClient::new(relay.address(), "alice", "changed").perform(|client, now| client.allocate(now));
    assert!(matches!(third, Event::Failed(..)), "the new quota is 2: {third:?}");
}

#[test]
fn what_it_has_in_force_is_reported_at_once_and_a_newer_seal_is_put_on_everything() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let (relay, mut session) = joined(directory.path(), &controller, own_ip());
    relay.wait_for("/readyz", 200);
    let _client = TurnClient::new(relay.address(), "alice", "secret").allocate();
    session.change();
    while session.load().settings_revision != 1 {}

    // A key that is made known is not used; the relay says that it knows it before its next report is due.
    let mut known = settings(2);
    known.record_keys.push(v1::Secret { id: 3, value: "the next record key".into() });
    let next = known.record_keys[1].clone();
    session.say(Say::Settings(known.clone()));
    let told = std::time::Instant::now();
    while session.load().settings_revision != 2 {}
    assert!(told.elapsed() < std::time::Duration::from_millis(900), "{:?}", told.elapsed());
    let _another = TurnClient::new(relay.address(), "alice", "secret").allocate();
    let born = session.change();
    assert_eq!(turn_core::record::seal_key(&born.record), Some(2), "a resync would have come first");

    known.revision = 3;
    known.record_keys.reverse();
    session.say(Say::Settings(known));
    let live = session.resync();
    assert_eq!(live.len(), 2);
    let ring = turn_core::KeyRing(vec![turn_core::Key { id: 3, secret: next.value }]);
    for change in live {
        Record::open(&change.record, &ring).expect("sealed anew");
    }
}

#[test]
fn a_controller_of_a_distant_version_is_not_joined() {
    let directory = tempfile::tempdir().expect("tempdir");
    let controller = Controller::start(directory.path(), Vec::new());
    let relay = start(directory.path(), own_ip(), &[&controller.url]);
    let welcome = |protocol| {
        Say::Welcome(v1::Welcome { epoch: 1, settings: Some(settings(1)), protocol, ..v1::Welcome::default() })
    };
    controller.session().say(welcome(4));
    let line = relay.log("WARN no session");
    assert!(line.contains("the controller speaks protocol 4, this relay 1 to 3; upgrade the older one"), "{line}");
    for protocol in [0, 3] {
        let mut session = controller.session();
        session.say(welcome(protocol));
        session.load();
    }
}

#[test]
fn a_strangers_certificate_is_no_controller() {
    let directory = tempfile::tempdir().expect("tempdir");
    let other = tempfile::tempdir().expect("tempdir");
    // The relay trusts the CA in its directory; this controller's is another one.
    let stranger = Controller::start(other.path(), Vec::new());
    let _trusted = Controller::start(directory.path(), Vec::new());
    let relay = start(directory.path(), own_ip(), &[&stranger.url]);
    let line = relay.log("no session with a controller");
    assert!(line.contains("certificate"), "{line}");
    relay.wait_for("/readyz", 503);
}

fn relayed_of(change: &RecordChange) -> SocketAddr {
    let record = Record::open(&change.record, &rings().1).expect("sealed under the cluster's key");
    record.relayed[0].advertised
}

/// An allocation of a process that is gone, as the store keeps it.
fn stored_record(ip: Ipv4Addr) -> Record {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let now = u64::try_from(since.as_millis()).expect("fits");
    Record { epoch: 4, ..sample::record(AllocationId([7; 16]), (ip, 50_000).into(), now) }
}
