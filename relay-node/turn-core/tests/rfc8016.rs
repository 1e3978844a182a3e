//! RFC 8016 (mobility): what it demands of a server, one test a rule.

mod support;

use support::rig::{Outcome, Rig};
use support::stun::{
    ALLOCATE, LIFETIME, MESSAGE_INTEGRITY, MOBILITY_TICKET, NONCE, REFRESH, Read, XOR_MAPPED_ADDRESS,
    XOR_RELAYED_ADDRESS, lifetime, raw, transport,
};
use support::{CLIENT, addr};
use turn_core::{ConnectionId, Path, StaticUser, Transport};

const MOVED: &str = "198.18.7.7:4242";
const PEER: &str = "192.0.2.1:9";

fn ticket_of(answer: &Read) -> Vec<u8> {
    answer.find(MOBILITY_TICKET).expect("a ticket").to_vec()
}

/// A mobile allocation with a channel, and its ticket.
fn mobile() -> (Rig, Vec<u8>) {
    let mut rig = Rig::new();
    let answer = rig.allocate(&[raw(MOBILITY_TICKET, &[])]).answer();
    assert_eq!(answer.code(), 0);
    assert_eq!(rig.bind(0x4000, PEER), 0);
    (rig, ticket_of(&answer))
}

/// A Refresh with this ticket from the new place.
fn resume(rig: &mut Rig, ticket: &[u8]) -> Read {
    rig.client(MOVED);
    rig.refresh(&[raw(MOBILITY_TICKET, ticket)]).answer()
}

/// Whom a peer reaches.
fn reached(rig: &mut Rig) -> Option<std::net::SocketAddr> {
    match rig.peer_sends(PEER, b"x") {
        Outcome::Client { to, .. } => Some(to.client),
        _ => None,
    }
}

#[test]
fn an_empty_ticket_asks_for_one() {
    // RFC 8016 §3.1.2: a success answer to it includes MOBILITY-TICKET; who does not ask gets none.
    let (_, ticket) = mobile();
    assert!(!ticket.is_empty());
    assert!(!Rig::new().allocate(&[]).answer().has(MOBILITY_TICKET));
}

#[test]
fn a_ticket_fits_an_unknown_path() {
    // RFC 8016 §3.1.2: its length must follow RFC 8489 §6.1: below 548 bytes of answer.
    let answer = Rig::new().allocate(&[raw(MOBILITY_TICKET, &[])]).answer();
    assert!(answer.bytes.len() < 548 && answer.has(MESSAGE_INTEGRITY));
}

#[test]
fn a_ticket_in_an_allocate_is_400() {
    // RFC 8016 §3.1.2: a non-zero length is 400.
    let (mut rig, ticket) = mobile();
    rig.client(MOVED);
    for value in [&ticket[..], b"x", &[0; 64]] {
        assert_eq!(rig.allocate(&[raw(MOBILITY_TICKET, value)]).code(), 400);
    }
    assert_eq!(rig.server.allocations(), 1);
}

#[test]
fn forbidden_mobility_is_405() {
    // RFC 8016 §3.1.2 and §3.2.2: by local policy, also where it changed since: 405.
    let mut rig = Rig::with(|settings| settings.features.mobility = false);
    let answer = rig.allocate(&[raw(MOBILITY_TICKET, &[])]).answer();
    assert_eq!(answer.code(), 405);
    assert_eq!(rig.server.allocations(), 0);
    let (mut rig, ticket) = mobile();
    rig.configure(|settings| settings.features.mobility = false);
    assert_eq!(resume(&mut rig, &ticket).code(), 405);
    assert_eq!(reached(&mut rig), Some(addr(CLIENT)));
}

#[test]
fn a_retransmitted_allocate_gets_the_same_ticket() {
    // RFC 8489 §6.3.1 with RFC 8016 §3.1.2: the state is the same whichever answer arrives.
    let mut rig = Rig::new();
    let packet = rig.signed(ALLOCATE, &[transport(17), raw(MOBILITY_TICKET, &[])]);
    let first = rig.hand_in(&packet).answer();
    assert_eq!(rig.hand_in(&packet).answer(), first);
}

#[test]
fn a_ticket_finds_the_allocation_from_elsewhere() {
    // RFC 8016 §3.2.2: the 5-tuple is not looked at; the allocation is the ticket's. The answer has a new ticket, which
    // MUST be different.
    let (mut rig, ticket) = mobile();
    let relayed = rig.relayed();
    let answer = resume(&mut rig, &ticket);
    assert_eq!((answer.code(), answer.lifetime()), (0, Some(600)));
    assert_ne!(ticket_of(&answer), ticket);
    assert_eq!(rig.server.allocations(), 1);
    assert_eq!(rig.relayed(), relayed);
    assert!(!answer.has(XOR_RELAYED_ADDRESS) && !answer.has(XOR_MAPPED_ADDRESS));
}

#[test]
fn a_ticket_without_its_allocation_is_437() {
    // RFC 8016 §3.2.2: what it names does not exist (any more): MUST be 437.
    let (mut rig, ticket) = mobile();
    assert_eq!(rig.refresh(&[lifetime(0)]).code(), 0);
    assert_eq!(resume(&mut rig, &ticket).code(), 437);
    let (mut rig, ticket) = mobile();
    rig.pass(600);
    assert_eq!(resume(&mut rig, &ticket).code(), 437);
}

#[test]
fn an_invalid_ticket_is_400() {
    // RFC 8016 §3.2.2: MUST be 400: garbage, cut, or changed by a bit anywhere (§5: it is authenticated).
    let (mut rig, ticket) = mobile();
    let mut cases = vec![b"x".to_vec(), vec![0; 32], ticket[..ticket.len() - 1].to_vec(), [&ticket[..], b"A"].concat()];
    for at in 0..ticket.len() {
        let mut changed = ticket.clone();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        cases.push(changed);
    }
    for case in cases {
        assert_eq!(resume(&mut rig, &case).code(), 400, "{case:?}");
    }
    assert_eq!(reached(&mut rig), Some(addr(CLIENT)));
}

#[test]
fn a_ticket_from_the_same_address_is_400() {
    // RFC 8016 §3.2.2: source IP and port the same as stored: 400.
    let (mut rig, ticket) = mobile();
    assert_eq!(rig.refresh(&[raw(MOBILITY_TICKET, &ticket)]).code(), 400);
    assert_eq!(rig.server.allocations(), 1);
}

#[test]
fn another_users_ticket_is_441() {
    // RFC 8016 §3.2.2 and §5: it must be the user who created the allocation: MUST be 441; unsigned it is nobody: 401.
    let (mut rig, ticket) = mobile();
    rig.configure(|settings| {
        settings.static_users.push(StaticUser { username: b"eve".to_vec(), password: b"eve".to_vec() });
    });
    rig.client(MOVED);
    assert_eq!(rig.ask_unsigned(REFRESH, &[raw(MOBILITY_TICKET, &ticket)]).code(), 401);
    rig.user(b"eve", b"eve");
    assert_eq!(resume(&mut rig, &ticket).code(), 441);
    assert_eq!(rig.refresh(&[raw(MOBILITY_TICKET, &ticket), lifetime(0)]).code(), 441);
    assert_eq!(reached(&mut rig), Some(addr(CLIENT)));
    rig.user(b"user", b"password");
    assert_eq!(resume(&mut rig, &ticket).code(), 0, "the ticket is still good for its owner");
}

#[test]
fn the_old_5_tuple_goes_on_until_the_new_one_sends_data() {
    // RFC 8016 §3.2.2: the server MUST go on receiving and transmitting on the old 5-tuple until data comes on the new.
    let (mut rig, ticket) = mobile();
    assert_eq!(resume(&mut rig, &ticket).code(), 0);
    rig.client(CLIENT);
    for _ in 0..3 {
        assert_eq!(rig.channel_data(0x4000, b"x").peer_gets().1, addr(PEER));
        assert!(matches!(rig.send(PEER, b"x"), Outcome::Peer { .. }));
        assert_eq!(reached(&mut rig), Some(addr(CLIENT)));
    }
}

#[test]
fn data_from_the_new_5_tuple_ends_the_old_one() {
    // RFC 8016 §3.2.2: a Send indication or ChannelData on the new 5-tuple: the old one and its ticket are discarded, data
    // goes to the new one and is accepted there.
    for channel in [true, false] {
        let (mut rig, ticket) = mobile();
        assert_eq!(resume(&mut rig, &ticket).code(), 0);
        let outcome = if channel { rig.channel_data(0x4000, b"x") } else { rig.send(PEER, b"x") };
        assert_eq!(outcome.peer_gets().1, addr(PEER));
        assert_eq!(reached(&mut rig), Some(addr(MOVED)));
        assert_eq!(rig.refresh(&[]).code(), 0);
        rig.client(CLIENT);
        assert!(rig.channel_data(0x4000, b"x").is_silence());
        assert_eq!(rig.refresh(&[]).code(), 437);
        rig.client("198.18.7.7:4243");
        assert_eq!(rig.refresh(&[raw(MOBILITY_TICKET, &ticket)]).code(), 437, "the old ticket");
    }
}

#[test]
fn the_end_of_the_old_connection_ends_the_old_5_tuple() {
    // RFC 8016 §3.2.2: a message that closes the old connection has the same effect as data from the new one.
    let mut rig = Rig::new().on_stream();
    let ticket = ticket_of(&rig.allocate(&[raw(MOBILITY_TICKET, &[])]).answer());
    assert_eq!(rig.permit(PEER), 0);
    rig.path = Path::Connection(ConnectionId(2));
    assert_eq!(resume(&mut rig, &ticket).code(), 0);
    assert_eq!(reached(&mut rig), Some(addr(CLIENT)));
    rig.closed(1);
    assert_eq!(reached(&mut rig), Some(addr(MOVED)));
}

#[test]
fn the_old_ticket_is_for_retransmissions_only() {
    // RFC 8016 §3.2.2: the same Refresh again, for at least 30 seconds, gets the same ticket; another request with the
    // old ticket moves nothing.
    let (mut rig, ticket) = mobile();
    rig.client(MOVED);
    let packet = rig.signed(REFRESH, &[raw(MOBILITY_TICKET, &ticket)]);
    let first = rig.hand_in(&packet).answer();
    for _ in 0..3 {
        rig.pass(10);
        let again = rig.hand_in(&packet).answer();
        assert_eq!((again.code(), ticket_of(&again)), (0, ticket_of(&first)));
    }
    rig.client("198.18.7.7:4243");
    assert_ne!(rig.refresh(&[raw(MOBILITY_TICKET, &ticket)]).code(), 0);
    assert_eq!(reached(&mut rig), Some(addr(CLIENT)));
}

#[test]
fn the_new_ticket_moves_it_again() {
    // RFC 8016 §3.2.2: for a new address the client MUST use the new ticket.
    let (mut rig, ticket) = mobile();
    let mut next = ticket_of(&resume(&mut rig, &ticket));
    for port in 6000..6005 {
        let place = format!("198.18.7.7:{port}");
        rig.client(&place);
        let answer = rig.refresh(&[raw(MOBILITY_TICKET, &next)]).answer();
        assert_eq!(answer.code(), 0);
        next = ticket_of(&answer);
        assert_eq!(rig.channel_data(0x4000, b"x").peer_gets().1, addr(PEER));
        assert_eq!(reached(&mut rig), Some(addr(&place)));
    }
}

#[test]
fn a_client_may_move_to_another_family_and_transport() {
    // RFC 8016 §3.1.2: roaming from one address family to another; and from UDP to TCP.
    let (mut rig, ticket) = mobile();
    rig.client("[2001:db8:7::7]:4242");
    rig.from.transport = Transport::Tcp;
    rig.path = Path::Connection(ConnectionId(5));
    assert_eq!(rig.refresh(&[raw(MOBILITY_TICKET, &ticket)]).code(), 0);
    assert_eq!(rig.channel_data(0x4000, b"x").peer_gets().1, addr(PEER));
    assert_eq!(reached(&mut rig), Some(addr("[2001:db8:7::7]:4242")));
}

#[test]
fn a_refresh_without_a_ticket_is_as_before() {
    // RFC 8016 §3.2.1: who has not moved sends none.
    let (mut rig, _) = mobile();
    let answer = rig.refresh(&[]).answer();
    assert_eq!((answer.code(), answer.find(LIFETIME).is_some()), (0, true));
    rig.client(MOVED);
    assert_eq!(rig.refresh(&[]).code(), 437, "from elsewhere without a ticket");
}

#[test]
fn a_refresh_with_a_ticket_can_delete() {
    // RFC 8016 §3.2.1: it updates the time-to-expiry or deletes, as any Refresh.
    let (mut rig, ticket) = mobile();
    rig.client(MOVED);
    assert_eq!(rig.refresh(&[raw(MOBILITY_TICKET, &ticket), lifetime(0)]).answer().lifetime(), Some(0));
    assert_eq!(rig.server.allocations(), 0);
}

#[test]
fn tickets_cannot_be_guessed() {
    // RFC 8016 §5: strong entropy: nothing is learnt from one about another; no two are alike, nor nearly so.
    let mut tickets = Vec::new();
    let mut rig = Rig::new();
    for port in 5000..5100 {
        rig.client(&format!("203.0.113.1:{port}"));
        tickets.push(ticket_of(&rig.allocate(&[raw(MOBILITY_TICKET, &[])]).answer()));
    }
    for (index, ticket) in tickets.iter().enumerate() {
        for other in &tickets[..index] {
            let same = ticket.iter().zip(other).filter(|(left, right)| left == right).count();
            assert!(same < ticket.len() / 2, "{same} of {}", ticket.len());
        }
    }
}

#[test]
fn a_stale_nonce_is_told_before_the_ticket_is_looked_at() {
    // RFC 8016 §3.2.2 stands on RFC 8489 §9.2.4: first who it is, then what is asked.
    let (mut rig, ticket) = mobile();
    rig.client(MOVED);
    let mut signer = rig.signer();
    signer.nonce = b"stale".to_vec();
    let packet = rig.signed_by(&signer, REFRESH, &[raw(MOBILITY_TICKET, &ticket)]);
    let answer = rig.hand_in(&packet).answer();
    assert_eq!((answer.code(), answer.has(NONCE)), (438, true));
    assert_eq!(resume(&mut rig, &ticket).code(), 0);
}
