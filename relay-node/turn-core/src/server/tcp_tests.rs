//! RFC 6062 as far as it is decided in the core.

use super::super::lab::{Lab, Reply, USER, addr, ip, udp};
use super::*;
use crate::wire::attribute::{AdditionalAddressFamily, RequestedTransport};
use crate::wire::{Message, MessageWriter};
use crate::{ConnectionId as StreamId, EndReason, Input, ListenerId, Transport};

const PEER: &str = "192.0.2.1:9";

fn tcp(writer: &mut MessageWriter<'_>) {
    writer.attribute(&RequestedTransport(6));
}

/// A client that came over a stream.
fn on_stream() -> Lab {
    let mut lab = Lab::new();
    lab.from.transport = Transport::Tcp;
    lab.path = Path::Connection(StreamId(1));
    lab
}

/// With a TCP allocation whose record was taken away.
fn tcp_allocated() -> Lab {
    let mut lab = on_stream();
    assert_eq!(lab.request(Method::Allocate, tcp).code(), 0);
    lab.outputs();
    lab
}

fn connect_packet(lab: &Lab, peer: &str) -> Vec<u8> {
    let peer = XorPeerAddress(addr(peer));
    lab.packet(Some(&lab.credentials()), Method::Connect, |writer| _ = writer.attribute(&peer))
}

/// A Connect that is not answered yet.
fn connecting(lab: &mut Lab, peer: &str) -> PeerConnectionId {
    let packet = connect_packet(lab, peer);
    assert!(lab.client_packet(&packet).is_done(), "{peer}");
    PeerConnectionId(u32::try_from(lab.host.connects.len()).expect("few"))
}

/// A Connect that is refused at once; its code.
fn refused(lab: &mut Lab, peer: &str) -> u16 {
    let packet = connect_packet(lab, peer);
    lab.exchange(&packet).code()
}

fn event(lab: &mut Lab, connection: PeerConnectionId, event: PeerEvent) -> Verdict {
    let relayed = lab.relayed();
    lab.input(Input::PeerConnection { relayed, connection, event })
}

fn reply(lab: &Lab, verdict: &Verdict) -> Reply {
    assert!(matches!(verdict, Verdict::Reply { .. }), "{verdict:?}");
    Reply { bytes: lab.server.reply().to_vec() }
}

/// A connection that waits for its ConnectionBind.
fn pending(lab: &mut Lab, peer: &str) -> PeerConnectionId {
    let id = connecting(lab, peer);
    let verdict = event(lab, id, PeerEvent::Connected);
    assert_eq!(reply(lab, &verdict).code(), 0);
    lab.outputs();
    id
}

fn connection_bind(lab: &mut Lab, id: u32) -> Reply {
    lab.request(Method::ConnectionBind, |writer| _ = writer.attribute(&ConnectionId(id)))
}

fn closed_peers(lab: &mut Lab) -> Vec<PeerConnectionId> {
    let closed = |output| match output {
        Output::ClosePeer(id) => Some(id),
        _ => None,
    };
    lab.outputs().into_iter().filter_map(closed).collect()
}

#[test]
fn what_may_be_allocated() {
    // RFC 6062 §5.1.
    type Case = (&'static str, fn(&mut MessageWriter<'_>), u16);
    let cases: &[Case] = &[
        ("TCP", tcp, 0),
        ("UDP over a stream", udp, 0),
        ("protocol 5", |w| w.raw(0x0019, &[5, 0, 0, 0]), 442),
        (
            "EVEN-PORT",
            |w| {
                tcp(w);
                w.raw(0x0018, &[0]);
            },
            400,
        ),
        (
            "RESERVATION-TOKEN",
            |w| {
                tcp(w);
                w.raw(0x0022, &[0; 8]);
            },
            400,
        ),
        (
            "LIFETIME",
            |w| {
                tcp(w);
                w.raw(0x000D, &[0, 0, 3, 0]);
            },
            0,
        ),
    ];
    for (what, write, expected) in cases {
        let mut lab = on_stream();
        let reply = lab.request(Method::Allocate, write);
        assert_eq!(reply.code(), *expected, "{what}");
        assert!(!reply.message().contains(AttributeType::RESERVATION_TOKEN), "{what}");
    }
    let mut lab = Lab::new();
    assert_eq!(lab.request(Method::Allocate, tcp).code(), 400, "over UDP");
    let mut lab = on_stream();
    lab.from.transport = Transport::Tls;
    assert_eq!(lab.request(Method::Allocate, tcp).code(), 0, "over TLS");
}

#[test]
fn switched_off_it_is_not_there() {
    let mut lab = on_stream();
    lab.configure(|settings| settings.features.tcp_allocations = false);
    assert_eq!(lab.request(Method::Allocate, tcp).code(), 442);
    for method in [Method::Connect, Method::ConnectionBind] {
        let packet = lab.packet(None, method, |_| {});
        assert_eq!(lab.client_packet(&packet).dropped(), Some(DropReason::Unexpected), "as any unknown method");
    }
}

#[test]
fn the_record_says_tcp_and_restores_nothing() {
    let mut lab = on_stream();
    lab.request(Method::Allocate, tcp);
    let changes = lab.changes();
    let [crate::Change::Put(record)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(record.peer_transport, PeerTransport::Tcp);

    // What is alive is not replaced by what somebody wrote down.
    let mut newer = *record.clone();
    newer.sequence += 9;
    lab.restore(newer);
    assert!(lab.changes().is_empty());

    let mut lab = on_stream();
    lab.restore(*record.clone());
    let changes = lab.changes();
    assert!(matches!(changes[..], [crate::Change::End { reason: EndReason::Closed, .. }]), "{changes:?}");
    assert_eq!(lab.server.allocations(), 0);
}

#[test]
fn a_connection_is_answered_when_it_is_there() {
    // RFC 6062 §5.2.
    let mut lab = tcp_allocated();
    let packet = connect_packet(&lab, PEER);
    assert!(lab.client_packet(&packet).is_done());
    assert_eq!(lab.host.connects, [(lab.relayed(), PeerAddr::new(addr(PEER)))]);
    assert!(lab.outputs().is_empty());

    let verdict = event(&mut lab, PeerConnectionId(1), PeerEvent::Connected);
    let Verdict::Reply { out: Out::Client { to, path } } = verdict else { panic!("{verdict:?}") };
    assert_eq!((to, path), (lab.from, lab.path), "on the control connection");
    let reply = reply(&lab, &verdict);
    let message = reply.message();
    assert_eq!((message.class(), message.method()), (Class::Success, Method::Connect));
    assert_eq!(message.transaction_id().0, packet[8..20]);
    assert_eq!(message.attribute(), Ok(Some(ConnectionId(1))));
    assert!(message.verify_integrity(&lab.credentials().key()));
    let outputs = lab.outputs();
    assert!(
        matches!(&outputs[..], [Output::Pend { connection: PeerConnectionId(1), username, client, .. }]
            if **username == *USER && *client == lab.from.client),
        "{outputs:?}"
    );
    // The news twice is no second answer.
    assert!(matches!(event(&mut lab, PeerConnectionId(1), PeerEvent::Connected), Verdict::Done));
}

/// abuse.md E: whichever worker has the bytes.
#[test]
fn data_connections_share_the_meter_of_their_allocation() {
    let meter = |lab: &mut Lab, peer: &str| {
        let id = connecting(lab, peer);
        event(lab, id, PeerEvent::Connected);
        let outputs = lab.outputs();
        let Some(Output::Pend { meters, .. }) = outputs.into_iter().next() else { panic!("nothing pends") };
        meters.allocation
    };
    let mut lab = tcp_allocated();
    assert!(meter(&mut lab, "192.0.2.9:80").is_none(), "no limit, no meter");
    lab.configure(|settings| settings.limits.bytes_per_allocation = 1000);
    let (one, other) = (meter(&mut lab, "192.0.2.9:81"), meter(&mut lab, "192.0.2.9:82"));
    let (one, other) = (one.expect("a limit"), other.expect("a limit"));
    assert!(std::sync::Arc::ptr_eq(&one, &other));
}

#[test]
fn a_failure_is_447() {
    let mut lab = tcp_allocated();
    let id = connecting(&mut lab, PEER);
    let verdict = event(&mut lab, id, PeerEvent::Failed);
    let failed = reply(&lab, &verdict);
    assert_eq!(failed.code(), 447);
    assert!(failed.message().verify_integrity(&lab.credentials().key()));
    // It may be tried again (RFC 6062 §4.3).
    connecting(&mut lab, PEER);
}

#[test]
fn no_answer_in_30_seconds_is_447() {
    let mut lab = tcp_allocated();
    let first = connecting(&mut lab, PEER);
    let second = connecting(&mut lab, "192.0.2.2:9");
    lab.pass(29);
    assert!(matches!(lab.input(Input::Timeout), Verdict::Done));
    lab.pass(1);
    // One answer at a time; the deadline stays due until all are given.
    for id in [first, second] {
        assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono));
        let verdict = lab.input(Input::Timeout);
        assert_eq!(reply(&lab, &verdict).code(), 447);
        assert_eq!(closed_peers(&mut lab), [id]);
    }
    assert!(lab.server.poll_timeout().is_some_and(|next| next > lab.now.mono));
    // A connection that is there in the same moment is too late.
    event(&mut lab, first, PeerEvent::Connected);
    assert_eq!(closed_peers(&mut lab), [first]);
}

#[test]
fn what_is_refused() {
    // RFC 6062 §5.2.
    let cases = [
        ("private", "10.0.0.1:80", 403),
        ("metadata service", "169.254.169.254:80", 403),
        ("port 0", "192.0.2.1:0", 403),
        ("other family", "[2001:db8::1]:9", 443),
        ("IPv4-mapped", "[::ffff:192.0.2.1]:9", 443),
    ];
    for (what, peer, expected) in cases {
        let mut lab = tcp_allocated();
        assert_eq!(refused(&mut lab, peer), expected, "{what}");
        assert!(lab.host.connects.is_empty(), "{what}");
    }
    for (error, expected) in [(ConnectError::Forbidden, 403), (ConnectError::Failed, 447), (ConnectError::NoRoom, 508)]
    {
        let mut lab = tcp_allocated();
        lab.host.refuse_connect = Some(error);
        assert_eq!(refused(&mut lab, PEER), expected);
    }
    let mut lab = tcp_allocated();
    lab.configure(|settings| settings.policy.members.push(ip("198.51.100.8")));
    assert_eq!(refused(&mut lab, "198.51.100.8:22"), 403, "another member");
    lab.host.set_route("192.0.2.1:9", Route::Member(crate::MemberId(1)));
    assert_eq!(refused(&mut lab, PEER), 403, "another member's relayed address");
    let mut lab = tcp_allocated();
    assert_eq!(lab.request(Method::Connect, |_| {}).code(), 400, "no XOR-PEER-ADDRESS");
    assert_eq!(lab.request(Method::Connect, |writer| writer.raw(0x0012, &[])).code(), 400, "an empty one");
    assert_eq!(refused(&mut on_stream(), PEER), 437, "no allocation");
    let mut lab = on_stream();
    lab.allocate();
    assert_eq!(refused(&mut lab, PEER), 437, "a UDP allocation");
    let mut lab = tcp_allocated();
    let with = lab.rest(lab.now.wall / 1000 + 60);
    let peer = XorPeerAddress(addr(PEER));
    assert_eq!(lab.signed(&with, Method::Connect, |writer| _ = writer.attribute(&peer)).code(), 441);
    assert_eq!(lab.unsigned(Method::Connect, |writer| _ = writer.attribute(&peer)).code(), 401);
}

#[test]
fn a_second_connection_to_a_peer_is_446() {
    // RFC 6062 §5.2: while it is on its way, pending or bound; another port is another peer.
    let mut lab = tcp_allocated();
    let id = connecting(&mut lab, PEER);
    assert_eq!(refused(&mut lab, PEER), 446);
    event(&mut lab, id, PeerEvent::Connected);
    assert_eq!(refused(&mut lab, PEER), 446);
    event(&mut lab, id, PeerEvent::Bound);
    assert_eq!(refused(&mut lab, PEER), 446);
    connecting(&mut lab, "192.0.2.1:10");
    event(&mut lab, id, PeerEvent::Closed);
    connecting(&mut lab, PEER);
}

#[test]
fn a_mapped_address_is_no_peer_known_by_another_name() {
    // abuse.md A: with an address of each family, the IPv4 peer written as IPv6 is forbidden, connected or not.
    let mut lab = on_stream();
    lab.host.ipv6 = true;
    let reply = lab.request(Method::Allocate, |writer| {
        tcp(writer);
        writer.attribute(&AdditionalAddressFamily(2));
    });
    assert_eq!(reply.code(), 0);
    connecting(&mut lab, PEER);
    assert_eq!(refused(&mut lab, "[::ffff:192.0.2.1]:9"), 403);
}

#[test]
fn the_limit_is_508_and_silence() {
    let mut lab = tcp_allocated();
    lab.configure(|settings| settings.limits.peer_connections_per_allocation = 2);
    lab.permit("192.0.2.3");
    connecting(&mut lab, PEER);
    pending(&mut lab, "192.0.2.2:9");
    assert_eq!(refused(&mut lab, "192.0.2.3:9"), 508);
    let verdict = event(&mut lab, PeerConnectionId(9), PeerEvent::Arrived(PeerAddr::new(addr("192.0.2.3:9"))));
    assert!(matches!(verdict, Verdict::Drop(DropReason::PeerConnections)));
    assert_eq!(closed_peers(&mut lab), [PeerConnectionId(9)]);
}

#[test]
fn a_peer_with_a_permission_is_announced() {
    // RFC 6062 §5.3.
    let mut lab = tcp_allocated();
    let peer = PeerAddr::new(addr(PEER));
    let verdict = event(&mut lab, PeerConnectionId(7), PeerEvent::Arrived(peer));
    assert!(matches!(verdict, Verdict::Drop(DropReason::NoPermission)), "{verdict:?}");
    assert_eq!(closed_peers(&mut lab), [PeerConnectionId(7)]);

    lab.permit("192.0.2.1");
    lab.outputs();
    let verdict = event(&mut lab, PeerConnectionId(8), PeerEvent::Arrived(peer));
    let Verdict::Reply { out } = verdict else { panic!("{verdict:?}") };
    let (to, path) = (lab.from, lab.path);
    assert_eq!(out, Out::Client { to, path });
    let message = Message::parse(lab.server.reply()).expect("a message");
    assert_eq!((message.class(), message.method()), (Class::Indication, Method::ConnectionAttempt));
    assert_eq!(message.attribute(), Ok(Some(ConnectionId(8))));
    assert_eq!(message.attribute(), Ok(Some(XorPeerAddress(addr(PEER)))));
    let outputs = lab.outputs();
    assert!(matches!(&outputs[..], [Output::Pend { connection: PeerConnectionId(8), .. }]), "{outputs:?}");

    lab.pass(300);
    let verdict = event(&mut lab, PeerConnectionId(10), PeerEvent::Arrived(peer));
    assert!(matches!(verdict, Verdict::Drop(DropReason::NoPermission)), "the permission has ended");
}

#[test]
fn what_nobody_claims_is_closed_after_30_seconds() {
    // RFC 6062 §5.2, §5.3.
    let mut lab = tcp_allocated();
    lab.permit("192.0.2.2");
    let connected = pending(&mut lab, PEER);
    let arrived = PeerConnectionId(9);
    event(&mut lab, arrived, PeerEvent::Arrived(PeerAddr::new(addr("192.0.2.2:9"))));
    let bound = pending(&mut lab, "192.0.2.3:9");
    event(&mut lab, bound, PeerEvent::Bound);
    lab.pass(29);
    lab.timeout();
    assert_eq!(closed_peers(&mut lab), []);
    lab.pass(1);
    assert!(matches!(lab.input(Input::Timeout), Verdict::Done), "nobody is told");
    let mut closed = closed_peers(&mut lab);
    closed.sort();
    assert_eq!(closed, [connected, arrived]);
    // A claim that crossed this on its way is undone.
    event(&mut lab, connected, PeerEvent::Bound);
    assert_eq!(closed_peers(&mut lab), [connected]);
}

#[test]
fn a_bind_joins_the_two() {
    // RFC 6062 §5.4; the allocation may be another server's.
    let mut lab = on_stream();
    lab.host.pending.insert(PeerConnectionId(5), USER.to_vec());
    let reply = connection_bind(&mut lab, 5);
    assert_eq!(reply.code(), 0);
    assert!(reply.message().verify_integrity(&lab.credentials().key()));
    let outputs = lab.outputs();
    assert!(
        matches!(outputs[..], [Output::Join { connection: StreamId(1), peer: PeerConnectionId(5) }]),
        "{outputs:?}"
    );
    assert_eq!(connection_bind(&mut lab, 5).code(), 400, "claimed already");
    assert_eq!(connection_bind(&mut lab, 6).code(), 400, "unknown");
    assert_eq!(lab.request(Method::ConnectionBind, |_| {}).code(), 400, "no CONNECTION-ID");
    assert_eq!(lab.request(Method::ConnectionBind, |writer| writer.raw(0x002A, &[5])).code(), 400, "a short one");
    assert_eq!(lab.unsigned(Method::ConnectionBind, |_| {}).code(), 401);
    lab.host.pending.insert(PeerConnectionId(6), b"mallory".to_vec());
    assert_eq!(connection_bind(&mut lab, 6).code(), 441, "another user's");
    assert!(lab.outputs().is_empty());
}

#[test]
fn a_bind_may_bring_the_nonce_of_its_control_connection() {
    // RFC 6062 §4.3: the same credentials; turnutils_uclient does not ask for another nonce.
    let cases = [
        ("this connection's", "203.0.113.9:51234", 0),
        ("the control connection's", "203.0.113.9:40000", 0),
        ("another connection's", "203.0.113.9:40001", 438),
        ("another client's", "203.0.113.8:40000", 438),
    ];
    for (what, client, expected) in cases {
        let mut lab = on_stream();
        lab.host.pending.insert(PeerConnectionId(5), USER.to_vec());
        lab.host.control = Some(addr("203.0.113.9:40000"));
        let mut with = lab.credentials();
        with.nonce = lab.nonce_for(client);
        let reply = lab.signed(&with, Method::ConnectionBind, |writer| _ = writer.attribute(&ConnectionId(5)));
        assert_eq!(reply.code(), expected, "{what}");
    }
    let mut lab = on_stream();
    lab.host.control = Some(addr("203.0.113.8:40000"));
    let mut with = lab.credentials();
    with.nonce = lab.nonce_for("203.0.113.8:40000");
    let reply = lab.signed(&with, Method::ConnectionBind, |writer| _ = writer.attribute(&ConnectionId(5)));
    assert_eq!(reply.code(), 438, "a control connection from elsewhere");
    with.nonce = lab.nonce_for("203.0.113.8:40000");
    assert_eq!(lab.signed(&with, Method::Connect, |_| {}).code(), 438, "no other request");
}

#[test]
fn a_bind_needs_a_stream_of_its_own() {
    let mut lab = tcp_allocated();
    lab.host.pending.insert(PeerConnectionId(5), USER.to_vec());
    assert_eq!(connection_bind(&mut lab, 5).code(), 400, "on the control connection");
    let mut lab = Lab::new();
    lab.host.pending.insert(PeerConnectionId(5), USER.to_vec());
    assert_eq!(lab.path, Path::Listener(ListenerId(0)));
    assert_eq!(connection_bind(&mut lab, 5).code(), 400, "over UDP");
}

#[test]
fn a_bind_outlasts_its_credentials() {
    let mut lab = on_stream();
    let with = lab.rest(lab.now.wall / 1000 + 60);
    lab.host.pending.insert(PeerConnectionId(5), with.username.clone());
    lab.pass(61);
    let reply = lab.signed(&with, Method::ConnectionBind, |writer| _ = writer.attribute(&ConnectionId(5)));
    assert_eq!(reply.code(), 0);
}

#[test]
fn everything_ends_with_the_allocation() {
    // RFC 6062 §5.5.
    type Case = (&'static str, fn(&mut Lab));
    let cases: &[Case] = &[
        ("Refresh 0", |lab| _ = lab.refresh(0)),
        ("expiry", |lab| {
            lab.pass(600);
            lab.timeout();
        }),
        ("control connection", |lab| lab.closed(StreamId(1))),
        ("revoke", |lab| {
            let id = lab.server.records(lab.now).next().expect("one").id;
            lab.input(Input::Revoke(id));
        }),
    ];
    for (what, end) in cases {
        let mut lab = tcp_allocated();
        let bound = pending(&mut lab, PEER);
        event(&mut lab, bound, PeerEvent::Bound);
        if *what != "expiry" {
            connecting(&mut lab, "192.0.2.2:9");
            pending(&mut lab, "192.0.2.3:9");
        }
        lab.outputs();
        end(&mut lab);
        assert_eq!(closed_peers(&mut lab).len(), lab.host.connects.len(), "{what}");
        assert_eq!(lab.server.poll_timeout(), None, "{what}");
    }
}

#[test]
fn there_are_no_datagrams() {
    // RFC 6062 §4.5: data goes by data connections only.
    let mut lab = tcp_allocated();
    lab.permit("192.0.2.1");
    assert_eq!(lab.bind(0x4000, PEER), 403);
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(DropReason::NoChannel));
    let sent = lab.indication(Method::Send, |writer| {
        writer.attribute(&XorPeerAddress(addr(PEER))).attribute(&crate::wire::attribute::Data(b"x"));
    });
    assert_eq!(sent.dropped(), Some(DropReason::Unexpected));
    assert_eq!(lab.peer_packet(PEER, b"x").dropped(), Some(DropReason::NoAllocation));
}

#[test]
fn a_policy_that_forbids_a_peer_ends_its_connection() {
    // abuse.md A.
    let mut lab = tcp_allocated();
    let bound = pending(&mut lab, PEER);
    event(&mut lab, bound, PeerEvent::Bound);
    let kept = pending(&mut lab, "192.0.9.9:9");
    let open = connecting(&mut lab, "192.0.2.2:9");
    lab.configure(|settings| {
        settings.policy.denied.push(crate::policy::Network { address: ip("192.0.2.0"), prefix: 24 });
    });
    assert_eq!(closed_peers(&mut lab), [bound]);
    let verdict = lab.input(Input::Timeout);
    assert_eq!(reply(&lab, &verdict).code(), 447);
    assert_eq!(closed_peers(&mut lab), [open]);
    assert_eq!(refused(&mut lab, PEER), 403);
    assert_eq!(refused(&mut lab, "192.0.9.9:9"), 446, "{kept:?} goes on");
}
