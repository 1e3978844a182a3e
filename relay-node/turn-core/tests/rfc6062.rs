//! RFC 6062 (TCP allocations): what it demands of a server, one test a rule. What moves bytes between the two data
//! connections (§5.2 and §5.3 about buffers, §5.4 about "as-is", §5.5 about closing the other one) is the relay's, and
//! tested there: `relay-node/src/dataplane`, `tests/interop`.

mod support;

use support::addr;
use support::rig::Rig;
use support::stun::{
    ALLOCATE, CONNECT, CONNECTION_ATTEMPT, CONNECTION_BIND, CONNECTION_ID, Class, DONT_FRAGMENT, RESERVATION_TOKEN,
    XOR_PEER_ADDRESS, XOR_RELAYED_ADDRESS, even_port, family, lifetime, peer, raw, token, transport,
};
use turn_core::{ConnectError, ConnectionId, Path, PeerConnectionId, PeerEvent, PeerTransport, StaticUser, Transport};

const PEER: &str = "192.0.2.1:9";

fn new() -> Rig {
    Rig::new().on_stream()
}

/// A TCP allocation.
fn allocated() -> Rig {
    let mut rig = new();
    assert_eq!(rig.ask(ALLOCATE, &[transport(6)]).code(), 0);
    rig
}

/// With a connection to [`PEER`] that waits for its ConnectionBind.
fn connected() -> (Rig, PeerConnectionId) {
    let mut rig = allocated();
    assert!(rig.ask(CONNECT, &[peer(addr(PEER))]).is_silence(), "the answer waits for the peer");
    let id = PeerConnectionId(rig.desk.begun);
    let answer = rig.peer_connection(id, PeerEvent::Connected).answer();
    assert_eq!(answer.code(), 0);
    (rig, id)
}

/// The client opens another connection.
fn data_connection(rig: &mut Rig) {
    rig.client("203.0.113.1:6000");
    rig.path = Path::Connection(ConnectionId(99));
}

fn connection_id(id: PeerConnectionId) -> support::stun::Item {
    raw(CONNECTION_ID, &id.0.to_be_bytes())
}

#[test]
fn a_protocol_other_than_udp_or_tcp_is_442() {
    // RFC 6062 §5.1, item 1: MUST be 442.
    for protocol in [0, 1, 5, 7, 132, 255] {
        assert_eq!(new().ask(ALLOCATE, &[transport(protocol)]).code(), 442);
    }
}

#[test]
fn udp_goes_on_as_before() {
    // RFC 6062 §5.1, item 1: UDP, which is allowed here, MUST follow RFC 8656.
    let mut rig = new();
    assert_eq!(rig.ask(ALLOCATE, &[transport(17)]).code(), 0);
    assert_eq!(rig.desk.bindings[0].transport, PeerTransport::Udp);
}

#[test]
fn a_tcp_allocation_over_a_datagram_is_400() {
    // RFC 6062 §5.1, item 2: a client transport that is neither TCP nor TLS MUST get 400.
    for transport_of_client in [Transport::Udp, Transport::Dtls] {
        let mut rig = Rig::new();
        rig.from.transport = transport_of_client;
        assert_eq!(rig.ask(ALLOCATE, &[transport(6)]).code(), 400);
    }
    for transport_of_client in [Transport::Tcp, Transport::Tls] {
        let mut rig = new();
        rig.from.transport = transport_of_client;
        assert_eq!(rig.ask(ALLOCATE, &[transport(6)]).code(), 0);
    }
}

#[test]
fn attributes_of_udp_are_400() {
    // RFC 6062 §5.1, item 3: DONT-FRAGMENT, EVEN-PORT or RESERVATION-TOKEN MUST get 400.
    for item in [raw(DONT_FRAGMENT, &[]), even_port(false), even_port(true), token([1; 8])] {
        let mut rig = new();
        assert_eq!(rig.ask(ALLOCATE, &[transport(6), item.clone()]).code(), 400, "{item:?}");
        assert!(rig.desk.bindings.is_empty());
    }
}

#[test]
fn the_relayed_address_is_of_tcp() {
    // RFC 6062 §5.1, item 4: a TCP relayed transport address MUST be allocated; the host listens on it once bound.
    for (number, v6) in [(1, false), (2, true)] {
        let mut rig = new();
        let answer = rig.ask(ALLOCATE, &[transport(6), family(number)]).answer();
        assert_eq!(answer.xor_address(XOR_RELAYED_ADDRESS).expect("there").is_ipv6(), v6);
        assert_eq!(rig.desk.bindings[0].transport, PeerTransport::Tcp);
    }
}

#[test]
fn no_reservation_token_in_the_answer() {
    // RFC 6062 §5.1, item 5: it MUST NOT be present. LIFETIME is as for UDP (§4.1).
    let answer = new().ask(ALLOCATE, &[transport(6), lifetime(1200)]).answer();
    assert!(!answer.has(RESERVATION_TOKEN));
    assert_eq!(answer.lifetime(), Some(1200));
}

#[test]
fn connect_without_an_allocation_is_437() {
    // RFC 6062 §5.2: a connection without an allocation MUST get 437; one for UDP is none.
    assert_eq!(new().ask(CONNECT, &[peer(addr(PEER))]).code(), 437);
    let mut rig = new();
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert_eq!(rig.ask(CONNECT, &[peer(addr(PEER))]).code(), 437);
}

#[test]
fn connect_without_a_good_peer_is_400() {
    // RFC 6062 §5.2: XOR-PEER-ADDRESS missing or invalid MUST be 400.
    for items in [vec![], vec![raw(XOR_PEER_ADDRESS, &[])], vec![raw(XOR_PEER_ADDRESS, &[0, 1, 0, 9, 1, 2, 3])]] {
        assert_eq!(allocated().ask(CONNECT, &items).code(), 400);
    }
}

#[test]
fn a_second_connect_to_the_peer_is_446() {
    // RFC 6062 §5.2: while the first is processed, pending or active: MUST be 446.
    let mut rig = allocated();
    assert!(rig.ask(CONNECT, &[peer(addr(PEER))]).is_silence());
    assert_eq!(rig.ask(CONNECT, &[peer(addr(PEER))]).code(), 446, "processed");
    let id = PeerConnectionId(rig.desk.begun);
    assert_eq!(rig.peer_connection(id, PeerEvent::Connected).code(), 0);
    assert_eq!(rig.ask(CONNECT, &[peer(addr(PEER))]).code(), 446, "pending");
    assert!(rig.peer_connection(id, PeerEvent::Bound).is_silence());
    assert_eq!(rig.ask(CONNECT, &[peer(addr(PEER))]).code(), 446, "active");
    assert!(rig.ask(CONNECT, &[peer(addr("192.0.2.1:10"))]).is_silence(), "another port is another peer");
    assert!(rig.peer_connection(id, PeerEvent::Closed).is_silence());
    assert!(rig.ask(CONNECT, &[peer(addr(PEER))]).is_silence(), "closed");
}

#[test]
fn a_forbidden_peer_is_403() {
    // RFC 6062 §5.2: forbidden by local policy MUST be 403.
    for forbidden in ["10.0.0.1:80", "127.0.0.1:80", "169.254.169.254:80", "192.0.2.1:0", "198.51.100.1:3478"] {
        let mut rig = allocated();
        assert_eq!(rig.ask(CONNECT, &[peer(addr(forbidden))]).code(), 403, "{forbidden}");
        assert_eq!(rig.desk.connections.len(), 0);
    }
}

#[test]
fn a_peer_of_another_family_is_443() {
    // RFC 6062 §5.2 with RFC 8656 §10.2 and §12.2: there is no relayed address to connect from.
    assert_eq!(allocated().ask(CONNECT, &[peer(addr("[2001:db8::1]:9"))]).code(), 443);
}

#[test]
fn a_connection_is_begun_from_the_relayed_address() {
    // RFC 6062 §5.2: the server MUST initiate it: local endpoint the relayed address, remote XOR-PEER-ADDRESS.
    let (rig, id) = connected();
    let (relayed, to, _) = &rig.desk.connections[&id];
    assert_eq!((*relayed, to.socket_addr()), (rig.relayed(), addr(PEER)));
}

#[test]
fn a_connection_that_fails_is_447() {
    // RFC 6062 §5.2: MUST be 447, at once or later.
    let mut rig = allocated();
    assert!(rig.ask(CONNECT, &[peer(addr(PEER))]).is_silence());
    let id = PeerConnectionId(rig.desk.begun);
    let answer = rig.peer_connection(id, PeerEvent::Failed).answer();
    let key = rig.key();
    assert_eq!((answer.code(), answer.method, answer.signed_with(&key)), (447, CONNECT, true));
    rig.desk.connect = Some(ConnectError::Failed);
    assert_eq!(rig.ask(CONNECT, &[peer(addr(PEER))]).code(), 447);
}

#[test]
fn a_connection_may_take_thirty_seconds() {
    // RFC 6062 §5.2: one that times out MUST be 447; the timeout MUST be at least 30 s.
    let mut rig = allocated();
    assert!(rig.ask(CONNECT, &[peer(addr(PEER))]).is_silence());
    rig.pass_without_timer(29);
    assert!(rig.timer().is_silence());
    assert_eq!(rig.desk.connections.len(), 1);
    rig.pass_without_timer(1);
    assert_eq!(rig.timer().code(), 447);
    assert_eq!(rig.desk.connections.len(), 0);
}

#[test]
fn a_connect_success_names_the_connection() {
    // RFC 6062 §5.2: CONNECTION-ID MUST be there and unique to the peer data connection.
    let mut rig = allocated();
    let mut ids = Vec::new();
    for port in 1..=10 {
        assert!(rig.ask(CONNECT, &[peer(addr(&format!("192.0.2.1:{port}")))]).is_silence());
        let id = PeerConnectionId(rig.desk.begun);
        let answer = rig.peer_connection(id, PeerEvent::Connected).answer();
        let key = rig.key();
        assert_eq!((answer.class, answer.method, answer.signed_with(&key)), (Class::Success, CONNECT, true));
        assert_eq!(answer.find(CONNECTION_ID), Some(&id.0.to_be_bytes()[..]));
        ids.push(id);
    }
    ids.dedup();
    assert_eq!(ids.len(), 10);
}

#[test]
fn a_connection_nobody_binds_is_closed() {
    // RFC 6062 §5.2 and §5.3: without a ConnectionBind after 30 s it MUST be closed.
    let (mut rig, _) = connected();
    assert_eq!(rig.permit(PEER), 0);
    let (_, attempt) = rig.peer_arrives("192.0.2.1:77");
    assert_eq!(attempt.answer().class, Class::Indication);
    rig.pass(29);
    assert_eq!(rig.desk.connections.len(), 2);
    rig.pass(1);
    assert_eq!(rig.desk.connections.len(), 0);
}

#[test]
fn a_bound_connection_is_not_closed() {
    // RFC 6062 §5.2: only what was not bound.
    let (mut rig, id) = connected();
    assert!(rig.peer_connection(id, PeerEvent::Bound).is_silence());
    rig.pass(100);
    assert_eq!(rig.desk.connections.len(), 1);
}

#[test]
fn a_peer_without_permission_is_closed_at_once() {
    // RFC 6062 §5.3: no permission: the server MUST close it immediately, and the client hears nothing.
    let mut rig = allocated();
    let (id, outcome) = rig.peer_arrives(PEER);
    assert!(outcome.is_silence());
    assert!(!rig.desk.connections.contains_key(&id));
    assert_eq!(rig.permit("192.0.2.2:0"), 0);
    let (id, outcome) = rig.peer_arrives(PEER);
    assert!(outcome.is_silence());
    assert!(!rig.desk.connections.contains_key(&id));
}

#[test]
fn a_permitted_peer_is_told_of() {
    // RFC 6062 §5.3: a ConnectionAttempt indication on the control connection MUST have XOR-PEER-ADDRESS and
    // CONNECTION-ID.
    let mut rig = allocated();
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    let (id, outcome) = rig.peer_arrives(PEER);
    let attempt = outcome.answer();
    assert_eq!((attempt.class, attempt.method), (Class::Indication, CONNECTION_ATTEMPT));
    assert_eq!(attempt.xor_address(XOR_PEER_ADDRESS), Some(addr(PEER)));
    assert_eq!(attempt.find(CONNECTION_ID), Some(&id.0.to_be_bytes()[..]));
}

#[test]
fn connection_bind_over_a_datagram_is_400() {
    // RFC 6062 §5.4: a client transport that is neither TCP nor TLS MUST get 400.
    let (mut rig, id) = connected();
    rig.client("203.0.113.1:6000");
    rig.path = support::PATH;
    for transport_of_client in [Transport::Udp, Transport::Dtls] {
        rig.from.transport = transport_of_client;
        assert_eq!(rig.ask(CONNECTION_BIND, &[connection_id(id)]).code(), 400);
    }
    assert!(rig.joined.is_empty());
}

#[test]
fn connection_bind_without_a_pending_connection_is_400() {
    // RFC 6062 §5.4: CONNECTION-ID missing, malformed, unknown, bound already: MUST be 400.
    let (mut rig, id) = connected();
    data_connection(&mut rig);
    let items = [vec![], vec![raw(CONNECTION_ID, &[0, 0, 1])], vec![connection_id(PeerConnectionId(id.0 + 1))]];
    for items in items {
        assert_eq!(rig.ask(CONNECTION_BIND, &items).code(), 400);
    }
    assert_eq!(rig.ask(CONNECTION_BIND, &[connection_id(id)]).code(), 0);
    rig.client("203.0.113.1:6001");
    rig.path = Path::Connection(ConnectionId(100));
    assert_eq!(rig.ask(CONNECTION_BIND, &[connection_id(id)]).code(), 400);
}

#[test]
fn connection_bind_joins_the_two() {
    // RFC 6062 §5.4: the client connection is now a client data connection; what comes on it goes to the peer.
    let (mut rig, id) = connected();
    data_connection(&mut rig);
    let answer = rig.ask(CONNECTION_BIND, &[connection_id(id)]).answer();
    let key = rig.key();
    assert_eq!((answer.code(), answer.signed_with(&key)), (0, true));
    assert_eq!(rig.joined, [(ConnectionId(99), id)]);
}

#[test]
fn connection_bind_uses_the_credentials_of_the_allocation() {
    // RFC 6062 §4.3: the same method and credentials as for the control connection MUST be used: unsigned is 401,
    // another user 441.
    let (mut rig, id) = connected();
    data_connection(&mut rig);
    assert_eq!(rig.ask_unsigned(CONNECTION_BIND, &[connection_id(id)]).code(), 401);
    rig.configure(|settings| {
        settings.static_users.push(StaticUser { username: b"eve".to_vec(), password: b"eve".to_vec() });
    });
    rig.user(b"eve", b"eve");
    assert_eq!(rig.ask(CONNECTION_BIND, &[connection_id(id)]).code(), 441);
    assert!(rig.joined.is_empty());
}

#[test]
fn data_connections_end_with_the_allocation() {
    // RFC 6062 §5.5: if the allocation expires the data connections MUST be closed; so it is when it is deleted, or its
    // control connection closes.
    type End = fn(&mut Rig);
    let ends: [(&str, End); 3] = [
        ("expired", |rig| rig.pass(600)),
        ("deleted", |rig| assert_eq!(rig.refresh(&[lifetime(0)]).code(), 0)),
        ("closed", |rig| rig.closed(1)),
    ];
    for (what, end) in ends {
        let (mut rig, id) = connected();
        assert!(rig.peer_connection(id, PeerEvent::Bound).is_silence());
        assert_eq!(rig.permit("192.0.2.1:0"), 0);
        rig.peer_arrives("192.0.2.1:77").1.answer();
        end(&mut rig);
        assert_eq!((rig.desk.connections.len(), rig.server.allocations()), (0, 0), "{what}");
    }
}

#[test]
fn a_closed_peer_connection_cannot_be_bound() {
    // RFC 6062 §5.4, §5.5: it is not pending any more.
    let (mut rig, id) = connected();
    assert!(rig.peer_connection(id, PeerEvent::Closed).is_silence());
    data_connection(&mut rig);
    assert_eq!(rig.ask(CONNECTION_BIND, &[connection_id(id)]).code(), 400);
}

#[test]
fn a_connection_of_an_allocation_that_ends_now_cannot_be_bound() {
    // RFC 6062 §5.4, §5.5: a new connection from the same port shows that the control connection has closed, so what
    // was pending is pending no more.
    let (mut rig, id) = connected();
    rig.path = Path::Connection(ConnectionId(2));
    assert_eq!(rig.ask(CONNECTION_BIND, &[connection_id(id)]).code(), 400);
    assert!(rig.joined.is_empty() && rig.desk.connections.is_empty());
    assert_eq!(rig.server.allocations(), 0);
}

#[test]
fn data_of_a_tcp_allocation_does_not_go_by_indications() {
    // RFC 6062 §4.5: data is sent on the client data connection; Send and channels have no meaning.
    let mut rig = allocated();
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    assert!(rig.send(PEER, b"x").is_silence());
    assert_ne!(rig.bind(0x4000, PEER), 0);
    assert!(rig.channel_data(0x4000, b"x").is_silence());
}

#[test]
fn too_many_connections_are_508() {
    // RFC 6062 §5.2 with RFC 8656 §19: the limit of an allocation; peers beyond it are not accepted.
    let mut rig = Rig::with(|settings| settings.limits.peer_connections_per_allocation = 1).on_stream();
    assert_eq!(rig.ask(ALLOCATE, &[transport(6)]).code(), 0);
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    assert!(rig.ask(CONNECT, &[peer(addr(PEER))]).is_silence());
    assert_eq!(rig.ask(CONNECT, &[peer(addr("192.0.2.1:10"))]).code(), 508);
    assert!(rig.peer_arrives("192.0.2.1:77").1.is_silence());
}

#[test]
fn switched_off_it_is_declined() {
    // RFC 8656 §7.2, item 3: a server without TCP allocations answers 442; RFC 8489 §6.3: methods it does not know get
    // silence.
    let mut rig = Rig::with(|settings| settings.features.tcp_allocations = false).on_stream();

    assert_eq!(rig.ask(ALLOCATE, &[transport(6)]).code(), 442);
    // RFC 8489 §6.3.1: CONNECTION-ID is comprehension-required.
    let answer = rig.allocate(&[connection_id(PeerConnectionId(1))]).answer();
    assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![CONNECTION_ID]));
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert!(rig.ask(CONNECT, &[peer(addr(PEER))]).is_silence());
    assert!(rig.ask(CONNECTION_BIND, &[connection_id(PeerConnectionId(1))]).is_silence());
}
