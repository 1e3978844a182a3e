//! §18: what attributes look like.

use crate::support::addr;
use crate::support::rig::Rig;
use crate::support::stun::{
    ADDITIONAL_ADDRESS_FAMILY, ALLOCATE, CHANNEL_BIND, CHANNEL_NUMBER, REQUESTED_ADDRESS_FAMILY, REQUESTED_TRANSPORT,
    XOR_RELAYED_ADDRESS, peer, raw,
};

#[test]
fn the_rffu_of_channel_number_is_ignored() {
    // RFC 8656 §18.1: it MUST be ignored on reception.
    let mut rig = Rig::allocated();
    let items = [raw(CHANNEL_NUMBER, &[0x40, 0, 0xFF, 0xFF]), peer(addr("192.0.2.1:9"))];
    assert_eq!(rig.ask(CHANNEL_BIND, &items).code(), 0);
    assert_eq!(rig.channel_data(0x4000, b"x").peer_gets().1, addr("192.0.2.1:9"));
}

#[test]
fn the_reserved_bits_of_requested_address_family_are_ignored() {
    // RFC 8656 §18.6: 24 bits, MUST be ignored by the server.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[raw(REQUESTED_ADDRESS_FAMILY, &[2, 0xFF, 0xFF, 0xFF])]).answer();
    assert!(answer.xor_address(XOR_RELAYED_ADDRESS).expect("there").is_ipv6());
}

#[test]
fn the_reserved_bits_of_additional_address_family_are_ignored() {
    // RFC 8656 §18.11: the format is that of REQUESTED-ADDRESS-FAMILY, and so is what is reserved in it.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[raw(ADDITIONAL_ADDRESS_FAMILY, &[2, 0xFF, 0xFF, 0xFF])]).code(), 0);
}

#[test]
fn the_rffu_of_requested_transport_is_ignored() {
    // RFC 8656 §18.8: it MUST be ignored on reception.
    assert_eq!(Rig::new().ask(ALLOCATE, &[raw(REQUESTED_TRANSPORT, &[17, 0xFF, 0xFF, 0xFF])]).code(), 0);
}
