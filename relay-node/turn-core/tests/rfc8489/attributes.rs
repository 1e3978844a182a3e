//! §14: attributes.

use crate::support::rig::Rig;
use crate::support::stun::{
    ALLOCATE, BINDING, Builder, Class, LIFETIME, SOFTWARE, XOR_PEER_ADDRESS, lifetime, raw, transport, xor_address,
};
use crate::support::{addr, rig::Outcome};

#[test]
fn padding_is_ignored() {
    // RFC 8489 §14: padding bits MUST be ignored by the receiver. (What is sent is checked wherever a test reads it.)
    let mut rig = Rig::new();
    for length in 1..4 {
        let mut packet =
            Builder::new(Class::Request, BINDING, [9; 12]).attribute(SOFTWARE, &vec![b'x'; length]).bytes();
        let end = packet.len();
        packet[24 + length..end].fill(0xFF);
        assert_eq!(rig.hand_in(&packet).code(), 0);
    }
}

#[test]
fn the_first_of_several_counts() {
    // RFC 8489 §14: an attribute that appears again SHOULD NOT be looked at, unless its RFC says so.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[lifetime(700), lifetime(900)]).answer();
    assert_eq!(answer.lifetime(), Some(700));
    assert_eq!(rig.refresh(&[lifetime(800), lifetime(0)]).answer().lifetime(), Some(800));
    assert_eq!(rig.refresh(&[raw(LIFETIME, &[1]), lifetime(800)]).code(), 400);
    assert_eq!(Rig::new().ask(ALLOCATE, &[transport(17), transport(1)]).code(), 0);
    assert_eq!(Rig::new().ask(ALLOCATE, &[transport(1), transport(17)]).code(), 442);
}

#[test]
fn the_first_byte_of_an_address_is_ignored() {
    // RFC 8489 §14.1: the first 8 bits MUST be ignored by receivers.
    let mut rig = Rig::allocated();
    let packet = {
        let id = rig.transaction();
        let signer = rig.signer();
        let mut value = xor_address(addr("192.0.2.1:9"), id);
        value[0] = 0xFF;
        let builder = Builder::new(Class::Request, 0x008, id).attribute(XOR_PEER_ADDRESS, &value);
        builder.items(&signer.items()).integrity(&signer.key()).bytes()
    };
    assert_eq!(rig.hand_in(&packet).code(), 0);
    assert!(matches!(rig.send("192.0.2.1:9", b"x"), Outcome::Peer { .. }));
}

#[test]
fn an_address_has_the_length_of_its_family() {
    // RFC 8489 §14.1: 32 bits for IPv4, 128 for IPv6: MUST.
    for (family, octets) in [(1, 16), (2, 4), (1, 3), (1, 5), (2, 15), (2, 17), (0, 4), (3, 4)] {
        let mut rig = Rig::allocated();
        let value = [&[0, family, 0, 9][..], &vec![0x55; octets]].concat();
        assert_eq!(rig.ask(0x008, &[raw(XOR_PEER_ADDRESS, &value)]).code(), 400, "{family} {octets}");
    }
}

#[test]
fn names_are_opaque_bytes() {
    // RFC 8489 §14.3, abuse.md B: any bytes in USERNAME are read, and are nobody's.
    for name in [&b"a\0b"[..], b"%s%n", b"../../etc", b"a\nb", b"\xFF\xC0", &[b'x'; 508]] {
        let mut rig = Rig::new();
        rig.user(name, b"password");
        assert_eq!(rig.allocate(&[]).code(), 401, "{name:?}");
    }
}

#[test]
fn software_is_short_text() {
    // RFC 8489 §14.14: fewer than 128 characters of UTF-8, SHOULD name the program and its version.
    let answer = Rig::new().allocate(&[]).answer();
    let text = std::str::from_utf8(answer.find(SOFTWARE).expect("there")).expect("UTF-8");
    assert!(text.starts_with("turnpike/") && text.chars().count() < 128);
}
