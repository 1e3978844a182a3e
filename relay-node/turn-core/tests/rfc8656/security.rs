//! §21: what the security considerations demand.

use crate::support::addr;
use crate::support::rig::Rig;
use crate::support::stun::{CREATE_PERMISSION, family, peer};

/// Teredo (RFC 4380) and 6to4 (RFC 3056).
const TUNNELS: [&str; 4] = [
    "[2001:0:4136:e378:8000:63bf:3fff:fdd2]:9",
    "[2001::1]:9",
    "[2002:c000:201::1]:9",
    "[2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:9",
];

#[test]
fn an_allocation_from_a_tunnel_is_not_accepted() {
    // RFC 8656 §21.4: a TURN server MUST NOT accept Teredo or 6to4 addresses in Allocate requests.
    for tunnel in TUNNELS {
        let mut rig = Rig::new();
        rig.client(tunnel);
        assert_eq!(rig.allocate(&[]).code(), 403, "{tunnel}");
        assert_eq!(rig.server.allocations(), 0);
    }
    let mut rig = Rig::new();
    rig.client("[2001:db8::9]:9");
    assert_eq!(rig.allocate(&[]).code(), 0);
}

#[test]
fn a_channel_to_a_tunnel_is_not_accepted() {
    // RFC 8656 §21.4: nor in ChannelBind requests; and nothing is forwarded to such addresses (RECOMMENDED).
    for tunnel in TUNNELS {
        let mut rig = Rig::new();
        assert_eq!(rig.allocate(&[family(2)]).code(), 0);
        assert_eq!(rig.bind(0x4000, tunnel), 403, "{tunnel}");
        assert_eq!(rig.ask(CREATE_PERMISSION, &[peer(addr(tunnel))]).code(), 403, "{tunnel}");
        assert!(rig.channel_data(0x4000, b"x").is_silence());
        assert!(rig.send(tunnel, b"x").is_silence());
    }
}

#[test]
fn an_unsigned_deletion_deletes_nothing() {
    // RFC 8656 §21.1.2 and RFC 8489 §9: what follows the signature is ignored, so nobody can add to a request.
    let mut rig = Rig::allocated();
    let mut packet = rig.signed(crate::support::stun::REFRESH, &[]);
    packet.extend([0, 0x0D, 0, 4, 0, 0, 0, 0]);
    let length = (packet.len() - 20) as u16;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    let answer = rig.hand_in(&packet).answer();
    assert_eq!((answer.code(), answer.lifetime()), (0, Some(600)));
    assert_eq!(rig.server.allocations(), 1);
}
