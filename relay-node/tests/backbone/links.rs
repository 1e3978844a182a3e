//! Packets both ways, who may be at the other end, what happens when certificates change.

use anyhow::Result;
use relay_node::backbone::{Inbound, MemberList, Outbound, Settings, Usability};
use turn_core::IpMeta;

use crate::node::{Ca, Node, pair, relayed, wait_until};

#[test]
fn packets_travel_both_ways_as_they_are() -> Result<()> {
    let (_ca, mut one, mut two) = pair()?;
    let ip = IpMeta { dscp_ecn: 0xBA, ttl: 0, dont_fragment: true };
    let (source, destination) = (relayed(1, 7), relayed(2, 8));
    one.outbox
        .push(Outbound::Data { member: two.id(), source, destination, ip }, [b"head", b" and body"])
        .expect("room");
    one.outbox.wake();
    let (what, packet, _) = two.next()?;
    assert_eq!(what, Inbound::Data { from: one.id(), source, destination, ip });
    assert_eq!(packet, b"head and body");
    assert!(two.send(&one, 3, b"") && two.send(&one, 3, &[9; 1000]));
    let (what, packet, _) = one.next()?;
    let plain = IpMeta::default();
    assert_eq!(what, Inbound::Data { from: two.id(), source: relayed(2, 3), destination: relayed(1, 3), ip: plain });
    assert!(packet.is_empty());
    assert_eq!(one.next()?.1, [9; 1000]);
    Ok(())
}

#[test]
fn many_packets_arrive_in_order() -> Result<()> {
    let (_ca, mut one, two) = pair()?;
    for number in 0..10_000u32 {
        let mut payload = [0; 200];
        payload[..4].copy_from_slice(&number.to_be_bytes());
        while !one.send(&two, 0, &payload) {
            std::thread::yield_now();
        }
        if number % 32 == 31 {
            // A pace that any machine keeps up with.
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
    }
    let mut missing = 0;
    let mut expected = 0u32;
    while expected < 10_000 {
        let (_, packet, _) = two.next()?;
        let number = u32::from_be_bytes(packet[..4].try_into()?);
        assert!(number >= expected, "{number} behind {expected}");
        missing += number - expected;
        expected = number + 1;
    }
    assert!(missing < 200, "{missing} of 10,000 are missing: {:?}", one.backbone.report());
    Ok(())
}

#[test]
fn links_go_over_ipv6_too() -> Result<()> {
    let ca = Ca::new()?;
    let v6 = |settings: &mut Settings| settings.listen = vec![(std::net::Ipv6Addr::LOCALHOST, 0).into()];
    let (mut one, two) = (Node::start_with(&ca, 1, v6)?, Node::start_with(&ca, 2, v6)?);
    one.set_members(vec![two.member()]);
    two.set_members(vec![one.member()]);
    one.wait_for(two.id(), Usability::Link)?;
    assert!(one.send(&two, 0, b"six"));
    assert_eq!(two.next()?.1, b"six");
    Ok(())
}

#[test]
fn long_packets_are_cut_and_joined() -> Result<()> {
    let (_ca, mut one, two) = pair()?;
    for length in [1300, 1472, 2000, 9_000] {
        let payload: Vec<u8> = (0..length).map(|value| value as u8).collect();
        assert!(one.send(&two, 1, &payload));
        assert_eq!(two.next()?.1, payload, "{length} bytes");
    }
    Ok(())
}

#[test]
fn a_certificate_is_replaced_without_losing_a_packet() -> Result<()> {
    let (ca, mut one, mut two) = pair()?;
    let connects = |node: &Node, other: &Node| node.report(other.id()).map_or(0, |report| report.counts.connects);
    let mut sent = 0u32;
    for round in 1..=2 {
        for node in [&one, &two] {
            let identity = ca.issue(&format!("turnpike://relay/{}", node.name), 100 + round)?;
            node.backbone.renew(&identity)?;
        }
        let began = std::time::Instant::now();
        while connects(&one, &two) <= u64::from(round) || connects(&two, &one) <= u64::from(round) {
            assert!(began.elapsed() < crate::node::PATIENCE, "{:?}", one.backbone.report());
            assert_eq!((one.usability(two.id()), two.usability(one.id())), (Usability::Link, Usability::Link));
            assert!(one.send(&two, 0, &sent.to_be_bytes()) && two.send(&one, 0, &sent.to_be_bytes()));
            sent += 1;
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    for node in [&one, &two] {
        let mut numbers = Vec::new();
        while numbers.len() < sent as usize {
            numbers.push(u32::from_be_bytes(node.next()?.1[..].try_into()?));
        }
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), sent as usize, "each once");
    }
    let foreign = ca.issue("turnpike://relay/somebody", 9)?;
    let error = one.backbone.renew(&foreign).expect_err("of another relay").to_string();
    assert!(error.contains("turnpike://relay/relay-1"), "{error}");
    Ok(())
}

#[test]
fn who_is_revoked_or_no_longer_a_member_is_out_at_once() -> Result<()> {
    let (_ca, one, two) = pair()?;
    one.set_list(MemberList { members: vec![two.member()], revoked_serials: vec![vec![2]] });
    two.wait_for(one.id(), Usability::PlainUdp)?;
    one.wait_for(two.id(), Usability::PlainUdp)?;
    wait_until("it is said", || one.report(two.id()).is_some_and(|report| report.why == "certificate revoked"))?;
    wait_until("it hears why", || {
        two.report(one.id()).is_some_and(|report| report.why == "certificate revoked, it says")
    })?;
    // It goes on trying, and is refused each time: it is never used.
    let tries = || two.report(one.id()).map_or(0, |report| report.counts.connects);
    let before = tries();
    wait_until("it has tried again", || {
        assert_ne!((one.usability(two.id()), two.usability(one.id())), (Usability::Link, Usability::Link));
        tries() > before
    })?;

    one.set_members(vec![two.member()]);
    one.wait_for(two.id(), Usability::Link)?;
    one.set_members(Vec::new());
    one.wait_for(two.id(), Usability::Nothing)?;
    two.wait_for(one.id(), Usability::PlainUdp)?;
    Ok(())
}

#[test]
fn neither_strangers_nor_other_roles_get_a_link() -> Result<()> {
    let (ca, other) = (Ca::new()?, Ca::new()?);
    let one = Node::start(&ca, 1)?;
    // Of another cluster.
    let stranger = Node::start(&other, 2)?;
    one.set_members(vec![stranger.member()]);
    stranger.set_members(vec![one.member()]);
    wait_until("it is refused", || {
        [(&one, &stranger), (&stranger, &one)]
            .iter()
            .all(|(node, far)| node.report(far.id()).is_some_and(|report| report.why == "refused"))
    })?;
    assert_eq!(one.usability(stranger.id()), Usability::PlainUdp);
    drop(stranger);
    // Of this cluster, and not in the list.
    let unlisted = Node::start(&ca, 3)?;
    unlisted.set_members(vec![one.member()]);
    wait_until("it hears why", || {
        unlisted.report(one.id()).is_some_and(|report| report.why == "not a member, it says")
    })?;
    Ok(())
}
