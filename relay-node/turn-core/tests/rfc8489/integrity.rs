//! §9 and §14.5 to §14.7: what is signed, and what is not.

use crate::support::rig::Rig;
use crate::support::stun::{
    ALLOCATE, BINDING, Builder, Class, FINGERPRINT, Item, MESSAGE_INTEGRITY, REFRESH, additional, lifetime, raw,
    transport,
};

fn length_of(packet: &mut [u8]) {
    let length = (packet.len() - 20) as u16;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
}

/// A signed request with attributes behind MESSAGE-INTEGRITY.
fn with_tail(rig: &mut Rig, method: u16, items: &[Item], tail: &[Item]) -> Vec<u8> {
    let signer = rig.signer();
    let id = rig.transaction();
    let builder = Builder::new(Class::Request, method, id).items(items).items(&signer.items());
    builder.integrity(&signer.key()).items(tail).bytes()
}

#[test]
fn what_follows_message_integrity_is_ignored() {
    // RFC 8489 §9: agents MUST ignore all attributes that follow MESSAGE-INTEGRITY, but for the other integrity and
    // FINGERPRINT: known, unknown, required or not.
    let mut rig = Rig::new();
    for tail in [additional(2), additional(1), raw(0x7FFF, &[1]), raw(0x0019, &[6, 0, 0, 0]), lifetime(3600)] {
        let packet = with_tail(&mut rig, ALLOCATE, &[transport(17)], std::slice::from_ref(&tail));
        let answer = rig.hand_in(&packet).answer();
        assert_eq!((answer.code(), answer.lifetime()), (0, Some(600)), "{tail:?}");
        assert!(!answer.has(0x8001), "{tail:?}");
        let packet = with_tail(&mut rig, REFRESH, &[], &[lifetime(3000)]);
        assert_eq!(rig.hand_in(&packet).answer().lifetime(), Some(600));
        let packet = with_tail(&mut rig, REFRESH, &[lifetime(0)], &[lifetime(3000)]);
        assert_eq!(rig.hand_in(&packet).answer().lifetime(), Some(0));
    }
}

#[test]
fn credentials_behind_the_integrity_do_not_count() {
    // RFC 8489 §9: they follow it, so the request has none: 400.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let builder = Builder::new(Class::Request, ALLOCATE, [4; 12]).item(&transport(17));
    let packet = builder.integrity(&signer.key()).items(&signer.items()).bytes();
    assert_eq!(rig.hand_in(&packet).code(), 400);
}

#[test]
fn a_second_message_integrity_does_not_count() {
    // RFC 8489 §14: of several of one type the first counts; the second follows it.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let build = |first: &[u8], second: &[u8]| {
        let builder = Builder::new(Class::Request, ALLOCATE, [4; 12]).item(&transport(17)).items(&signer.items());
        builder.integrity(first).integrity(second).bytes()
    };
    assert_eq!(rig.hand_in(&build(b"wrong", &signer.key())).code(), 401);
    assert_eq!(rig.hand_in(&build(&signer.key(), b"wrong")).code(), 0);
}

#[test]
fn message_integrity_covers_everything_before_it() {
    // RFC 8489 §14.5: HMAC-SHA1 over header and attributes, the length as if the message ended behind it.
    let mut rig = Rig::new();
    let good = rig.signed(ALLOCATE, &[transport(17), raw(0x8FFF, b"padded")]);
    for byte in 0..good.len() {
        let mut packet = good.clone();
        packet[byte] ^= 0x04;
        let outcome = rig.hand_in(&packet);
        assert!(outcome.is_silence() || outcome.code() != 0, "byte {byte}");
        assert_eq!(rig.server.allocations(), 0, "byte {byte}");
    }
    assert_eq!(rig.hand_in(&good).code(), 0);
}

#[test]
fn message_integrity_has_twenty_bytes() {
    // RFC 8489 §14.5: a 20-byte HMAC; a cut or longer one verifies nothing.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let builder = Builder::new(Class::Request, ALLOCATE, [4; 12]).item(&transport(17)).items(&signer.items());
    let whole = builder.clone().integrity(&signer.key()).bytes();
    let mac = whole[whole.len() - 20..].to_vec();
    for length in [0, 1, 4, 16, 19] {
        let packet = builder.clone().attribute(MESSAGE_INTEGRITY, &mac[..length]).bytes();
        assert_eq!(rig.hand_in(&packet).code(), 401, "{length}");
    }
    let packet = builder.attribute(MESSAGE_INTEGRITY, &[&mac[..], &[0; 4]].concat()).bytes();
    assert_eq!(rig.hand_in(&packet).code(), 401);
}

#[test]
fn a_wrong_fingerprint_is_silence() {
    // RFC 8489 §6.3 and §14.7: a FINGERPRINT that is there and wrong: silently discarded.
    let good = Builder::new(Class::Request, BINDING, [9; 12]).fingerprint().bytes();
    assert_eq!(Rig::new().hand_in(&good).code(), 0);
    // Not its type, without which it is another attribute.
    for byte in (8..20).chain(22..good.len()) {
        let mut packet = good.clone();
        packet[byte] ^= 1;
        assert!(Rig::new().hand_in(&packet).is_silence(), "byte {byte}");
    }
    for length in [0, 3, 5, 8] {
        let packet = Builder::new(Class::Request, BINDING, [9; 12]).attribute(FINGERPRINT, &vec![0; length]).bytes();
        assert!(Rig::new().hand_in(&packet).is_silence());
    }
}

#[test]
fn a_fingerprint_is_the_last_attribute() {
    // RFC 8489 §14.7: it MUST be the last one.
    let mut packet = Builder::new(Class::Request, BINDING, [9; 12]).fingerprint().bytes();
    packet.extend([0x80, 0x22, 0, 0]);
    length_of(&mut packet);
    assert!(Rig::new().hand_in(&packet).is_silence());
}

#[test]
fn an_answers_fingerprint_follows_its_integrity() {
    // RFC 8489 §14.7: it appears after MESSAGE-INTEGRITY.
    let mut rig = Rig::new();
    let signer = rig.signer();
    let builder = Builder::new(Class::Request, REFRESH, [4; 12]).items(&signer.items());
    let packet = builder.integrity(&signer.key()).fingerprint().bytes();
    let answer = rig.hand_in(&packet).answer();
    let kinds: Vec<u16> = answer.attributes.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds[kinds.len() - 2..], [MESSAGE_INTEGRITY, FINGERPRINT]);
    assert!(answer.signed_with(&signer.key()));
}
