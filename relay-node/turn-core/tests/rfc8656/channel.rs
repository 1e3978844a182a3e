//! §12: channels.

use crate::support::addr;
use crate::support::rig::{Outcome, Rig};
use crate::support::stun::{
    CHANNEL_BIND, CHANNEL_NUMBER, Class, Item, Read, XOR_PEER_ADDRESS, channel, channel_data, family, peer, raw,
};

fn bound() -> Rig {
    let mut rig = Rig::allocated();
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    rig
}

#[test]
fn reserved_first_bytes_are_dropped() {
    // RFC 8656 §12, Table 3: what is neither STUN nor ChannelData (nor DTLS, below this layer) MUST be dropped.
    for first in (4..=63).chain(80..=255) {
        let mut rig = bound();
        for packet in [vec![first], vec![first, 0, 0, 1, b'x'], vec![first; 200]] {
            assert!(rig.hand_in(&packet).is_silence(), "{first}");
        }
    }
}

#[test]
fn channel_numbers_are_0x4000_to_0x4fff() {
    // RFC 8656 §12.2: any other number is 400. The upper half of RFC 5766's range is reserved.
    let cases =
        [(0, 400), (0x3FFF, 400), (0x4000, 0), (0x4FFF, 0), (0x5000, 400), (0x7FFF, 400), (0x8000, 400), (0xFFFF, 400)];
    for (number, expected) in cases {
        assert_eq!(Rig::allocated().bind(number, "192.0.2.1:9"), expected, "{number:#x}");
    }
}

#[test]
fn both_attributes_are_required() {
    // RFC 8656 §12.2: CHANNEL-NUMBER and XOR-PEER-ADDRESS, both well-formed; otherwise 400.
    let good_peer = peer(addr("192.0.2.1:9"));
    let cases: Vec<Vec<Item>> = vec![
        vec![],
        vec![channel(0x4000)],
        vec![good_peer.clone()],
        vec![raw(CHANNEL_NUMBER, &[0x40]), good_peer.clone()],
        vec![raw(CHANNEL_NUMBER, &[0x40, 0]), good_peer.clone()],
        vec![raw(CHANNEL_NUMBER, &[0x40, 0, 0, 0, 0]), good_peer],
        vec![channel(0x4000), raw(XOR_PEER_ADDRESS, &[])],
        vec![channel(0x4000), raw(XOR_PEER_ADDRESS, &[0, 1, 0, 9, 1, 2, 3])],
    ];
    for items in cases {
        let mut rig = Rig::allocated();
        assert_eq!(rig.ask(CHANNEL_BIND, &items).code(), 400, "{items:?}");
        assert!(rig.channel_data(0x4000, b"x").is_silence());
    }
}

#[test]
fn a_channel_cannot_be_bound_to_two_peers() {
    // RFC 8656 §12 and §12.2: 400 while it is bound; the first binding stays.
    let mut rig = bound();
    for other in ["192.0.2.2:9", "192.0.2.1:10"] {
        assert_eq!(rig.bind(0x4000, other), 400);
    }
    assert_eq!(rig.channel_data(0x4000, b"x").peer_gets().1, addr("192.0.2.1:9"));
}

#[test]
fn a_peer_cannot_be_bound_to_two_channels() {
    // RFC 8656 §12 and §12.2: 400; another port is another transport address.
    let mut rig = bound();
    assert_eq!(rig.bind(0x4001, "192.0.2.1:9"), 400);
    assert!(rig.channel_data(0x4001, b"x").is_silence());
    assert_eq!(rig.bind(0x4001, "192.0.2.1:10"), 0);
}

#[test]
fn a_binding_lasts_ten_minutes() {
    // RFC 8656 §12: 10 minutes unless refreshed; the same transport address again refreshes it.
    let mut rig = bound();
    rig.pass(400);
    assert_eq!(rig.refresh(&[]).code(), 0);
    rig.pass_without_timer(199);
    assert!(matches!(rig.channel_data(0x4000, b"x"), Outcome::Peer { .. }));
    rig.pass_without_timer(1);
    assert!(rig.channel_data(0x4000, b"x").is_silence());

    let mut rig = bound();
    for _ in 0..3 {
        rig.pass(500);
        assert_eq!(rig.refresh(&[]).code(), 0);
        assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    }
    assert!(matches!(rig.channel_data(0x4000, b"x"), Outcome::Peer { .. }));
}

#[test]
fn an_expired_channel_can_be_bound_anew() {
    // RFC 8656 §12: once unbound, number and peer can be bound otherwise. (Waiting 5 more minutes is the client's.)
    let mut rig = bound();
    rig.pass(300);
    assert_eq!(rig.refresh(&[]).code(), 0);
    rig.pass(300);
    assert_eq!(rig.bind(0x4000, "192.0.2.2:9"), 0);
    assert_eq!(rig.bind(0x4001, "192.0.2.1:9"), 0);
    assert_eq!(rig.channel_data(0x4000, b"x").peer_gets().1, addr("192.0.2.2:9"));
    assert_eq!(rig.channel_data(0x4001, b"x").peer_gets().1, addr("192.0.2.1:9"));
}

#[test]
fn channels_of_allocations_are_unrelated() {
    // RFC 8656 §12: number and peer have no meaning in another allocation.
    let mut rig = bound();
    rig.client("203.0.113.1:5001");
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert!(rig.channel_data(0x4000, b"x").is_silence());
    assert_eq!(rig.bind(0x4000, "192.0.2.2:9"), 0);
    assert_eq!(rig.bind(0x4001, "192.0.2.1:9"), 0);
    rig.client("203.0.113.1:5000");
    assert_eq!(rig.channel_data(0x4000, b"x").peer_gets().1, addr("192.0.2.1:9"));
}

#[test]
fn a_peer_of_another_family_is_443() {
    // RFC 8656 §12.2: the server MUST answer 443.
    for (number, other) in [(1, "[2001:db8::1]:9"), (2, "192.0.2.1:9")] {
        let mut rig = Rig::new();
        assert_eq!(rig.allocate(&[family(number)]).code(), 0);
        assert_eq!(rig.bind(0x4000, other), 443);
        assert!(rig.channel_data(0x4000, b"x").is_silence());
    }
}

#[test]
fn a_forbidden_peer_is_403() {
    // RFC 8656 §12.2: restrictions on IP and port: 403.
    for forbidden in ["10.0.0.1:9", "127.0.0.1:9", "192.0.2.1:0", "198.51.100.1:3478", "255.255.255.255:9"] {
        let mut rig = Rig::allocated();
        assert_eq!(rig.bind(0x4000, forbidden), 403, "{forbidden}");
        assert!(rig.channel_data(0x4000, b"x").is_silence());
    }
}

#[test]
fn too_many_channels_are_508() {
    // RFC 8656 §12.2: a capacity limit: 508. What there is can be refreshed.
    let mut rig = Rig::with(|settings| settings.limits.channels_per_allocation = 2);
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    assert_eq!(rig.bind(0x4001, "192.0.2.2:9"), 0);
    assert_eq!(rig.bind(0x4002, "192.0.2.3:9"), 508);
    assert!(rig.peer_sends("192.0.2.3:9", b"x").is_silence());
    assert_eq!(rig.bind(0x4001, "192.0.2.2:9"), 0);
}

#[test]
fn a_binding_installs_a_permission() {
    // RFC 8656 §12.2: it also installs or refreshes a permission for the IP, of 300 s (§9).
    let mut rig = bound();
    assert!(matches!(rig.peer_sends("192.0.2.1:77", b"x"), Outcome::Client { .. }));
    rig.pass(300);
    assert!(rig.peer_sends("192.0.2.1:9", b"x").is_silence());
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    assert!(matches!(rig.peer_sends("192.0.2.1:9", b"x"), Outcome::Client { .. }));
}

#[test]
fn a_retransmission_refreshes() {
    // RFC 8656 §12.2, note.
    let mut rig = Rig::allocated();
    let packet = rig.signed(CHANNEL_BIND, &[channel(0x4000), peer(addr("192.0.2.1:9"))]);
    let first = rig.hand_in(&packet).answer();
    assert_eq!(first.code(), 0);
    assert_eq!(rig.hand_in(&packet).answer(), first);
}

#[test]
fn the_server_uses_the_channel_where_there_is_one() {
    // RFC 8656 §12.5: the server MUST use ChannelData if a channel is bound to the peer; its length is the data's.
    for length in 0..9 {
        let payload = vec![7; length];
        assert_eq!(bound().peer_sends("192.0.2.1:9", &payload).client_gets(), channel_data(0x4000, &payload));
    }
    // To another port of the same IP no channel is bound.
    let read = Read::new(&bound().peer_sends("192.0.2.1:10", b"x").client_gets());
    assert_eq!(read.class, Class::Indication);
}

#[test]
fn the_client_may_use_either() {
    // RFC 8656 §12.5: ChannelData and Send may be intermixed.
    let mut rig = bound();
    for _ in 0..3 {
        assert_eq!(rig.send("192.0.2.1:9", b"send").peer_gets().2, b"send");
        assert_eq!(rig.channel_data(0x4000, b"channel").peer_gets().2, b"channel");
    }
}

#[test]
fn channel_data_is_padded_on_streams() {
    // RFC 8656 §12.5: over TCP and TLS it MUST be padded to a multiple of four, not reflected in the length.
    for length in 0..9 {
        let mut rig = Rig::new().on_stream();
        assert_eq!(rig.allocate(&[]).code(), 0);
        assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
        let payload = vec![7; length];
        let sent = rig.peer_sends("192.0.2.1:9", &payload).client_gets();
        assert_eq!(sent.len(), (4 + length).next_multiple_of(4));
        assert_eq!(usize::from(u16::from_be_bytes([sent[2], sent[3]])), length);
        assert_eq!(&sent[4..4 + length], payload);
        assert!(sent[4 + length..].iter().all(|byte| *byte == 0));
        // And what the client pads does not reach the peer.
        let mut packet = channel_data(0x4000, &payload);
        packet.resize(packet.len().next_multiple_of(4), 0xFF);
        assert_eq!(rig.hand_in(&packet).peer_gets().2, payload);
    }
}

#[test]
fn padding_of_a_datagram_is_allowed_and_not_relayed() {
    // RFC 8656 §12.5: over UDP padding is not required, but MAY be included.
    for length in 0..9 {
        let payload = vec![7; length];
        let mut packet = channel_data(0x4000, &payload);
        packet.resize(packet.len().next_multiple_of(4), 0xFF);
        assert_eq!(bound().hand_in(&packet).peer_gets().2, payload);
    }
}

#[test]
fn a_datagram_too_short_for_its_length_is_discarded() {
    // RFC 8656 §12.6.
    for (claimed, there) in [(1_u16, 0), (5, 4), (5, 0), (0xFFFF, 100)] {
        let mut packet = vec![0x40, 0];
        packet.extend(claimed.to_be_bytes());
        packet.extend(vec![0; there]);
        assert!(bound().hand_in(&packet).is_silence());
    }
    for cut in [&[0x40][..], &[0x40, 0], &[0x40, 0, 0]] {
        assert!(bound().hand_in(cut).is_silence());
    }
}

#[test]
fn data_on_an_unbound_channel_is_discarded() {
    // RFC 8656 §12.6.
    for number in [0x4001, 0x4FFF] {
        assert!(bound().channel_data(number, b"x").is_silence());
    }
}

#[test]
fn channel_data_refreshes_neither_channel_nor_permission() {
    // RFC 8656 §12.6: its receipt MUST NOT refresh either.
    let mut rig = bound();
    for _ in 0..2 {
        rig.pass(149);
        assert!(matches!(rig.channel_data(0x4000, b"x"), Outcome::Peer { .. }));
    }
    rig.pass(2);
    assert!(rig.peer_sends("192.0.2.1:9", b"x").is_silence(), "the permission has ended");
    assert_eq!(rig.refresh(&[]).code(), 0);
    rig.pass(299);
    assert!(matches!(rig.channel_data(0x4000, b"x"), Outcome::Peer { .. }));
    rig.pass(1);
    assert!(rig.channel_data(0x4000, b"x").is_silence(), "the channel has ended");
}

#[test]
fn the_datagram_is_formed_as_said() {
    // RFC 8656 §12.6: from the relayed address, to the channel's peer, with the data; also where there is none.
    for length in [0, 1, 2, 3, 4, 1200] {
        let mut rig = bound();
        let payload = vec![9; length];
        let (from, to, sent) = rig.channel_data(0x4000, &payload).peer_gets();
        assert_eq!(from, rig.relayed().advertised);
        assert_eq!((to, sent), (addr("192.0.2.1:9"), payload));
    }
}
