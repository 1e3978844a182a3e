//! §7: Allocate, its checks in their order.

use turn_core::{Family, PortRequest, Transport};

use crate::support::addr;
use crate::support::rig::Rig;
use crate::support::stun::{
    ADDITIONAL_ADDRESS_FAMILY, ALLOCATE, DONT_FRAGMENT, EVEN_PORT, Item, LIFETIME, REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT, RESERVATION_TOKEN, XOR_MAPPED_ADDRESS, XOR_RELAYED_ADDRESS, additional, even_port, family,
    lifetime, raw, token, transport,
};

#[test]
fn an_allocate_must_be_authenticated() {
    // RFC 8656 §7.2, item 1: the server MUST require that the request be authenticated.
    let mut rig = Rig::new();
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
    rig.user(b"user", b"wrong");
    assert_eq!(rig.allocate(&[]).code(), 401);
    rig.user(b"nobody", b"password");
    assert_eq!(rig.allocate(&[]).code(), 401);
    assert_eq!((rig.server.allocations(), rig.desk.bindings.len()), (0, 0));
}

#[test]
fn a_5_tuple_in_use_is_437() {
    // RFC 8656 §7.2, item 2.
    let mut rig = Rig::allocated();
    assert_eq!(rig.allocate(&[]).code(), 437);
    // Before what follows it is looked at.
    assert_eq!(rig.ask(ALLOCATE, &[]).code(), 437);
    assert_eq!(rig.ask(ALLOCATE, &[transport(99)]).code(), 437);
    assert_eq!(rig.server.allocations(), 1);
}

#[test]
fn a_5_tuple_in_use_is_told_to_the_authenticated_only() {
    // RFC 8656 §7.2: item 1 comes before item 2.
    let mut rig = Rig::allocated();
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[transport(17)]).code(), 401);
}

#[test]
fn requested_transport_is_required_and_well_formed() {
    // RFC 8656 §7.2, item 3: missing or malformed is 400.
    let cases: [&[Item]; 6] = [
        &[],
        &[raw(REQUESTED_TRANSPORT, &[])],
        &[raw(REQUESTED_TRANSPORT, &[17])],
        &[raw(REQUESTED_TRANSPORT, &[17, 0, 0])],
        &[raw(REQUESTED_TRANSPORT, &[17, 0, 0, 0, 0])],
        &[lifetime(600), family(1)],
    ];
    for items in cases {
        let mut rig = Rig::new();
        assert_eq!(rig.ask(ALLOCATE, items).code(), 400, "{items:?}");
        assert_eq!(rig.server.allocations(), 0);
    }
}

#[test]
fn an_unsupported_transport_is_442() {
    // RFC 8656 §7.2, item 3: a protocol that is not supported is 442. (6 is RFC 6062's.)
    for protocol in (0..=255).filter(|protocol| ![6, 17].contains(protocol)) {
        assert_eq!(Rig::new().ask(ALLOCATE, &[transport(protocol)]).code(), 442, "protocol {protocol}");
    }
}

#[test]
fn dont_fragment_is_served_or_unknown() {
    // RFC 8656 §7.2, item 4: where DF cannot be set, DONT-FRAGMENT is an unknown comprehension-required attribute.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[raw(DONT_FRAGMENT, &[])]).answer();
    match answer.code() {
        0 => {}
        420 => assert_eq!(answer.unknown_attributes(), [DONT_FRAGMENT]),
        code => panic!("{code}"),
    }
}

#[test]
fn a_reservation_token_excludes_other_wishes() {
    // RFC 8656 §7.2, item 5: with EVEN-PORT, REQUESTED-ADDRESS-FAMILY or ADDITIONAL-ADDRESS-FAMILY it is 400, valid
    // or not.
    for other in [even_port(false), even_port(true), family(1), family(2), family(77), additional(2)] {
        let mut rig = Rig::new();
        let answer = rig.allocate(&[even_port(true)]).answer();
        let reserved: [u8; 8] = answer.find(RESERVATION_TOKEN).expect("a token").try_into().expect("8 bytes");
        rig.client("203.0.113.1:5001");
        assert_eq!(rig.allocate(&[token(reserved), other.clone()]).code(), 400, "{other:?}");
        assert_eq!(rig.allocate(&[other.clone(), token([9; 8])]).code(), 400, "{other:?}");
        // The reservation is still there.
        assert_eq!(rig.allocate(&[token(reserved)]).code(), 0, "{other:?}");
    }
}

#[test]
fn an_invalid_reservation_token_is_508() {
    // RFC 8656 §7.2, item 5: a token that is not valid for some reason.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[token([0xEE; 8])]).code(), 508);
    let answer = rig.allocate(&[even_port(true)]).answer();
    let reserved: [u8; 8] = answer.find(RESERVATION_TOKEN).expect("a token").try_into().expect("8 bytes");
    rig.client("203.0.113.1:5001");
    assert_eq!(rig.allocate(&[token(reserved)]).code(), 0);
    // It is good once.
    rig.client("203.0.113.1:5002");
    assert_eq!(rig.allocate(&[token(reserved)]).code(), 508);
}

#[test]
fn a_malformed_reservation_token_is_400() {
    // RFC 8656 §18.10: 8 bytes; RFC 8489 §14.8: what is malformed is 400.
    for length in [0, 4, 7, 9, 16] {
        assert_eq!(Rig::new().allocate(&[raw(RESERVATION_TOKEN, &vec![0; length])]).code(), 400, "{length}");
    }
}

#[test]
fn requested_and_additional_family_together_are_400() {
    // RFC 8656 §7.2, item 6.
    for (requested, more) in [(1, 2), (2, 2), (1, 1), (2, 1)] {
        let mut rig = Rig::new();
        assert_eq!(rig.allocate(&[family(requested), additional(more)]).code(), 400);
        assert_eq!(rig.allocate(&[additional(more), family(requested)]).code(), 400);
        assert_eq!(rig.server.allocations(), 0);
    }
}

#[test]
fn an_unsupported_family_is_440() {
    // RFC 8656 §7.2, item 7: the server MUST answer 440 for a family it does not support.
    let mut rig = Rig::new();
    rig.desk.without = Some(Family::V6);
    assert_eq!(rig.allocate(&[family(2)]).code(), 440);
    rig.desk.without = Some(Family::V4);
    assert_eq!(rig.allocate(&[family(1)]).code(), 440);
    // And so is one that nobody has assigned.
    for number in [0, 3, 255] {
        assert_eq!(rig.allocate(&[family(number)]).code(), 440);
    }
}

#[test]
fn without_a_requested_family_ipv4_is_440_where_there_is_none() {
    // RFC 8656 §7.2, item 7: REQUESTED-ADDRESS-FAMILY absent and no IPv4: MUST be 440.
    let mut rig = Rig::new();
    rig.desk.without = Some(Family::V4);
    assert_eq!(rig.allocate(&[]).code(), 440);
}

#[test]
fn without_a_requested_family_it_is_ipv4() {
    // RFC 8656 §7.2, item 7: the server MUST allocate an IPv4 address, also for a client on IPv6.
    for client in ["203.0.113.1:5000", "[2001:db8::9]:5000"] {
        let mut rig = Rig::new();
        rig.client(client);
        let relayed = rig.allocate(&[]).answer().xor_address(XOR_RELAYED_ADDRESS).expect("there");
        assert!(relayed.is_ipv4());
    }
}

#[test]
fn the_requested_family_is_what_is_allocated() {
    // RFC 8656 §7.1 and §7.2, item 7.
    for (number, v6) in [(1, false), (2, true)] {
        let mut rig = Rig::new();
        let answer = rig.allocate(&[family(number)]).answer();
        assert_eq!(answer.code(), 0);
        assert_eq!(answer.xor_addresses(XOR_RELAYED_ADDRESS).len(), 1);
        assert_eq!(answer.xor_address(XOR_RELAYED_ADDRESS).expect("there").is_ipv6(), v6);
    }
}

#[test]
fn a_pair_of_ports_for_two_families_is_400() {
    // RFC 8656 §7.2, item 8: EVEN-PORT with the R bit and ADDITIONAL-ADDRESS-FAMILY.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[even_port(true), additional(2)]).code(), 400);
    assert_eq!(rig.allocate(&[additional(2), even_port(true)]).code(), 400);
    assert_eq!((rig.server.allocations(), rig.desk.reserved.len()), (0, 0));
}

#[test]
fn no_port_is_508() {
    // RFC 8656 §7.2, items 8 and 9: what cannot be satisfied is 508, and recovers.
    for items in [vec![], vec![even_port(false)], vec![even_port(true)], vec![family(2)], vec![additional(2)]] {
        let mut rig = Rig::new();
        rig.desk.exhausted = true;
        assert_eq!(rig.allocate(&items).code(), 508, "{items:?}");
        assert_eq!(rig.server.allocations(), 0);
        rig.desk.exhausted = false;
        assert_eq!(rig.allocate(&items).code(), 0, "{items:?}");
    }
}

#[test]
fn additional_family_ipv4_is_400() {
    // RFC 8656 §7.2, item 9: value 0x01 is 400. §18.11: only 0x02 is defined.
    for number in [0, 1, 3, 255] {
        assert_eq!(Rig::new().allocate(&[additional(number)]).code(), 400, "{number}");
    }
    assert_eq!(Rig::new().allocate(&[raw(ADDITIONAL_ADDRESS_FAMILY, &[2])]).code(), 400);
}

#[test]
fn quota_goes_by_user_name_not_by_address() {
    // RFC 8656 §7.2, item 10: the quota SHOULD be defined by the user name, not by the transport address.
    let mut rig = Rig::with(|settings| {
        settings.static_users.push(turn_core::StaticUser { username: b"eve".to_vec(), password: b"eve".to_vec() });
    });
    rig.desk.quota = Some(1);
    assert_eq!(rig.allocate(&[]).code(), 0);
    rig.client("203.0.113.99:5000");
    assert_eq!(rig.allocate(&[]).code(), 486);
    rig.client("203.0.113.1:5001");
    rig.user(b"eve", b"eve");
    assert_eq!(rig.allocate(&[]).code(), 0);
}

#[test]
fn a_token_is_good_for_any_client_and_transport() {
    // RFC 8656 §7.2: a reservation is server-wide: other client, other protocol, other server address.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[even_port(true)]).answer();
    let even = answer.xor_address(XOR_RELAYED_ADDRESS).expect("there");
    let reserved: [u8; 8] = answer.find(RESERVATION_TOKEN).expect("a token").try_into().expect("8 bytes");
    let mut rig = rig.on_stream();
    rig.client("203.0.113.99:777");
    rig.from.server = addr("198.51.100.2:443");
    let relayed = rig.allocate(&[token(reserved)]).answer().xor_address(XOR_RELAYED_ADDRESS).expect("there");
    assert_eq!((relayed.ip(), relayed.port()), (even.ip(), even.port() + 1));
}

#[test]
fn an_even_port_is_asked_for_and_given() {
    // RFC 8656 §7.2: EVEN-PORT with R=0 gives an even port, and reserves nothing.
    let mut rig = Rig::new();
    for port in 5000..5005 {
        rig.client(&format!("203.0.113.1:{port}"));
        let answer = rig.allocate(&[even_port(false)]).answer();
        assert!(answer.xor_address(XOR_RELAYED_ADDRESS).expect("there").port().is_multiple_of(2));
        assert!(answer.find(RESERVATION_TOKEN).is_none());
    }
    assert!(rig.desk.bindings.iter().all(|binding| binding.port == PortRequest::Even));
}

#[test]
fn a_pair_is_reserved_under_a_token() {
    // RFC 8656 §7.2: EVEN-PORT with R=1 gives N, keeps N+1 on the same IP, and tells its token.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[even_port(true)]).answer();
    let even = answer.xor_address(XOR_RELAYED_ADDRESS).expect("there");
    assert!(even.port().is_multiple_of(2));
    let reserved = answer.find(RESERVATION_TOKEN).expect("a token");
    let (next, _) = rig.desk.reserved[reserved];
    assert_eq!((next.ip(), next.port()), (even.ip(), even.port() + 1));
}

#[test]
fn only_the_first_bit_of_even_port_counts() {
    // RFC 8656 §18.7: R is the top bit, the other seven MUST be ignored.
    for (value, reserves) in [(0x7F, false), (0x80, true), (0xFF, true), (0, false)] {
        let answer = Rig::new().allocate(&[raw(EVEN_PORT, &[value])]).answer();
        assert_eq!(answer.find(RESERVATION_TOKEN).is_some(), reserves, "{value:#x}");
    }
    for length in [0, 2, 4] {
        assert_eq!(Rig::new().allocate(&[raw(EVEN_PORT, &vec![0; length])]).code(), 400, "{length}");
    }
}

#[test]
fn the_lifetime_is_computed_as_said() {
    // RFC 8656 §7.2: min(proposed, maximum) if that is above the default, else the default.
    let cases = [
        (None, 600),
        (Some(0), 600),
        (Some(1), 600),
        (Some(599), 600),
        (Some(600), 600),
        (Some(601), 601),
        (Some(3599), 3599),
        (Some(3600), 3600),
        (Some(3601), 3600),
        (Some(u32::MAX), 3600),
    ];
    for (proposed, expected) in cases {
        let mut rig = Rig::new();
        let items: Vec<Item> = proposed.into_iter().map(lifetime).collect();
        assert_eq!(rig.allocate(&items).answer().lifetime(), Some(expected), "{proposed:?}");
        rig.pass_without_timer(u64::from(expected) - 1);
        rig.forget_nonce();
        assert_eq!(rig.permit("192.0.2.1:0"), 0, "{proposed:?} lives");
        rig.pass_without_timer(1);
        assert_eq!(rig.permit("192.0.2.1:0"), 437, "{proposed:?} has ended");
    }
}

#[test]
fn the_maximum_lifetime_is_an_hour_by_default() {
    // RFC 8656 §7.2: RECOMMENDED to be no more than 3600 s.
    assert!(turn_core::Limits::default().max_lifetime <= 3600);
}

#[test]
fn a_malformed_lifetime_is_400() {
    // RFC 8656 §18.2: 4 bytes; RFC 8489 §14.8: what is malformed is 400.
    for length in [0, 1, 3, 5, 8] {
        assert_eq!(Rig::new().allocate(&[raw(LIFETIME, &vec![0; length])]).code(), 400, "{length}");
        assert_eq!(Rig::allocated().refresh(&[raw(LIFETIME, &vec![0; length])]).code(), 400, "{length}");
    }
    for length in [0, 1, 3, 5, 8] {
        let item = raw(REQUESTED_ADDRESS_FAMILY, &vec![1; length]);
        assert_eq!(Rig::new().allocate(&[item]).code(), 400, "{length}");
    }
}

#[test]
fn a_success_has_what_it_must_have() {
    // RFC 8656 §7.2: XOR-RELAYED-ADDRESS, LIFETIME, XOR-MAPPED-ADDRESS, and RESERVATION-TOKEN only if one was made.
    for client in ["203.0.113.1:5000", "[2001:db8::9]:5000"] {
        let mut rig = Rig::new();
        rig.client(client);
        let answer = rig.allocate(&[]).answer();
        assert_eq!(answer.xor_address(XOR_RELAYED_ADDRESS), Some(rig.relayed().advertised));
        assert_eq!(answer.xor_address(XOR_MAPPED_ADDRESS), Some(addr(client)));
        assert_eq!(answer.lifetime(), Some(600));
        assert!(answer.find(RESERVATION_TOKEN).is_none());
        let key = rig.key();
        assert!(answer.signed_with(&key));
    }
}

#[test]
fn a_retransmitted_allocate_makes_no_second_allocation() {
    // RFC 8656 §7.2, note: the same transaction gets success again, with the token, and the time that is left.
    let mut rig = Rig::new();
    let packet = rig.signed(ALLOCATE, &[transport(17), even_port(true), lifetime(1000)]);
    let first = rig.hand_in(&packet).answer();
    assert_eq!(first.code(), 0);
    for _ in 0..5 {
        assert_eq!(rig.hand_in(&packet).answer(), first);
    }
    rig.pass(40);
    let later = rig.hand_in(&packet).answer();
    assert_eq!(later.find(RESERVATION_TOKEN), first.find(RESERVATION_TOKEN));
    assert_eq!(later.xor_address(XOR_RELAYED_ADDRESS), first.xor_address(XOR_RELAYED_ADDRESS));
    assert_eq!(later.lifetime(), Some(960));
    assert_eq!((rig.server.allocations(), rig.desk.bindings.len(), rig.desk.reserved.len()), (1, 1, 1));
}

#[test]
fn a_transaction_id_of_another_client_is_not_a_retransmission() {
    // RFC 8656 §5: same 5-tuple *and* same transaction id.
    let mut rig = Rig::new();
    let id = rig.transaction();
    let mut relayed = Vec::new();
    for port in [5000, 5001] {
        rig.client(&format!("203.0.113.1:{port}"));
        let signer = rig.signer();
        let builder = crate::support::stun::Builder::new(crate::support::stun::Class::Request, ALLOCATE, id);
        let packet = builder.item(&transport(17)).items(&signer.items()).integrity(&signer.key()).bytes();
        relayed.push(rig.hand_in(&packet).answer().xor_address(XOR_RELAYED_ADDRESS).expect("there"));
    }
    assert_ne!(relayed[0], relayed[1]);
}

#[test]
fn a_datagram_of_any_transport_gets_the_same_checks() {
    // RFC 8656 §7.2 knows no difference between transports.
    for transport_of_client in [Transport::Tcp, Transport::Tls, Transport::Dtls] {
        let mut rig = Rig::new();
        if transport_of_client.is_stream() {
            rig = rig.on_stream();
        }
        rig.from.transport = transport_of_client;
        assert_eq!(rig.ask(ALLOCATE, &[]).code(), 400);
        assert_eq!(rig.ask(ALLOCATE, &[transport(1)]).code(), 442);
        assert_eq!(rig.allocate(&[]).code(), 0);
        assert_eq!(rig.allocate(&[]).code(), 437);
    }
}
