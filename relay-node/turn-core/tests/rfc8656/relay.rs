//! §14 to §16: the IP header of what is relayed.

use turn_core::IpMeta;

use crate::support::rig::Rig;

fn marked(bits: u8) -> IpMeta {
    IpMeta { dscp_ecn: bits, ..IpMeta::default() }
}

fn bound(mut rig: Rig) -> Rig {
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    rig
}

#[test]
fn dscp_and_ecn_are_copied_between_datagrams() {
    // RFC 8656 §14: the outgoing DSCP and ECN SHOULD be the incoming ones, both ways, for channels and indications.
    for bits in [0, 0b1011_1010, 0b1011_1001, 0b0000_0011, 0xFF] {
        let mut rig = bound(Rig::new());
        rig.ip = marked(bits);
        assert_eq!(rig.channel_data(0x4000, b"x").ip().dscp_ecn, bits);
        assert_eq!(rig.send("192.0.2.1:9", b"x").ip().dscp_ecn, bits);
        assert_eq!(rig.peer_sends("192.0.2.1:9", b"x").ip().dscp_ecn, bits);
        assert_eq!(rig.peer_sends("192.0.2.1:10", b"x").ip().dscp_ecn, bits);
    }
}

#[test]
fn no_ecn_from_a_stream_to_a_peer() {
    // RFC 8656 §15: no mechanism is defined to carry ECN from TCP: Not-ECT.
    for bits in 0..=3 {
        let mut rig = bound(Rig::new().on_stream());
        rig.ip = marked(0b1011_1000 | bits);
        assert_eq!(rig.channel_data(0x4000, b"x").ip().dscp_ecn & 3, 0);
        assert_eq!(rig.send("192.0.2.1:9", b"x").ip().dscp_ecn & 3, 0);
    }
}

#[test]
fn a_peers_marks_do_not_change_a_stream() {
    // RFC 8656 §16: DSCP and ECN of the datagram are ignored towards a TCP connection.
    let mut rig = bound(Rig::new().on_stream());
    rig.ip = marked(0xFF);
    assert_eq!(rig.peer_sends("192.0.2.1:9", b"x").ip().dscp_ecn, 0);
}
