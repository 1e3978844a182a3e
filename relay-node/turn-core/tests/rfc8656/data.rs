//! §11: Send and Data.

use crate::support::addr;
use crate::support::rig::{Outcome, Rig};
use crate::support::stun::{
    ACCESS_TOKEN, CONNECTION_ID, Class, DATA, DATA_METHOD, Item, PASSWORD_ALGORITHM, Read, SEND, USERHASH,
    XOR_PEER_ADDRESS, data, family, peer, raw,
};

fn permitted() -> Rig {
    let mut rig = Rig::allocated();
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    rig
}

#[test]
fn a_send_without_peer_or_data_is_discarded() {
    // RFC 8656 §11.2: it MUST contain both; one missing or invalid discards it.
    let good = peer(addr("192.0.2.1:9"));
    let cases: Vec<Vec<Item>> = vec![
        vec![],
        vec![good.clone()],
        vec![data(b"x")],
        vec![raw(XOR_PEER_ADDRESS, &[]), data(b"x")],
        vec![raw(XOR_PEER_ADDRESS, &[0, 1, 0, 0, 1, 2, 3]), data(b"x")],
        vec![raw(XOR_PEER_ADDRESS, &[0, 9, 0, 0, 1, 2, 3, 4]), data(b"x")],
        // The first of a type is the one that counts.
        vec![raw(XOR_PEER_ADDRESS, &[]), good, data(b"x")],
    ];
    for items in cases {
        assert!(permitted().tell(SEND, &items).is_silence(), "{items:?}");
    }
}

#[test]
fn data_of_zero_bytes_is_sent() {
    // RFC 8656 §11.2: the DATA attribute may contain zero bytes.
    assert_eq!(permitted().send("192.0.2.1:9", b"").peer_gets().2, b"");
}

#[test]
fn the_datagram_is_formed_as_said() {
    // RFC 8656 §11.2: from the relayed address, to XOR-PEER-ADDRESS, with the contents of DATA and no padding.
    for length in 0..9 {
        let mut rig = permitted();
        let payload = vec![0xD7; length];
        let (from, to, sent) = rig.send("192.0.2.1:9", &payload).peer_gets();
        assert_eq!(from, rig.relayed().advertised);
        assert_eq!((to, sent), (addr("192.0.2.1:9"), payload));
    }
}

#[test]
fn the_attributes_may_come_in_any_order() {
    // RFC 8656 §11.2 asks for both and for no order.
    let mut rig = permitted();
    let outcome = rig.tell(SEND, &[data(b"first"), peer(addr("192.0.2.1:9")), data(b"second")]);
    assert_eq!(outcome.peer_gets().2, b"first");
}

#[test]
fn a_send_without_permission_is_discarded() {
    // RFC 8656 §11.2: no permission for the IP, no datagram.
    let mut rig = permitted();
    assert!(rig.send("192.0.2.2:9", b"x").is_silence());
    assert!(Rig::allocated().send("192.0.2.1:9", b"x").is_silence());
}

#[test]
fn a_send_never_refreshes_the_permission() {
    // RFC 8656 §11.2: a Send indication never causes the server to refresh the permission.
    let mut rig = permitted();
    for _ in 0..2 {
        rig.pass(149);
        assert!(matches!(rig.send("192.0.2.1:9", b"x"), Outcome::Peer { .. }));
        assert!(matches!(rig.peer_sends("192.0.2.1:9", b"x"), Outcome::Client { .. }));
    }
    rig.pass(2);
    assert!(rig.send("192.0.2.1:9", b"x").is_silence());
}

#[test]
fn a_send_to_a_forbidden_peer_is_discarded() {
    // RFC 8656 §11.2: restrictions on IP and port: silently discarded.
    let mut rig = permitted();
    for forbidden in ["192.0.2.1:0", "10.0.0.1:9", "127.0.0.1:9", "[::ffff:192.0.2.1]:9", "198.51.100.1:3478"] {
        assert!(rig.send(forbidden, b"x").is_silence(), "{forbidden}");
    }
}

#[test]
fn a_send_to_the_other_family_is_discarded() {
    // RFC 8656 §11.2 with §10.2: no permission of the other family can exist.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[family(2)]).code(), 0);
    assert_eq!(rig.permit("[2001:db8::1]:0"), 0);
    assert!(rig.send("192.0.2.1:9", b"x").is_silence());
    assert_eq!(rig.send("[2001:db8::1]:9", b"x").peer_gets().1, addr("[2001:db8::1]:9"));
}

#[test]
fn a_send_with_an_unknown_required_attribute_is_discarded() {
    // RFC 8489 §6.3.2: an indication with an unknown comprehension-required attribute is discarded; optional ones are
    // ignored.
    let items = |kind| [peer(addr("192.0.2.1:9")), raw(kind, &[1, 2, 3, 4]), data(b"x")];
    for required in [0x0002, 0x0030, 0x7FFF] {
        assert!(permitted().tell(SEND, &items(required)).is_silence(), "{required:#x}");
    }
    // What is switched off is as unknown as what nobody knows.
    for required in [PASSWORD_ALGORITHM, USERHASH, CONNECTION_ID, ACCESS_TOKEN] {
        let mut rig = permitted();
        rig.configure(|settings| {
            (settings.features.sha256, settings.features.tcp_allocations) = (false, false);
        });
        assert!(rig.tell(SEND, &items(required)).is_silence(), "{required:#x}");
    }
    for optional in [0x8FFF, 0xC000, 0xFFFF] {
        assert!(matches!(permitted().tell(SEND, &items(optional)), Outcome::Peer { .. }), "{optional:#x}");
    }
}

#[test]
fn indications_are_never_authenticated() {
    // RFC 8656 §5: the long-term mechanism cannot authenticate indications; a signature in one means nothing.
    let mut rig = permitted();
    let packet = {
        let id = rig.transaction();
        let builder = crate::support::stun::Builder::new(Class::Indication, SEND, id);
        builder.items(&[peer(addr("192.0.2.1:9")), data(b"x")]).integrity(b"whatever").bytes()
    };
    assert_eq!(rig.hand_in(&packet).peer_gets().2, b"x");
}

#[test]
fn no_indication_is_answered() {
    // RFC 8489 §6.3.2: no response is generated for an indication, whatever it is.
    for method in [0x001, 0x003, 0x004, SEND, DATA_METHOD, 0x008, 0x009, 0x00A, 0x7FF] {
        let mut rig = Rig::allocated();
        assert!(rig.tell(method, &[]).is_silence(), "{method:#x}");
        assert!(rig.tell(method, &[raw(0x7FFF, &[])]).is_silence(), "{method:#x}");
    }
}

#[test]
fn a_permitted_datagram_becomes_a_data_indication() {
    // RFC 8656 §11.3: it MUST contain XOR-PEER-ADDRESS, the source, and DATA, the data octets.
    let cases = [(1, "192.0.2.1:9"), (2, "[2001:db8::1]:9")];
    for (number, from) in cases {
        for length in 0..9 {
            let mut rig = Rig::new();
            assert_eq!(rig.allocate(&[family(number)]).code(), 0);
            assert_eq!(rig.permit(from), 0);
            let payload = vec![0xAB; length];
            let outcome = rig.peer_sends(from, &payload);
            let Outcome::Client { to, path, .. } = outcome.clone() else { panic!("{outcome:?}") };
            // On the 5-tuple associated with the allocation.
            assert_eq!((to, path), (rig.from, rig.path));
            let read = Read::new(&outcome.client_gets());
            assert_eq!((read.class, read.method), (Class::Indication, DATA_METHOD));
            assert_eq!(read.xor_address(XOR_PEER_ADDRESS), Some(addr(from)));
            assert_eq!(read.find(DATA), Some(&payload[..]));
        }
    }
}

#[test]
fn data_indications_have_random_transaction_ids() {
    // RFC 8489 §5: 96 random bits for each new indication.
    let mut rig = permitted();
    let mut ids: Vec<[u8; 12]> =
        (0..64).map(|_| Read::new(&rig.peer_sends("192.0.2.1:9", b"x").client_gets()).transaction).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 64);
}

#[test]
fn what_arrives_elsewhere_is_nobodys() {
    // RFC 8656 §11.3: the allocation is that of the relayed transport address.
    let mut rig = permitted();
    let mut relayed = rig.relayed();
    relayed.bound.set_port(1);
    relayed.advertised.set_port(1);
    assert!(rig.peer_sends_to(relayed, "192.0.2.1:9", b"x").is_silence());
}
