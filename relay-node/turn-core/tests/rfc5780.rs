//! RFC 5780 (NAT behaviour discovery): what it demands of a server, one test a rule.

mod support;

use support::rig::Rig;
use support::stun::{
    BINDING, CHANGE_REQUEST, OTHER_ADDRESS, PADDING, RESPONSE_ORIGIN, RESPONSE_PORT, XOR_MAPPED_ADDRESS, raw,
};

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
