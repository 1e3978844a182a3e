//! §8: Refresh.

use turn_core::StaticUser;

use crate::support::rig::{Outcome, Rig};
use crate::support::stun::{REFRESH, RESERVATION_TOKEN, even_port, family, lifetime};

#[test]
fn the_desired_lifetime_is_computed_as_said() {
    // RFC 8656 §8.2: as for Allocate, but for zero.
    let cases = [(1, 600), (599, 600), (600, 600), (601, 601), (3600, 3600), (3601, 3600), (u32::MAX, 3600)];
    for (asked, expected) in cases {
        let mut rig = Rig::allocated();
        rig.pass(10);
        assert_eq!(rig.refresh(&[lifetime(asked)]).answer().lifetime(), Some(expected), "{asked}");
        rig.pass_without_timer(u64::from(expected) - 1);
        rig.forget_nonce();
        assert_eq!(rig.permit("192.0.2.1:0"), 0);
        rig.pass_without_timer(1);
        assert_eq!(rig.permit("192.0.2.1:0"), 437);
    }
    assert_eq!(Rig::allocated().refresh(&[]).answer().lifetime(), Some(600));
}

#[test]
fn a_refresh_may_shorten_too() {
    // RFC 8656 §8.2: time-to-expiry is *set to* the desired lifetime.
    let mut rig = Rig::new();
    assert_eq!(rig.allocate(&[lifetime(3600)]).answer().lifetime(), Some(3600));
    assert_eq!(rig.refresh(&[]).answer().lifetime(), Some(600));
    rig.pass_without_timer(600);
    assert_eq!(rig.refresh(&[]).code(), 437);
}

#[test]
fn lifetime_zero_deletes_at_once() {
    // RFC 8656 §8.1 and §8.2: the request succeeds, the allocation is gone, permissions and channels with it.
    let mut rig = Rig::allocated();
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    let relayed = rig.relayed();
    let answer = rig.refresh(&[lifetime(0)]).answer();
    assert_eq!((answer.code(), answer.lifetime()), (0, Some(0)));
    let key = rig.key();
    assert!(answer.signed_with(&key));
    assert_eq!((rig.server.allocations(), rig.desk.held.len()), (0, 0));
    assert!(rig.channel_data(0x4000, b"x").is_silence());
    assert!(rig.send("192.0.2.1:9", b"x").is_silence());
    assert!(rig.peer_sends_to(relayed, "192.0.2.1:9", b"x").is_silence());
}

#[test]
fn a_deletion_that_comes_again_is_437() {
    // RFC 8656 §8.2, note: which the client takes for success.
    let mut rig = Rig::allocated();
    let packet = rig.signed(REFRESH, &[lifetime(0)]);
    assert_eq!(rig.hand_in(&packet).code(), 0);
    assert_eq!(rig.hand_in(&packet).code(), 437);
}

#[test]
fn a_deleted_5_tuple_can_be_used_again() {
    // RFC 8656 §8.2 with §7.2, item 2: it is no longer in use.
    let mut rig = Rig::allocated();
    assert_eq!(rig.refresh(&[lifetime(0)]).code(), 0);
    assert_eq!(rig.allocate(&[]).code(), 0);
}

#[test]
fn another_family_is_443() {
    // RFC 8656 §8.2: a family that is not the allocation's MUST be answered with 443.
    for (allocated, other) in [(1, 2), (2, 1), (1, 0), (2, 3)] {
        let mut rig = Rig::new();
        assert_eq!(rig.allocate(&[family(allocated)]).code(), 0);
        assert_eq!(rig.refresh(&[family(other)]).code(), 443);
        assert_eq!(rig.refresh(&[family(other), lifetime(0)]).code(), 443);
        assert_eq!(rig.server.allocations(), 1);
        assert_eq!(rig.refresh(&[family(allocated)]).code(), 0);
    }
}

#[test]
fn a_refresh_leaves_permissions_and_channels_as_they_are() {
    // RFC 8656 §9 and §12: only CreatePermission and ChannelBind refresh them.
    let mut rig = Rig::allocated();
    assert_eq!(rig.bind(0x4000, "192.0.2.1:9"), 0);
    rig.pass(299);
    assert_eq!(rig.refresh(&[]).code(), 0);
    assert!(matches!(rig.peer_sends("192.0.2.1:9", b"x"), Outcome::Client { .. }));
    rig.pass(1);
    assert!(rig.peer_sends("192.0.2.1:9", b"x").is_silence());
    rig.pass(299);
    assert!(matches!(rig.channel_data(0x4000, b"x"), Outcome::Peer { .. }));
    rig.pass(1);
    assert!(rig.channel_data(0x4000, b"x").is_silence());
}

#[test]
fn a_refresh_of_a_foreign_allocation_deletes_nothing() {
    // RFC 8656 §5 with §8: 441.
    let mut rig = Rig::with(|settings| {
        settings.static_users.push(StaticUser { username: b"eve".to_vec(), password: b"eve".to_vec() });
    });
    assert_eq!(rig.allocate(&[]).code(), 0);
    rig.user(b"eve", b"eve");
    assert_eq!(rig.refresh(&[lifetime(0)]).code(), 441);
    assert_eq!(rig.server.allocations(), 1);
}

#[test]
fn a_reserved_port_outlives_the_allocation_that_asked_for_it() {
    // RFC 8656 §7.2: the reservation MUST be held for at least 30 seconds, whatever becomes of the allocation.
    let mut rig = Rig::new();
    let answer = rig.allocate(&[even_port(true)]).answer();
    let reserved = answer.find(RESERVATION_TOKEN).expect("a token").to_vec();
    assert_eq!(rig.refresh(&[lifetime(0)]).code(), 0);
    assert!(rig.desk.reserved.contains_key(&reserved[..]));
}
