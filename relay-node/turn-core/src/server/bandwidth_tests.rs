//! Limits of bandwidth and of packets a second, each hit in both directions (abuse.md E).

use std::sync::Arc;
use std::time::Duration;

use super::super::lab::{Lab, addr};
use super::super::{DropReason, Meters};
use crate::meter::Meter;
use crate::{Limits, Settings};

const PEER: &str = "192.0.2.1:9";
/// 100 bytes of payload, 128 with headers.
const DATA: [u8; 100] = [7; 100];

fn limited(change: impl Fn(&mut Limits)) -> Lab {
    let mut lab = Lab::new();
    lab.host.meters =
        Meters { user: Some(Arc::new(Meter::new())), node: Some(Arc::new(Meter::new())), ..Meters::default() };
    lab.configure(|settings: &mut Settings| change(&mut settings.limits));
    assert_eq!(lab.allocate(), 0);
    assert_eq!(lab.bind(0x4000, PEER), 0);
    lab
}

/// Packets that pass of so many, towards the peer and towards the client.
fn passed(lab: &mut Lab, count: usize) -> (usize, usize) {
    let mut to = (0, 0);
    for _ in 0..count {
        match lab.channel_data(0x4000, &DATA).dropped() {
            None => to.0 += 1,
            reason => assert!(is_of_a_rate(reason), "{reason:?}"),
        }
        match lab.peer_packet(PEER, &DATA).dropped() {
            None => to.1 += 1,
            reason => assert!(is_of_a_rate(reason), "{reason:?}"),
        }
    }
    to
}

fn is_of_a_rate(reason: Option<DropReason>) -> bool {
    matches!(reason, Some(DropReason::Bandwidth | DropReason::PacketRate))
}

#[test]
fn each_limit_is_hit() {
    use DropReason::{Bandwidth, PacketRate};
    type Case = (&'static str, DropReason, fn(&mut Limits));
    let cases: &[Case] = &[
        ("allocation", Bandwidth, |limits| limits.bytes_per_allocation = 12_800),
        ("user", Bandwidth, |limits| limits.bytes_per_user = 12_800),
        ("node", Bandwidth, |limits| limits.bytes_per_node = 12_800),
        ("the lowest counts", Bandwidth, |limits| {
            limits.bytes_per_allocation = 99_000;
            limits.bytes_per_user = 12_800;
            limits.bytes_per_node = 50_000;
            limits.packets_per_allocation = 101;
        }),
        ("packets of the allocation", PacketRate, |limits| limits.packets_per_allocation = 100),
        ("packets of the user", PacketRate, |limits| limits.packets_per_user = 100),
        ("the lowest counts, of packets", PacketRate, |limits| {
            limits.bytes_per_allocation = 12_999;
            limits.packets_per_allocation = 999;
            limits.packets_per_user = 100;
        }),
    ];
    for (what, reason, change) in cases {
        let mut lab = limited(change);
        assert!((0..1000).any(|_| lab.channel_data(0x4000, &DATA).dropped() == Some(*reason)), "{what}");
        lab = limited(change);
        let expect = |lab: &mut Lab, expected: usize, when: &str| {
            let passed = passed(lab, 1000);
            // A packet more that goes over it, or less by rounding.
            let near = expected - 1..=expected + 1;
            assert!(near.contains(&passed.0) && near.contains(&passed.1), "{what}: {passed:?} {when}");
        };
        expect(&mut lab, 100, "of the burst");
        lab.now.mono += Duration::from_millis(500);
        expect(&mut lab, 50, "in half a second");
        lab.pass(60);
        expect(&mut lab, 100, "after a silence, which saves up no more than a burst");
    }
}

#[test]
fn without_a_limit_everything_passes() {
    let mut lab = limited(|_| {});
    assert_eq!(passed(&mut lab, 10_000), (10_000, 10_000));
}

#[test]
fn allocations_of_a_user_share_and_others_do_not() {
    let mut lab = limited(|limits| limits.bytes_per_user = 12_800);
    assert!(passed(&mut lab, 1000).0 < 105);
    let first = lab.from.client;
    lab.client(addr("203.0.113.9:7"));
    assert_eq!(lab.allocate(), 0);
    assert_eq!(lab.bind(0x4000, PEER), 0);
    assert_eq!(lab.channel_data(0x4000, &DATA).dropped(), Some(DropReason::Bandwidth), "the same user");
    lab.host.meters = Meters { user: Some(Arc::new(Meter::new())), ..Meters::default() };
    lab.client(addr("203.0.113.9:8"));
    assert_eq!(lab.allocate(), 0);
    assert_eq!(lab.bind(0x4000, PEER), 0);
    assert_eq!(lab.channel_data(0x4000, &DATA).dropped(), None, "another one");
    lab.client(first);
    assert_eq!(lab.channel_data(0x4000, &DATA).dropped(), Some(DropReason::Bandwidth));
}

#[test]
fn what_is_restored_is_limited_too() {
    let before = limited(|limits| limits.bytes_per_node = 12_800);
    let record = before.server.records(before.now).next().expect("one");
    let mut lab = Lab::new();
    lab.now = before.now;
    lab.host.meters = before.host.meters;
    lab.configure(|settings| settings.limits.bytes_per_node = 12_800);
    lab.restore(record);
    let count = (0..1000).filter(|_| lab.channel_data(0x4000, &DATA).dropped().is_none()).count();
    assert!((100..105).contains(&count), "{count}");
}

#[test]
fn requests_pass_whatever_is_relayed() {
    let mut lab = limited(|limits| limits.bytes_per_allocation = 1);
    passed(&mut lab, 100);
    assert_eq!(lab.refresh(600), 0);
    assert_eq!(lab.bind(0x4000, PEER), 0);
}
