//! Dual allocations: RFC 8656 §7.2, §8.

use std::time::Duration;

use super::super::lab::{Lab, Reply, addr, udp};
use super::super::{DropReason, Out, Output};
use super::*;
use crate::wire::attribute::{
    AdditionalAddressFamily, Data, EvenPort, Lifetime, RequestedAddressFamily, XorPeerAddress,
};
use crate::wire::{AttributeType, Message, MessageWriter, Method};
use crate::{Change, EndReason};

const V4_PEER: &str = "192.0.2.1:9";
const V6_PEER: &str = "[2001:db8:1::1]:9";

fn dual(writer: &mut MessageWriter<'_>) {
    udp(writer);
    writer.attribute(&AdditionalAddressFamily(2));
}

fn relayed_of(message: &Message<'_>) -> Vec<SocketAddr> {
    message.relayed_addresses().map(|address| address.expect("well-formed").0).collect()
}

fn refresh(lab: &mut Lab, family: Option<u8>, lifetime: u32) -> Reply {
    lab.request(Method::Refresh, |writer| {
        writer.attribute(&Lifetime(lifetime));
        if let Some(family) = family {
            writer.attribute(&RequestedAddressFamily(family));
        }
    })
}

/// Permissions and channels in both families.
fn bound() -> Lab {
    let mut lab = Lab::dual();
    assert_eq!(lab.bind(0x4000, V4_PEER), 0);
    assert_eq!(lab.bind(0x4001, V6_PEER), 0);
    lab.outputs();
    lab
}

#[test]
fn one_of_each_family_in_one_answer() {
    // RFC 8656 §7.2, item 9.
    let mut lab = Lab::new();
    lab.host.ipv6 = true;
    let with = lab.credentials();
    let packet = lab.packet(Some(&with), Method::Allocate, dual);
    let reply = lab.exchange(&packet);
    assert_eq!(reply.code(), 0);
    let expected = [lab.relayed().advertised, lab.relayed_v6().advertised];
    assert_eq!(relayed_of(&reply.message()), expected);
    assert!(!reply.message().contains(AttributeType::ADDRESS_ERROR_CODE));
    let changes = lab.changes();
    let [Change::Put(record)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(record.relayed, [lab.relayed(), lab.relayed_v6()]);
    assert!(record.family_expires_at.is_empty());
    // The same for a retransmission.
    assert_eq!(lab.exchange(&packet).bytes, reply.bytes);
    assert_eq!(lab.host.bound(), 2);
}

#[test]
fn half_of_it_with_the_reason() {
    let cases = [
        (Family::V6, BindError::FamilyUnsupported, 440),
        (Family::V6, BindError::NoPort, 508),
        (Family::V6, BindError::QuotaReached, 508),
        (Family::V4, BindError::FamilyUnsupported, 440),
        (Family::V4, BindError::NoPort, 508),
    ];
    for (family, error, expected) in cases {
        let mut lab = Lab::new();
        lab.host.ipv6 = true;
        (lab.host.refuse, lab.host.refuse_family) = (Some(error), Some(family));
        let reply = lab.request(Method::Allocate, dual);
        assert_eq!(reply.code(), 0, "{family:?} {error:?}");
        let message = reply.message();
        let Ok(Some(AddressErrorCode { family: named, error: code })) = message.attribute() else {
            panic!("no ADDRESS-ERROR-CODE: {family:?} {error:?}")
        };
        assert_eq!((named, code.code()), (family as u8, expected));
        assert_eq!(relayed_of(&message), [lab.relayed().advertised]);
        assert_ne!(lab.relayed().family(), family);
    }
}

#[test]
fn neither_is_an_error() {
    for (error, expected) in [(BindError::NoPort, 508), (BindError::QuotaReached, 486)] {
        let mut lab = Lab::new();
        lab.host.refuse = Some(error);
        assert_eq!(lab.request(Method::Allocate, dual).code(), expected);
        assert_eq!(lab.server.allocations(), 0);
    }
}

#[test]
fn even_port_is_for_both_and_the_r_bit_for_neither() {
    let mut lab = Lab::new();
    lab.host.ipv6 = true;
    let reply = lab.request(Method::Allocate, |writer| {
        dual(writer);
        writer.attribute(&EvenPort { reserve_next: false });
    });
    let ports: Vec<u16> = relayed_of(&reply.message()).iter().map(SocketAddr::port).collect();
    assert!(ports.len() == 2 && ports.iter().all(|port| port.is_multiple_of(2)), "{ports:?}");
    // RFC 8656 §7.2, item 8.
    let mut lab = Lab::new();
    let reply = lab.request(Method::Allocate, |writer| {
        dual(writer);
        writer.attribute(&EvenPort { reserve_next: true });
    });
    assert_eq!((reply.code(), lab.host.bound()), (400, 0));
}

#[test]
fn the_peers_family_chooses_the_relayed_address() {
    let mut lab = bound();
    for (number, peer, via) in [(0x4000, V4_PEER, lab.relayed()), (0x4001, V6_PEER, lab.relayed_v6())] {
        let out = Out::Peer { via, to: crate::PeerAddr::new(addr(peer)) };
        assert_eq!(lab.channel_data(number, b"x").sent().expect("bound").out, out);
        let sent = lab.indication(Method::Send, |writer| {
            writer.attribute(&XorPeerAddress(addr(peer))).attribute(&Data(b"x"));
        });
        assert_eq!(sent.sent().expect("permitted").out, out);
        let back = lab.at_relayed(via, peer, b"y").sent().expect("permitted");
        assert_eq!(back.bytes[..2], u16::to_be_bytes(number));
    }
}

#[test]
fn families_are_refreshed_apart() {
    // RFC 8656 §8.1.
    let mut lab = bound();
    lab.pass(100);
    assert_eq!(refresh(&mut lab, Some(2), 3600).code(), 0);
    let changes = lab.changes();
    let [Change::Put(record)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(record.expires_at, lab.now.wall + 3_600_000);
    assert_eq!(record.family_expires_at, [lab.now.wall + 500_000, lab.now.wall + 3_600_000]);
    assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono + Duration::from_secs(500)));
    // Without a family: both.
    assert_eq!(refresh(&mut lab, None, 700).code(), 0);
    assert_eq!(lab.server.poll_timeout(), Some(lab.now.mono + Duration::from_secs(700)));
    let changes = lab.changes();
    assert!(matches!(&changes[..], [Change::Put(record)] if record.family_expires_at.is_empty()));
}

#[test]
fn one_family_is_deleted_with_what_is_its_own_only() {
    // RFC 8656 §8.1: MUST NOT affect permissions and channels of the other family.
    for (family, kept, gone) in [(1, 0x4001, 0x4000), (2, 0x4000, 0x4001)] {
        let mut lab = bound();
        let reply = refresh(&mut lab, Some(family), 0);
        assert_eq!(reply.message().attribute(), Ok(Some(Lifetime(0))));
        let released = if family == 1 { lab.relayed() } else { lab.relayed_v6() };
        let outputs = lab.outputs();
        assert!(
            matches!(&outputs[..], [Output::Release { relayed, .. }, Output::Record(Change::Put(record))]
                if *relayed == released && record.relayed.len() == 1 && record.channels.len() == 1
                    && record.permissions.len() == 1),
            "{outputs:?}"
        );
        assert_eq!(lab.channel_data(gone, b"x").dropped(), Some(DropReason::NoChannel));
        assert_eq!(lab.channel_data(kept, b"x").dropped(), None);
        // It is not of that family any more.
        assert_eq!(refresh(&mut lab, Some(family), 600).code(), 443);
        let peer = if family == 1 { V4_PEER } else { V6_PEER };
        assert_eq!(lab.bind(gone, peer), 443);
        assert_eq!(lab.at_relayed(released, peer, b"x").dropped(), Some(DropReason::NoAllocation));
        // The last one takes the allocation with it.
        assert_eq!(refresh(&mut lab, Some(3 - family), 0).code(), 0);
        assert_eq!(lab.server.allocations(), 0);
        assert!(lab.outputs().iter().any(|output| matches!(output, Output::Record(Change::End { .. }))));
    }
}

#[test]
fn without_a_family_both_are_deleted() {
    let mut lab = bound();
    assert_eq!(refresh(&mut lab, None, 0).code(), 0);
    let outputs = lab.outputs();
    assert!(matches!(outputs[0], Output::Record(Change::End { reason: EndReason::Deleted, .. })));
    assert_eq!(outputs.iter().filter(|output| matches!(output, Output::Release { .. })).count(), 2);
    assert_eq!(lab.server.allocations(), 0);
}

#[test]
fn one_family_expires_before_the_other() {
    let mut lab = bound();
    assert_eq!(refresh(&mut lab, Some(2), 3600).code(), 0);
    lab.outputs();
    lab.pass(600);
    // Even before the timer is handed in.
    assert_eq!(lab.at_relayed(lab.relayed(), V4_PEER, b"x").dropped(), Some(DropReason::NoAllocation));
    lab.timeout();
    let outputs = lab.outputs();
    assert!(matches!(outputs[0], Output::Release { relayed, .. } if relayed == lab.relayed()));
    assert_eq!(lab.server.allocations(), 1);
    lab.pass(3000);
    lab.timeout();
    assert!(matches!(lab.outputs()[0], Output::Record(Change::End { reason: EndReason::Expired, .. })));
}

#[test]
fn comes_back_whole_or_in_part() {
    // Promise P2.
    let mut lab = bound();
    assert_eq!(refresh(&mut lab, Some(1), 3600).code(), 0);
    let record = lab.server.records(lab.now).next().expect("one");
    let mut other = Lab::new();
    other.now = lab.now;
    other.restore(record.clone());
    assert!(other.outputs().is_empty());
    let again = other.server.records(other.now).next().expect("restored");
    assert_eq!(again, record);
    // 599 s and 3600 s: IPv6 has ended while the relay was away.
    other = Lab::new();
    other.now = lab.now;
    other.pass(700);
    other.restore(record.clone());
    let outputs = other.outputs();
    assert!(matches!(&outputs[..], [Output::Release { relayed, .. }] if *relayed == lab.relayed_v6()), "{outputs:?}");
    let again = other.server.records(other.now).next().expect("restored");
    assert_eq!((again.relayed, again.channels.len()), (vec![lab.relayed()], 0));
    // A newer state without IPv6 gives it back.
    let mut newer = record;
    newer.sequence += 1;
    newer.relayed.truncate(1);
    newer.family_expires_at.clear();
    lab.restore(newer);
    let outputs = lab.outputs();
    assert!(
        outputs.iter().any(|output| matches!(output, Output::Release { relayed, .. } if *relayed == lab.relayed_v6()))
    );
    assert_eq!(lab.server.allocations(), 1);
}
