//! RFC 5780 (NAT behaviour discovery): what it demands of a server, one test a rule.

mod support;

use support::rig::Rig;
use support::stun::{
    ALTERNATE_SERVER, BINDING, CHANGE_REQUEST, MAPPED_ADDRESS, OTHER_ADDRESS, PADDING, RESPONSE_ORIGIN, RESPONSE_PORT,
    Read, XOR_MAPPED_ADDRESS, raw,
};
use support::{CLIENT, addr};
use turn_core::{DiscoveryPlace, FiveTuple, Input, IpMeta, ListenerId, NatDiscovery, Out, Path, Transport, Verdict};

#[test]
fn without_a_second_address_there_is_no_other_address() {
    // RFC 5780 §6 and §7.4: OTHER-ADDRESS MUST NOT be in a response where there is no second IP.
    let answer = Rig::new().ask_unsigned(BINDING, &[]).answer();
    assert!(answer.has(XOR_MAPPED_ADDRESS));
    assert!(!answer.has(OTHER_ADDRESS) && !answer.has(RESPONSE_ORIGIN));
}

#[test]
fn without_a_second_address_change_request_is_420() {
    // RFC 5780 §6 and §6.1: a request with CHANGE-REQUEST MUST be answered with 420.
    for flags in [0, 2, 4, 6] {
        let answer = Rig::new().ask_unsigned(BINDING, &[raw(CHANGE_REQUEST, &[0, 0, 0, flags])]).answer();
        assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![CHANGE_REQUEST]));
    }
}

#[test]
fn padding_and_response_port_are_declined() {
    // RFC 5780 §5, §7.5, §7.6: support is optional; unknown, they are 420 (RFC 8489 §6.3.1). With both, MUST NOT be
    // processed.
    let (padding, port) = (raw(PADDING, &[0; 1400]), raw(RESPONSE_PORT, &[0x13, 0x88, 0, 0]));
    for (items, expected) in [
        (vec![padding.clone()], vec![PADDING]),
        (vec![port.clone()], vec![RESPONSE_PORT]),
        (vec![padding, port], vec![PADDING, RESPONSE_PORT]),
    ] {
        let answer = Rig::new().ask_unsigned(BINDING, &items).answer();
        assert_eq!((answer.code(), answer.unknown_attributes()), (420, expected));
    }
}

/// Two IPs with two ports each.
const PLACES: [&str; 4] = ["198.51.100.1:3478", "198.51.100.1:3479", "198.51.100.2:3478", "198.51.100.2:3479"];

fn discovering() -> Rig {
    let mut rig = Rig::new();
    let place = |index: usize| DiscoveryPlace {
        bound: addr(PLACES[index]),
        advertised: addr(PLACES[index]),
        listener: ListenerId(index as u16),
    };
    rig.server.set_nat_discovery(NatDiscovery([place(0), place(1), place(2), place(3)]));
    rig
}

/// A Binding request to one of the places: from which it is answered, and the answer.
fn ask(rig: &mut Rig, to: usize, flags: Option<u8>) -> (usize, Read) {
    let items: Vec<_> = flags.map(|flags| raw(CHANGE_REQUEST, &[0, 0, 0, flags])).into_iter().collect();
    let packet = rig.unsigned(BINDING, &items);
    let from = FiveTuple { transport: Transport::Udp, client: addr(CLIENT), server: addr(PLACES[to]) };
    let path = Path::Listener(ListenerId(to as u16));
    let input = Input::FromClient { from, path, packet: &packet, ip: IpMeta::default() };
    let verdict = rig.server.handle_input(rig.clock.now(), input, &mut rig.desk);
    let Verdict::Reply { out: Out::Client { to: back, path: Path::Listener(ListenerId(listener)) } } = verdict else {
        panic!("{verdict:?}")
    };
    assert_eq!(back.client, from.client);
    let at = usize::from(listener);
    assert_eq!(back.server, addr(PLACES[at]), "the socket is the one of the address");
    (at, Read::new(rig.server.reply()))
}

fn plain_address(read: &Read, kind: u16) -> std::net::SocketAddr {
    let value = read.find(kind).expect("there");
    let octets: [u8; 4] = value[4..].try_into().expect("IPv4");
    (octets, u16::from_be_bytes([value[2], value[3]])).into()
}

#[test]
fn both_mapped_addresses_are_there() {
    // RFC 5780 §6.1: the server MUST include both MAPPED-ADDRESS and XOR-MAPPED-ADDRESS.
    for to in 0..4 {
        let (_, answer) = ask(&mut discovering(), to, None);
        assert_eq!(answer.xor_address(XOR_MAPPED_ADDRESS), Some(addr(CLIENT)));
        assert_eq!(plain_address(&answer, MAPPED_ADDRESS), addr(CLIENT));
    }
}

#[test]
fn the_answer_comes_from_where_it_was_asked_to() {
    // RFC 5780 §6.1, Table 1: change port (0x2) and change IP (0x4) MUST be obeyed, each alone and both.
    for to in 0..4 {
        for (flags, expected) in [(None, to), (Some(0), to), (Some(2), to ^ 1), (Some(4), to ^ 2), (Some(6), to ^ 3)] {
            let (at, answer) = ask(&mut discovering(), to, flags);
            assert_eq!((at, answer.code()), (expected, 0), "{flags:?} at {to}");
        }
    }
}

#[test]
fn response_origin_is_the_source_of_the_answer() {
    // RFC 5780 §6.1: RESPONSE-ORIGIN MUST be there, with the address the answer is sent from.
    for to in 0..4 {
        for flags in [None, Some(2), Some(4), Some(6)] {
            let (at, answer) = ask(&mut discovering(), to, flags);
            assert_eq!(plain_address(&answer, RESPONSE_ORIGIN), addr(PLACES[at]));
        }
    }
}

#[test]
fn other_address_is_the_opposite_whatever_is_asked() {
    // RFC 5780 §6.1: OTHER-ADDRESS MUST be there: Ca and Cp, regardless of the value of the CHANGE-REQUEST flags.
    for to in 0..4 {
        for flags in [None, Some(0), Some(2), Some(4), Some(6)] {
            let (_, answer) = ask(&mut discovering(), to, flags);
            assert_eq!(plain_address(&answer, OTHER_ADDRESS), addr(PLACES[to ^ 3]));
        }
    }
}

#[test]
fn reserved_flags_are_ignored() {
    // RFC 5780 §7.2: only the bits of change IP and change port mean anything.
    for (flags, expected) in [(0x01, 0), (0x08, 0), (0xF9, 0), (0xFF, 3)] {
        assert_eq!(ask(&mut discovering(), 0, Some(flags)).0, expected, "{flags:#x}");
    }
}

#[test]
fn no_alternate_server_beside_them() {
    // RFC 5780 §6.1: ALTERNATE-SERVER MUST NOT be included with any of these attributes.
    assert!(!ask(&mut discovering(), 0, None).1.has(ALTERNATE_SERVER));
}

#[test]
fn padding_and_response_port_are_declined_here_too() {
    // RFC 5780 §5: both are optional where there is a second address as well.
    for kind in [PADDING, RESPONSE_PORT] {
        let answer = discovering().ask_unsigned(BINDING, &[raw(kind, &[0; 4])]).answer();
        assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![kind]));
    }
}

#[test]
fn streams_have_no_other_address() {
    // RFC 5780 §6: no pair of ports is allocated for TCP and TLS here, so nothing is offered: OTHER-ADDRESS absent, 420.
    let mut rig = discovering().on_stream();
    assert!(!rig.ask_unsigned(BINDING, &[]).answer().has(OTHER_ADDRESS));
    assert_eq!(rig.ask_unsigned(BINDING, &[raw(CHANGE_REQUEST, &[0, 0, 0, 6])]).code(), 420);
}
