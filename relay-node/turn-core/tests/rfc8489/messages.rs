//! §5, §6, §11, §12: messages, requests, indications, the Binding method.

use crate::support::addr;
use crate::support::rig::Rig;
use crate::support::stun::{
    ALLOCATE, BINDING, Builder, CHANNEL_BIND, CREATE_PERMISSION, Class, ERROR_CODE, Item, MAPPED_ADDRESS,
    MESSAGE_INTEGRITY, NONCE, REALM, REFRESH, UNKNOWN_ATTRIBUTES, USERNAME, XOR_MAPPED_ADDRESS, additional, data,
    message_type, raw, transport,
};

fn binding() -> Vec<u8> {
    Builder::new(Class::Request, BINDING, [9; 12]).bytes()
}

/// What a Binding request with one change gets: whether it is answered.
#[track_caller]
fn is_answered(packet: &[u8]) -> bool {
    !Rig::new().hand_in(packet).is_silence()
}

#[test]
fn the_first_two_bits_are_zero() {
    // RFC 8489 §5: they MUST be zeroes; anything else is not STUN.
    for bits in [0x40, 0x80, 0xC0] {
        let mut packet = binding();
        packet[0] |= bits;
        assert!(!is_answered(&packet));
    }
    assert!(is_answered(&binding()));
}

#[test]
fn class_and_method_are_interleaved() {
    // RFC 8489 §5, Figure 3: an answer has the request's method and class 0b10 or 0b11.
    let answer = Rig::new().hand_in(&binding()).answer();
    assert_eq!(answer.bytes[..2], message_type(Class::Success, BINDING).to_be_bytes());
    assert_eq!(answer.bytes[..2], [0x01, 0x01]);
    for (method, expected) in [
        (ALLOCATE, [0x01, 0x13]),
        (REFRESH, [0x01, 0x14]),
        (CREATE_PERMISSION, [0x01, 0x18]),
        (CHANNEL_BIND, [0x01, 0x19]),
    ] {
        let answer = Rig::new().ask_unsigned(method, &[]).answer();
        assert_eq!(answer.bytes[..2], expected);
    }
}

#[test]
fn the_magic_cookie_is_fixed() {
    // RFC 8489 §5: it MUST be 0x2112A442.
    for byte in 4..8 {
        let mut packet = binding();
        packet[byte] ^= 1;
        assert!(!is_answered(&packet));
    }
}

#[test]
fn an_answer_has_the_transaction_id_of_its_request() {
    // RFC 8489 §5: success and error responses MUST carry it.
    let mut rig = Rig::new();
    for id in [[0; 12], [0xFF; 12], *b"abcdefghijkl"] {
        for method in [BINDING, ALLOCATE, REFRESH] {
            let packet = Builder::new(Class::Request, method, id).bytes();
            assert_eq!(rig.hand_in(&packet).answer().transaction, id);
        }
    }
}

#[test]
fn the_length_is_that_of_the_message() {
    // RFC 8489 §5: it MUST be the size without the header, a multiple of 4. §6.3: sensible, else discarded.
    for length in [1_u16, 2, 3, 4, 8, 0xFFFC, 0xFFFF] {
        let mut packet = binding();
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        assert!(!is_answered(&packet), "{length}");
    }
    for extra in 1..8 {
        let mut packet = binding();
        packet.extend(vec![0; extra]);
        assert!(!is_answered(&packet), "{extra} bytes more");
    }
    for length in 0..20 {
        assert!(!is_answered(&binding()[..length]), "cut at {length}");
    }
}

#[test]
fn an_attribute_ends_inside_the_message() {
    // RFC 8489 §6.3: any error in the grammar: silently discarded.
    for (length, value) in [(5_u16, 4), (4, 0), (0xFFFF, 8), (9, 8)] {
        let mut packet = Builder::new(Class::Request, BINDING, [9; 12]).attribute(0x8022, &vec![0; value]).bytes();
        packet[22..24].copy_from_slice(&length.to_be_bytes());
        assert!(!is_answered(&packet), "{length} of {value}");
    }
}

#[test]
fn an_answer_fits_a_minimal_path() {
    // RFC 8489 §6.1: with an unknown path MTU messages SHOULD stay below 576 bytes of IPv4 packet (548 of STUN).
    let mut rig = Rig::new();
    let mut longest = 0;
    let mut note = |answer: crate::support::stun::Read| longest = longest.max(answer.bytes.len());
    note(rig.ask_unsigned(ALLOCATE, &[]).answer());
    note(rig.allocate(&[additional(2), crate::support::stun::even_port(false)]).answer());
    note(rig.allocate(&[]).answer());
    note(rig.refresh(&[]).answer());
    let many: Vec<Item> = (0x7000..0x7100).map(|kind| raw(kind, &[])).collect();
    note(rig.refresh(&many).answer());
    note(rig.ask_unsigned(BINDING, &many).answer());
    rig.pass(4000);
    note(rig.refresh(&[]).answer());
    assert!(longest < 548, "{longest}");
}

#[test]
fn an_unknown_optional_attribute_is_ignored() {
    // RFC 8489 §6.3: unknown comprehension-optional attributes MUST be ignored.
    for kind in [0x8005, 0x8021, 0x9000, 0xC000, 0xFFFF] {
        let mut rig = Rig::new();
        let item = raw(kind, &[1, 2, 3]);
        assert_eq!(rig.ask_unsigned(BINDING, std::slice::from_ref(&item)).code(), 0, "{kind:#x}");
        assert_eq!(rig.allocate(std::slice::from_ref(&item)).code(), 0, "{kind:#x}");
        assert_eq!(rig.refresh(&[item]).code(), 0, "{kind:#x}");
    }
}

#[test]
fn a_known_attribute_that_is_not_expected_is_ignored() {
    // RFC 8489 §6.3: known-but-unexpected attributes SHOULD be ignored.
    let unexpected = [
        raw(MAPPED_ADDRESS, &[0, 1, 0, 0, 1, 2, 3, 4]),
        raw(XOR_MAPPED_ADDRESS, &[]),
        raw(ERROR_CODE, &[0, 0, 4, 0]),
        raw(UNKNOWN_ATTRIBUTES, &[0, 1]),
        data(b"x"),
        raw(0x000C, &[0x40, 0, 0, 0]),
    ];
    for item in unexpected {
        let mut rig = Rig::new();
        assert_eq!(rig.ask_unsigned(BINDING, std::slice::from_ref(&item)).code(), 0, "{item:?}");
        assert_eq!(rig.allocate(std::slice::from_ref(&item)).code(), 0, "{item:?}");
        assert_eq!(rig.refresh(std::slice::from_ref(&item)).code(), 0, "{item:?}");
    }
}

#[test]
fn an_unknown_method_is_silently_discarded() {
    // RFC 8489 §6.3: a method that is not supported; also those that have no requests (Send, Data).
    for method in [0x000, 0x002, 0x005, 0x006, 0x007, 0x00D, 0x7FF, 0xFFF] {
        assert!(Rig::allocated().ask(method, &[]).is_silence(), "{method:#x}");
        assert!(Rig::allocated().ask_unsigned(method, &[]).is_silence(), "{method:#x}");
    }
}

#[test]
fn a_class_that_the_method_does_not_have_is_silently_discarded() {
    // RFC 8489 §6.3: the class must be allowed for the method; answers that nobody asked for are too.
    for method in [BINDING, ALLOCATE, REFRESH, CREATE_PERMISSION, CHANNEL_BIND] {
        for class in [Class::Success, Class::Error, Class::Indication] {
            let packet = Builder::new(class, method, [3; 12]).bytes();
            assert!(Rig::allocated().hand_in(&packet).is_silence(), "{class:?} {method:#x}");
        }
    }
}

#[test]
fn an_unknown_required_attribute_is_420_with_its_number() {
    // RFC 8489 §6.3.1 and §14.8: 420, and the server MUST list the unknown attributes, each in UNKNOWN-ATTRIBUTES.
    let mut rig = Rig::new();
    for kind in [0x0000, 0x0002, 0x0030, 0x5000, 0x7FFF] {
        let items = [raw(kind, &[1, 2, 3, 4, 5]), raw(0x8FFF, &[])];
        let answer = rig.ask_unsigned(BINDING, &items).answer();
        assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![kind]));
        let answer = rig.ask(ALLOCATE, &[&[transport(17)], &items[..]].concat()).answer();
        assert_eq!((answer.code(), answer.unknown_attributes()), (420, vec![kind]));
        assert_eq!(rig.server.allocations(), 0);
    }
    let items = [raw(0x7001, &[]), raw(0x7002, &[]), raw(0x7001, &[])];
    assert_eq!(rig.ask_unsigned(BINDING, &items).answer().unknown_attributes(), [0x7001, 0x7002]);
}

#[test]
fn unknown_attributes_are_looked_for_after_authentication() {
    // RFC 8489 §6.3: once the authentication checks are done.
    let mut rig = Rig::new();
    assert_eq!(rig.ask_unsigned(ALLOCATE, &[raw(0x7FFF, &[])]).code(), 401);
    rig.user(b"user", b"wrong");
    assert_eq!(rig.allocate(&[raw(0x7FFF, &[])]).code(), 401);
}

#[test]
fn a_retransmission_gets_an_equivalent_answer() {
    // RFC 8489 §6.3.1: the state of client and server MUST be as if one answer had arrived, whichever it was. Binding
    // is idempotent: the answer is the same.
    let mut rig = Rig::new();
    let first = rig.hand_in(&binding()).answer();
    for _ in 0..4 {
        assert_eq!(rig.hand_in(&binding()).answer(), first);
    }
    // And so are refusals, whose nonce is that of this second.
    let packet = rig.unsigned(ALLOCATE, &[transport(17)]);
    let first = rig.hand_in(&packet).answer();
    assert_eq!(rig.hand_in(&packet).answer(), first);
}

#[test]
fn a_success_of_binding_has_the_source_address() {
    // RFC 8489 §6.3.1.1: XOR-MAPPED-ADDRESS is the source of the request.
    for client in ["203.0.113.1:1", "203.0.113.1:65535", "[2001:db8::9]:5000", "[2001:0:1::2]:9"] {
        let mut rig = Rig::new();
        rig.client(client);
        let answer = rig.hand_in(&binding()).answer();
        assert_eq!(answer.code(), 0);
        assert_eq!(answer.xor_addresses(XOR_MAPPED_ADDRESS), [addr(client)]);
    }
}

#[test]
fn an_error_has_a_code_and_a_reason() {
    // RFC 8489 §6.3.1.1: ERROR-CODE MUST be there; the reason SHOULD suit it.
    let mut rig = Rig::new();
    let cases = [
        (rig.ask_unsigned(ALLOCATE, &[]).answer(), 401, "Unauthenticated"),
        (rig.ask(ALLOCATE, &[]).answer(), 400, "Bad Request"),
        (rig.ask(ALLOCATE, &[transport(1)]).answer(), 442, "Unsupported Transport Protocol"),
        (rig.refresh(&[]).answer(), 437, "Allocation Mismatch"),
        (rig.refresh(&[raw(0x7FFF, &[])]).answer(), 420, "Unknown Attribute"),
    ];
    for (answer, code, reason) in cases {
        assert_eq!(answer.code(), code);
        let value = answer.find(ERROR_CODE).expect("there");
        assert_eq!(&value[4..], reason.as_bytes());
    }
}

#[test]
fn an_indication_is_never_answered() {
    // RFC 8489 §6.3.2: a Binding indication is discarded, with unknown attributes too.
    for items in [vec![], vec![raw(0x7FFF, &[])], vec![raw(0x8FFF, &[])], vec![raw(USERNAME, b"x")]] {
        assert!(Rig::new().tell(BINDING, &items).is_silence());
    }
}

#[test]
fn binding_is_not_authenticated() {
    // RFC 8489 §12: the server SHOULD NOT use a credential mechanism for Binding; a signature in one is not looked at.
    let mut rig = Rig::new();
    assert_eq!(rig.ask_unsigned(BINDING, &[]).code(), 0);
    rig.user(b"user", b"wrong");
    let answer = rig.ask(BINDING, &[]).answer();
    assert_eq!(answer.code(), 0);
    assert!(![MESSAGE_INTEGRITY, NONCE, REALM, USERNAME].iter().any(|kind| answer.has(*kind)));
}

#[test]
fn binding_is_served_on_udp_and_tcp() {
    // RFC 8489 §12: the server MUST support the Binding method, UDP and TCP.
    assert_eq!(Rig::new().ask_unsigned(BINDING, &[]).code(), 0);
    assert_eq!(Rig::new().on_stream().ask_unsigned(BINDING, &[]).code(), 0);
}

#[test]
fn fingerprint_is_not_required() {
    // RFC 8489 §12: the server MAY use FINGERPRINT but MUST NOT require it.
    let with = Builder::new(Class::Request, BINDING, [9; 12]).fingerprint().bytes();
    assert!(is_answered(&with) && is_answered(&binding()));
}

#[test]
fn binding_is_served_before_there_are_keys() {
    // RFC 8489 §12: it needs no credentials, so it needs no settings either.
    let mut rig = Rig::with(|settings| *settings = turn_core::Settings::default());
    assert_eq!(rig.ask_unsigned(BINDING, &[]).code(), 0);
}
