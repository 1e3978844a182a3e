//! §9 and §10: permissions and CreatePermission.

use turn_core::policy::Network;

use crate::support::addr;
use crate::support::rig::{Outcome, Rig};
use crate::support::stun::{CREATE_PERMISSION, Item, XOR_PEER_ADDRESS, data, family, peer, raw};

fn reaches_client(rig: &mut Rig, peer: &str) -> bool {
    matches!(rig.peer_sends(peer, b"x"), Outcome::Client { .. })
}

#[test]
fn a_permission_lasts_300_seconds() {
    // RFC 8656 §9: the Permission Lifetime MUST be 300 s.
    let mut rig = Rig::allocated();
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    rig.pass_without_timer(299);
    assert!(reaches_client(&mut rig, "192.0.2.1:9"));
    assert!(matches!(rig.send("192.0.2.1:9", b"x"), Outcome::Peer { .. }));
    rig.pass_without_timer(1);
    assert!(!reaches_client(&mut rig, "192.0.2.1:9"));
    assert!(rig.send("192.0.2.1:9", b"x").is_silence());
}

#[test]
fn create_permission_resets_the_time() {
    // RFC 8656 §9: a permission that exists is reset to the Permission Lifetime.
    let mut rig = Rig::allocated();
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    rig.pass(200);
    assert_eq!(rig.permit("192.0.2.1:1"), 0);
    rig.pass(299);
    assert!(reaches_client(&mut rig, "192.0.2.1:9"));
    rig.pass(1);
    assert!(!reaches_client(&mut rig, "192.0.2.1:9"));
}

#[test]
fn create_permission_and_channel_bind_refresh_the_same_permission() {
    // RFC 8656 §9: they may be intermixed on one permission.
    let mut rig = Rig::allocated();
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    rig.pass(200);
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    rig.pass(200);
    assert!(reaches_client(&mut rig, "192.0.2.1:77"));
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    rig.pass(150);
    assert!(reaches_client(&mut rig, "192.0.2.1:9"));
}

#[test]
fn only_the_ip_is_compared() {
    // RFC 8656 §9: port numbers are not considered.
    let mut rig = Rig::allocated();
    assert_eq!(rig.permit("192.0.2.1:5"), 0);
    for port in [1, 5, 6, 65_535] {
        assert!(reaches_client(&mut rig, &format!("192.0.2.1:{port}")));
        assert!(matches!(rig.send(&format!("192.0.2.1:{port}"), b"x"), Outcome::Peer { .. }));
    }
}

#[test]
fn an_ip_without_permission_is_silently_discarded() {
    // RFC 8656 §9: no match, no relaying; an exact match is needed.
    let mut rig = Rig::allocated();
    assert_eq!(rig.permit("192.0.2.1:5"), 0);
    for other in ["192.0.2.2:5", "192.0.2.0:5", "193.0.2.1:5", "[2001:db8::1]:5"] {
        assert!(!reaches_client(&mut rig, other), "{other}");
    }
}

#[test]
fn permissions_of_allocations_are_unrelated() {
    // RFC 8656 §9.
    let mut rig = Rig::allocated();
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    let first = rig.relayed();
    rig.client("203.0.113.1:5001");
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert_eq!(rig.permit("192.0.2.2:0"), 0);
    assert!(rig.send("192.0.2.1:9", b"x").is_silence());
    assert!(matches!(rig.peer_sends_to(first, "192.0.2.1:9", b"x"), Outcome::Client { .. }));
    assert!(rig.peer_sends_to(first, "192.0.2.2:9", b"x").is_silence());
}

#[test]
fn no_peer_at_all_is_400() {
    // RFC 8656 §10.2: the request MUST contain at least one XOR-PEER-ADDRESS.
    let mut rig = Rig::allocated();
    assert_eq!(rig.ask(CREATE_PERMISSION, &[]).code(), 400);
    assert_eq!(rig.ask(CREATE_PERMISSION, &[data(b"x")]).code(), 400);
}

#[test]
fn an_invalid_peer_is_400_and_none_is_installed() {
    // RFC 8656 §10.2: if any of these attributes is invalid.
    let values: [&[u8]; 8] = [
        &[],
        &[0],
        &[0, 1, 0, 0],
        &[0, 1, 0, 0, 1, 2, 3],
        &[0, 1, 0, 0, 1, 2, 3, 4, 5],
        &[0, 2, 0, 0, 1, 2, 3, 4],
        &[0, 3, 0, 0, 1, 2, 3, 4],
        &[0, 0, 0, 0, 1, 2, 3, 4],
    ];
    for value in values {
        let mut rig = Rig::allocated();
        let good = peer(addr("192.0.2.1:9"));
        let bad = raw(XOR_PEER_ADDRESS, value);
        for items in [vec![bad.clone()], vec![good.clone(), bad.clone()], vec![bad, good]] {
            assert_eq!(rig.ask(CREATE_PERMISSION, &items).code(), 400, "{value:?}");
            assert!(!reaches_client(&mut rig, "192.0.2.1:9"), "{value:?}");
        }
    }
}

#[test]
fn several_peers_in_any_order() {
    // RFC 8656 §10.1 and §10.2: each XOR-PEER-ADDRESS installs a permission; ports are ignored, so are repetitions.
    let mut rig = Rig::allocated();
    let items: Vec<Item> =
        ["192.0.2.9:0", "192.0.2.1:65535", "192.0.2.9:1", "192.0.2.5:80"].map(|text| peer(addr(text))).to_vec();
    assert_eq!(rig.ask(CREATE_PERMISSION, &items).code(), 0);
    for ip in ["192.0.2.9", "192.0.2.1", "192.0.2.5"] {
        assert!(reaches_client(&mut rig, &format!("{ip}:4")));
    }
}

#[test]
fn too_many_permissions_are_508() {
    // RFC 8656 §10.2: a capacity limit is 508; what there is can be refreshed, and room comes back with time.
    let mut rig = Rig::with(|settings| settings.limits.permissions_per_allocation = 2);
    assert_eq!(rig.allocate(&[]).code(), 0);
    assert_eq!(rig.permit("192.0.2.1:0"), 0);
    let three: Vec<Item> = ["192.0.2.1:0", "192.0.2.2:0", "192.0.2.3:0"].map(|text| peer(addr(text))).to_vec();
    assert_eq!(rig.ask(CREATE_PERMISSION, &three).code(), 508);
    assert!(!reaches_client(&mut rig, "192.0.2.2:9"), "all or none");
    assert_eq!(rig.ask(CREATE_PERMISSION, &three[..2]).code(), 0);
    assert_eq!(rig.permit("192.0.2.3:0"), 508);
    rig.pass(300);
    assert_eq!(rig.permit("192.0.2.3:0"), 0);
}

#[test]
fn a_peer_of_another_family_is_443() {
    // RFC 8656 §10.2: the server MUST answer 443; none of the list is installed.
    for (number, own, other) in [(1, "192.0.2.1:9", "[2001:db8::1]:9"), (2, "[2001:db8::1]:9", "192.0.2.1:9")] {
        let mut rig = Rig::new();
        assert_eq!(rig.allocate(&[family(number)]).code(), 0);
        assert_eq!(rig.ask(CREATE_PERMISSION, &[peer(addr(own)), peer(addr(other))]).code(), 443);
        assert!(!reaches_client(&mut rig, own));
        assert_eq!(rig.permit(own), 0);
        assert!(reaches_client(&mut rig, own));
    }
}

#[test]
fn a_forbidden_peer_is_403() {
    // RFC 8656 §10.2: restrictions on the IP are answered with 403; one forbidden address refuses them all.
    let mut rig = Rig::allocated();
    for forbidden in ["10.0.0.1:9", "127.0.0.1:9", "169.254.169.254:80", "0.0.0.0:1", "224.0.0.1:5"] {
        let items = [peer(addr("192.0.2.1:9")), peer(addr(forbidden))];
        assert_eq!(rig.ask(CREATE_PERMISSION, &items).code(), 403, "{forbidden}");
        assert!(!reaches_client(&mut rig, "192.0.2.1:9"));
    }
    rig.configure(|settings| {
        settings.policy.denied.push(Network { address: addr("192.0.2.0:0").ip(), prefix: 24 });
    });
    assert_eq!(rig.permit("192.0.2.1:9"), 403);
}

#[test]
fn a_success_needs_no_attribute() {
    // RFC 8656 §10.2: there are no mandatory attributes; it is signed all the same (RFC 8489 §9.2.4).
    let mut rig = Rig::allocated();
    let answer = rig.ask(CREATE_PERMISSION, &[peer(addr("192.0.2.1:9"))]).answer();
    assert_eq!(answer.code(), 0);
    let key = rig.key();
    assert!(answer.signed_with(&key));
}

#[test]
fn a_retransmission_refreshes() {
    // RFC 8656 §10.2, note.
    let mut rig = Rig::allocated();
    let packet = rig.signed(CREATE_PERMISSION, &[peer(addr("192.0.2.1:9"))]);
    let first = rig.hand_in(&packet).answer();
    rig.pass(299);
    assert_eq!(rig.hand_in(&packet).answer(), first);
    rig.pass(299);
    assert!(reaches_client(&mut rig, "192.0.2.1:9"));
}
