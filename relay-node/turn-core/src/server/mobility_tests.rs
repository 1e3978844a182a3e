//! RFC 8016, rule by rule.

use std::time::Duration;

use super::super::lab::{Credentials, FakeHost, Lab, Reply, addr, udp};
use super::super::{DropReason, Input, IpMeta, Out, Verdict};
use super::*;
use crate::wire::attribute::{Data, Lifetime, RequestedTransport, XorPeerAddress};
use crate::wire::{MessageWriter, Method};
use crate::{Change, ConnectionId, Transport};

const PEER: &str = "192.0.2.1:9";
const HOME: &str = "203.0.113.9:51234";
const AWAY: &str = "198.18.0.1:4000";
const FARTHER: &str = "198.18.0.2:4000";

fn mobile(writer: &mut MessageWriter<'_>) {
    udp(writer);
    writer.attribute(&MobilityTicket(b""));
}

fn ticket_of(reply: &Reply) -> Option<Vec<u8>> {
    reply.message().attribute().expect("well-formed").map(|MobilityTicket(ticket)| ticket.to_vec())
}

/// A mobile allocation with a channel, and its ticket.
fn roamer() -> (Lab, Vec<u8>) {
    let mut lab = Lab::new();
    let reply = lab.request(Method::Allocate, mobile);
    assert_eq!(reply.code(), 0);
    let ticket = ticket_of(&reply).expect("a ticket");
    assert_eq!(lab.bind(0x4000, PEER), 0);
    lab.outputs();
    (lab, ticket)
}

fn resume_packet(lab: &Lab, with: &Credentials, ticket: &[u8], lifetime: Option<u32>) -> Vec<u8> {
    lab.packet(Some(with), Method::Refresh, |writer| {
        writer.attribute(&MobilityTicket(ticket));
        if let Some(lifetime) = lifetime {
            writer.attribute(&Lifetime(lifetime));
        }
    })
}

/// A Refresh with a ticket, from here.
fn resume(lab: &mut Lab, ticket: &[u8]) -> Reply {
    let packet = resume_packet(lab, &lab.credentials(), ticket, None);
    lab.exchange(&packet)
}

/// Where what the peer sends goes.
fn reached(lab: &mut Lab) -> std::net::SocketAddr {
    let sent = lab.peer_packet(PEER, b"x").sent().expect("permitted");
    let Out::Client { to, .. } = sent.out else { panic!("{:?}", sent.out) };
    to.client
}

fn served(outputs: &[Output]) -> Vec<(std::net::SocketAddr, bool)> {
    let served = |output: &Output| match output {
        Output::Serve { five_tuple, served, .. } => Some((five_tuple.client, *served)),
        _ => None,
    };
    outputs.iter().filter_map(served).collect()
}

#[test]
fn a_ticket_for_who_asks_for_one() {
    // RFC 8016 §3.1.2.
    type Case = (&'static str, bool, Option<&'static [u8]>, u16, bool);
    let cases: &[Case] = &[
        ("asked", true, Some(b""), 0, true),
        ("not asked", true, None, 0, false),
        ("forbidden", false, Some(b""), 405, false),
        ("forbidden, not asked", false, None, 0, false),
        ("not empty", true, Some(b"x"), 400, false),
        ("not empty, forbidden", false, Some(b"x"), 400, false),
    ];
    for (what, on, ticket, expected, given) in cases {
        let mut lab = Lab::new();
        lab.configure(|settings| settings.features.mobility = *on);
        let with = lab.credentials();
        let packet = lab.packet(Some(&with), Method::Allocate, |writer| {
            udp(writer);
            if let Some(ticket) = ticket {
                writer.attribute(&MobilityTicket(ticket));
            }
        });
        let reply = lab.exchange(&packet);
        assert_eq!(reply.code(), *expected, "{what}");
        assert_eq!(ticket_of(&reply).is_some(), *given, "{what}");
        if *expected == 0 {
            assert_eq!(lab.exchange(&packet).bytes, reply.bytes, "{what}: a retransmission");
        }
    }
    // Each is another one.
    let (_, first) = roamer();
    let mut lab = Lab::new();
    lab.client(addr(AWAY));
    lab.request(Method::Allocate, udp);
    let second = {
        lab.client(addr(FARTHER));
        ticket_of(&lab.request(Method::Allocate, mobile)).expect("a ticket")
    };
    assert_ne!(first, second);
}

#[test]
fn tcp_allocations_do_not_move() {
    let mut lab = Lab::new();
    lab.from.transport = Transport::Tcp;
    lab.path = Path::Connection(ConnectionId(1));
    let reply = lab.request(Method::Allocate, |writer| {
        writer.attribute(&RequestedTransport(6)).attribute(&MobilityTicket(b""));
    });
    assert_eq!(reply.code(), 405);
}

#[test]
fn a_move_from_request_to_first_data() {
    // RFC 8016 §3.2.2.
    let (mut lab, ticket) = roamer();
    lab.pass(100);
    lab.client(addr(AWAY));
    let reply = resume(&mut lab, &ticket);
    assert_eq!(reply.code(), 0);
    assert_eq!(reply.message().attribute(), Ok(Some(Lifetime(600))));
    let next = ticket_of(&reply).expect("a new ticket");
    assert_ne!(next, ticket);
    let outputs = lab.outputs();
    assert_eq!(served(&outputs), [(addr(AWAY), true)]);
    assert!(outputs.iter().any(|output| matches!(output, Output::Record(Change::Put(record))
        if record.five_tuple.client == addr(HOME)
            && record.mobility.is_some_and(|mobility| mobility.moving.is_some_and(|moving| moving.to.client == addr(AWAY))))));
    // MUST continue on the old five-tuple, both ways, until data comes on the new one.
    assert_eq!(reached(&mut lab), addr(HOME));
    lab.client(addr(HOME));
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
    assert_eq!(reached(&mut lab), addr(HOME));
    // A Refresh from the new one is served and ends nothing.
    lab.client(addr(AWAY));
    assert_eq!(lab.refresh(700), 0);
    assert_eq!(reached(&mut lab), addr(HOME));
    lab.outputs();
    // Channels went with it.
    let sent = lab.channel_data(0x4000, b"x").sent().expect("bound");
    assert!(matches!(sent.out, Out::Peer { via, .. } if via == lab.relayed()));
    assert_eq!(reached(&mut lab), addr(AWAY));
    let outputs = lab.outputs();
    assert_eq!(served(&outputs), [(addr(HOME), false)]);
    assert!(matches!(outputs.last(), Some(Output::Record(Change::Put(record)))
        if record.five_tuple.client == addr(AWAY)
            && record.mobility.is_some_and(|mobility| mobility.moving.is_none())));
    // The old five-tuple has no allocation any more.
    lab.client(addr(HOME));
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(DropReason::NoAllocation));
    assert_eq!(lab.refresh(600), 437);
    assert_eq!((lab.server.allocations(), lab.host.bound()), (1, 1));
    // On it goes, with the next ticket; the first one is used up.
    lab.client(addr(FARTHER));
    assert_eq!(resume(&mut lab, &ticket).code(), 437);
    assert_eq!(resume(&mut lab, &next).code(), 0);
}

#[test]
fn a_send_indication_ends_a_move_too() {
    let (mut lab, ticket) = roamer();
    lab.client(addr(AWAY));
    assert_eq!(resume(&mut lab, &ticket).code(), 0);
    let sent = lab.indication(Method::Send, |writer| {
        writer.attribute(&XorPeerAddress(addr(PEER))).attribute(&Data(b"x"));
    });
    assert!(sent.sent().is_some());
    assert_eq!(reached(&mut lab), addr(AWAY));
}

#[test]
fn permissions_and_channels_end_a_move_too() {
    // Beyond RFC 8016 §3.2.2; see the module. Not those that are refused.
    for bind in [false, true] {
        let (mut lab, ticket) = roamer();
        lab.client(addr(AWAY));
        assert_eq!(resume(&mut lab, &ticket).code(), 0);
        assert_eq!(lab.bind(0x4001, "10.0.0.1:9"), 403);
        assert_eq!(reached(&mut lab), addr(HOME));
        if bind {
            assert_eq!(lab.bind(0x4001, "192.0.2.2:9"), 0);
        } else {
            lab.permit("192.0.2.2");
        }
        assert_eq!(reached(&mut lab), addr(AWAY));
    }
}

#[test]
fn what_is_refused() {
    // RFC 8016 §3.2.2, in its order.
    let (mut lab, ticket) = roamer();
    let mut forged = ticket.clone();
    forged[0] ^= 1;
    for bad in [&b""[..], b"x", &forged, &[b'A'; 32], &[b'A'; 600]] {
        lab.client(addr(AWAY));
        assert_eq!(resume(&mut lab, bad).code(), 400, "{bad:?}");
    }
    lab.client(addr(HOME));
    assert_eq!(resume(&mut lab, &ticket).code(), 400, "from the five-tuple it has");
    lab.client(addr(AWAY));
    let other = lab.rest(lab.now.wall / 1000 + 60);
    let packet = resume_packet(&lab, &other, &ticket, None);
    let reply = lab.exchange(&packet);
    assert_eq!(reply.code(), 441, "of another user");
    assert!(reply.message().verify_integrity(&other.key()));
    let mut wrong = lab.credentials();
    wrong.password = b"wrong".to_vec();
    let packet = resume_packet(&lab, &wrong, &ticket, None);
    assert_eq!(lab.exchange(&packet).code(), 401);
    assert_eq!(lab.unsigned(Method::Refresh, |writer| _ = writer.attribute(&MobilityTicket(&ticket))).code(), 401);
    // The new five-tuple has an allocation of its own.
    assert_eq!(lab.allocate(), 0);
    assert_eq!(resume(&mut lab, &ticket).code(), 437);
    assert_eq!(lab.refresh(0), 0);
    assert_eq!(reached(&mut lab), addr(HOME), "nothing has moved");
    // Forbidden meanwhile.
    lab.configure(|settings| settings.features.mobility = false);
    assert_eq!(resume(&mut lab, &ticket).code(), 405);
    lab.configure(|settings| settings.features.mobility = true);
    // Ended meanwhile: 437, not 400.
    lab.client(addr(HOME));
    assert_eq!(lab.refresh(0), 0);
    lab.client(addr(AWAY));
    assert_eq!(resume(&mut lab, &ticket).code(), 437);
    assert_eq!(lab.server.allocations(), 0);
}

#[test]
fn retransmissions_get_the_same_answer() {
    // RFC 8016 §3.2.2: "The old ticket can only be used for the purposes of retransmission", for 30 s at least.
    let (mut lab, ticket) = roamer();
    lab.client(addr(AWAY));
    let packet = resume_packet(&lab, &lab.credentials(), &ticket, None);
    let first = lab.exchange(&packet);
    assert_eq!(first.code(), 0);
    lab.outputs();
    for _ in 0..5 {
        assert_eq!(lab.exchange(&packet).bytes, first.bytes);
    }
    lab.pass(30);
    assert_eq!(ticket_of(&lab.exchange(&packet)), ticket_of(&first));
    assert!(lab.outputs().is_empty());
    // Another transaction, another place, another user: no.
    assert_eq!(resume(&mut lab, &ticket).code(), 400);
    lab.client(addr(FARTHER));
    assert_eq!(resume(&mut lab, &ticket).code(), 400);
    let with = lab.credentials();
    let elsewhere = lab.packet_of(&packet[8..20], Some(&with), Method::Refresh, |writer| {
        writer.attribute(&MobilityTicket(&ticket));
    });
    assert_eq!(lab.exchange(&elsewhere).code(), 400);
    // Nor the new ticket from either of the two five-tuples.
    let next = ticket_of(&first).expect("a ticket");
    for stored in [HOME, AWAY] {
        lab.client(addr(stored));
        assert_eq!(resume(&mut lab, &next).code(), 400);
    }
}

#[test]
fn one_move_at_a_time() {
    // abuse.md E.
    let (mut lab, ticket) = roamer();
    lab.client(addr(AWAY));
    let next = ticket_of(&resume(&mut lab, &ticket)).expect("a ticket");
    lab.outputs();
    lab.client(addr(FARTHER));
    let last = ticket_of(&resume(&mut lab, &next)).expect("a ticket");
    assert_eq!(served(&lab.outputs()), [(addr(AWAY), false), (addr(FARTHER), true)]);
    lab.client(addr(AWAY));
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), Some(DropReason::NoAllocation));
    assert_eq!(lab.refresh(600), 437);
    assert_eq!(reached(&mut lab), addr(HOME));
    lab.client(addr(FARTHER));
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
    assert_eq!(reached(&mut lab), addr(FARTHER));
    // Back home, with the last ticket.
    lab.client(addr(HOME));
    assert_eq!(resume(&mut lab, &last).code(), 0);
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
    assert_eq!(reached(&mut lab), addr(HOME));
    assert_eq!(lab.server.allocations(), 1);
}

#[test]
fn a_ticket_can_end_the_allocation() {
    let (mut lab, ticket) = roamer();
    lab.client(addr(AWAY));
    let packet = resume_packet(&lab, &lab.credentials(), &ticket, Some(0));
    let reply = lab.exchange(&packet);
    assert_eq!(reply.message().attribute(), Ok(Some(Lifetime(0))));
    assert_eq!(ticket_of(&reply), None);
    assert_eq!(lab.server.allocations(), 0);
    // RFC 8656 §8.2, note.
    assert_eq!(lab.exchange(&packet).code(), 437);
}

#[test]
fn an_ended_move_leaves_nothing() {
    for confirmed in [false, true] {
        let (mut lab, ticket) = roamer();
        lab.client(addr(AWAY));
        resume(&mut lab, &ticket);
        if confirmed {
            assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
        }
        lab.pass(600);
        lab.outputs();
        lab.timeout();
        let outputs = lab.outputs();
        let let_go = outputs.iter().filter(|output| matches!(output, Output::Ticket { held: false, .. })).count();
        assert_eq!(let_go, if confirmed { 1 } else { 2 });
        assert!(served(&outputs).contains(&(addr(AWAY), false)));
        for place in [HOME, AWAY] {
            lab.client(addr(place));
            assert_eq!(lab.allocate(), 0, "{place} is free");
        }
    }
}

#[test]
fn between_transports() {
    // From UDP to TCP: the data that ends the move, and what comes back.
    let (mut lab, ticket) = roamer();
    let home = (lab.from, lab.path);
    lab.client(addr(AWAY));
    lab.from.transport = Transport::Tcp;
    lab.path = Path::Connection(ConnectionId(7));
    let next = ticket_of(&resume(&mut lab, &ticket)).expect("a ticket");
    // The new connection closes before it was used: the move is off, and the ticket of the answer is still good.
    lab.closed(ConnectionId(7));
    assert_eq!(reached(&mut lab), addr(HOME));
    lab.path = Path::Connection(ConnectionId(8));
    let last = ticket_of(&resume(&mut lab, &next)).expect("a ticket");
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
    let sent = lab.peer_packet(PEER, b"x").sent().expect("permitted");
    let (to, path) = (lab.from, lab.path);
    assert_eq!(sent.out, Out::Client { to, path });
    // And back to UDP while the connection closes: "a message from the client to close the old connection".
    (lab.from, lab.path) = home;
    assert_eq!(resume(&mut lab, &last).code(), 0);
    lab.closed(ConnectionId(8));
    assert_eq!(reached(&mut lab), addr(HOME));
    assert_eq!(lab.server.allocations(), 1);
}

#[test]
fn a_closed_connection_waits_for_its_client() {
    let stream = |lab: &mut Lab, client: &str, connection: u64| {
        lab.client(addr(client));
        lab.from.transport = Transport::Tcp;
        lab.path = Path::Connection(ConnectionId(connection));
    };
    let mut lab = Lab::new();
    stream(&mut lab, HOME, 1);
    let ticket = ticket_of(&lab.request(Method::Allocate, mobile)).expect("a ticket");
    assert_eq!(lab.bind(0x4000, PEER), 0);
    lab.closed(ConnectionId(1));
    assert_eq!(lab.server.allocations(), 1);
    assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono + Duration::from_secs(30)));
    lab.pass(29);
    stream(&mut lab, AWAY, 2);
    let next = ticket_of(&resume(&mut lab, &ticket)).expect("a ticket");
    assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
    assert_eq!(reached(&mut lab), addr(AWAY));
    assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono + Duration::from_secs(600)));
    // Not for ever.
    lab.closed(ConnectionId(2));
    lab.pass(30);
    lab.timeout();
    assert_eq!(lab.server.allocations(), 0);
    stream(&mut lab, FARTHER, 3);
    assert_eq!(resume(&mut lab, &next).code(), 437);
    // Without mobility at once (RFC 8656 §5).
    stream(&mut lab, HOME, 4);
    assert_eq!(lab.allocate(), 0);
    lab.closed(ConnectionId(4));
    assert_eq!(lab.server.allocations(), 0);
}

#[test]
fn comes_back_after_a_restart() {
    // Promise P2, in a move and after it.
    for confirmed in [false, true] {
        let (mut before, ticket) = roamer();
        before.client(addr(AWAY));
        let packet = resume_packet(&before, &before.credentials(), &ticket, None);
        let answer = before.exchange(&packet);
        if confirmed {
            assert_eq!(before.channel_data(0x4000, b"x").dropped(), None);
        }
        let record = before.server.records(before.now).next().expect("one");
        let mut lab = Lab::new();
        lab.now = before.now;
        lab.restore(record.clone());
        assert_eq!(lab.server.records(lab.now).next(), Some(record));
        assert_eq!(reached(&mut lab), addr(if confirmed { AWAY } else { HOME }));
        let next = ticket_of(&answer).expect("a ticket");
        lab.client(addr(AWAY));
        if !confirmed {
            assert_eq!(ticket_of(&lab.exchange(&packet)), Some(next.clone()), "a retransmission across the restart");
        }
        assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None);
        assert_eq!(reached(&mut lab), addr(AWAY));
        lab.client(addr(FARTHER));
        assert_eq!(resume(&mut lab, &next).code(), 0);
    }
}

#[test]
fn a_call_outlasts_its_credential_on_the_move() {
    let mut lab = Lab::new();
    let mut with = lab.rest(lab.now.wall / 1000 + 60);
    let reply = lab.signed(&with, Method::Allocate, mobile);
    let ticket = ticket_of(&reply).expect("a ticket");
    lab.pass(61);
    lab.client(addr(AWAY));
    with.nonce = lab.nonce_for(AWAY);
    let packet = resume_packet(&lab, &with, &ticket, None);
    assert_eq!(lab.exchange(&packet).code(), 0);
}

#[test]
fn tickets_of_other_workers_are_passed_on_unopened() {
    struct Other(FakeHost, WorkerId);
    impl Host for Other {
        fn bind(
            &mut self,
            request: super::super::BindRequest<'_>,
        ) -> Result<super::super::Bound, super::super::BindError> {
            self.0.bind(request)
        }

        fn ticket_owner(&self, _: &Ticket) -> Option<WorkerId> {
            Some(self.1)
        }

        fn route(&self, to: crate::PeerAddr) -> super::super::Route {
            self.0.route(to)
        }
    }
    let (mut lab, ticket) = roamer();
    let mut unknown = ticket.clone();
    unknown[5] ^= 1;
    lab.client(addr(AWAY));
    let mut feed = |ticket: &[u8], owner| {
        let packet = resume_packet(&lab, &lab.credentials(), ticket, None);
        let input = Input::FromClient { from: lab.from, path: lab.path, packet: &packet, ip: IpMeta::default() };
        lab.server.handle_input(lab.now, input, &mut Other(FakeHost::default(), WorkerId(owner)))
    };
    assert!(matches!(feed(&unknown, 3), Verdict::Elsewhere(WorkerId(3))));
    assert!(matches!(feed(&unknown, 0), Verdict::Reply { .. }), "this worker's, but gone");
    assert!(matches!(feed(b"not a ticket", 3), Verdict::Reply { .. }));
    assert!(matches!(feed(&ticket, 3), Verdict::Reply { .. }), "held here");
}
