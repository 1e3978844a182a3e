//! abuse.md G: what a member that has been taken over, or anybody, can do to a link: nothing.
//!
//! Flood, flaps and replay are in `networks.rs`.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use quinn::Connection;
use relay_node::backbone::{Inbound, LinkDrop, Outbound, Usability};
use turn_core::IpMeta;

use crate::node::{Ca, Node, ip, pair, relayed, wait_until};
use crate::rogue::{Rogue, data};
use crate::wire::{Conditions, Wire};

const DATA: u8 = 0x11;
const INGRESS_REPLY: u8 = 0x16;

/// A node and a rogue member connected to it.
fn infiltrated(others: &[&Node]) -> Result<(Ca, Node, Rogue, Connection)> {
    let ca = Ca::new()?;
    let rogue = Rogue::new(&ca.issue("turnpike://relay/relay-9", 9)?, 9)?;
    let node = Node::start(&ca, 1)?;
    node.set_members([rogue.member.clone()].into_iter().chain(others.iter().map(|other| other.member())).collect());
    let connection = rogue.connect(node.address())?;
    Ok((ca, node, rogue, connection))
}

/// Sends frames; each is counted for this reason.
fn are_dropped<const N: usize>(
    node: &Node,
    rogue: &Rogue,
    connection: &Connection,
    frames: [Bytes; N],
    reason: LinkDrop,
) -> Result<()> {
    let count = || node.report(rogue.member.id).map_or(0, |report| report.counts.drops.of(reason));
    let before = count();
    for frame in frames {
        connection.send_datagram(frame)?;
    }
    wait_until(reason.label(), || count() == before + N as u64)
}

#[test]
fn a_member_can_only_speak_for_itself() -> Result<()> {
    let (_ca, node, rogue, connection) = infiltrated(&[])?;
    let foreign_port = SocketAddr::from((ip(9), 3478));
    let forged = [relayed(2, 0), relayed(1, 0), foreign_port, "127.0.0.1:50000".parse()?]
        .map(|source| data(DATA, source, relayed(1, 0), b"forged"));
    are_dropped(&node, &rogue, &connection, forged, LinkDrop::NotItsSource)?;
    let astray = [relayed(2, 0), "127.0.0.1:50000".parse()?, "10.0.0.1:22".parse()?]
        .map(|destination| data(DATA, relayed(9, 0), destination, b"astray"));
    are_dropped(&node, &rogue, &connection, astray, LinkDrop::NotOurDestination)?;
    assert!(node.all().is_empty());
    connection.send_datagram(data(DATA, relayed(9, 0), relayed(1, 0), b"its own"))?;
    assert_eq!(node.next()?.1, b"its own");
    Ok(())
}

#[test]
fn unknown_and_malformed_frames_are_counted_and_nothing_else() -> Result<()> {
    let (_ca, node, rogue, connection) = infiltrated(&[])?;
    let unknown = [&b"\x2f"[..], b"\x1e later", b"\x21\0\0"].map(Bytes::from_static);
    are_dropped(&node, &rogue, &connection, unknown, LinkDrop::UnknownFrame)?;
    // A piece within pieces, too.
    let (first, second) = (&b"\x12\0\0\0\x07\0\x02\x12\0\0\0"[..], &b"\x12\0\0\0\x07\x01\x02\x08\0\x02x"[..]);
    connection.send_datagram(Bytes::from_static(first))?;
    let malformed = [second, b"\x11\0", b"\x12\0\0\0\0\x05\x02", b"\x19\0"].map(Bytes::from_static);
    are_dropped(&node, &rogue, &connection, malformed, LinkDrop::Malformed)?;
    connection.send_datagram(data(DATA, relayed(9, 0), relayed(1, 0), b"goes on"))?;
    assert_eq!(node.next()?.1, b"goes on");
    Ok(())
}

#[test]
fn a_client_is_answered_on_behalf_of_others_only_where_it_has_asked() -> Result<()> {
    let (_ca, mut node, rogue, connection) = infiltrated(&[])?;
    let (client, server) = (SocketAddr::from(([198, 51, 100, 7], 40_000)), SocketAddr::from((ip(1), 3478)));
    let reply = data(INGRESS_REPLY, client, server, b"unasked");
    are_dropped(&node, &rogue, &connection, [reply.clone()], LinkDrop::UnaskedReply)?;
    let ip = IpMeta::default();
    node.outbox.push(Outbound::Ingress { member: rogue.member.id, client, server, ip }, [b"asks", b""]).expect("room");
    node.outbox.wake();
    let asked = rogue.runtime.block_on(async {
        loop {
            let datagram = connection.read_datagram().await?;
            if datagram[0] == 0x15 {
                return anyhow::Ok(datagram);
            }
        }
    })?;
    assert_eq!(asked, data(0x15, client, server, b"asks"));
    connection.send_datagram(reply)?;
    let (what, packet, _) = node.next()?;
    assert_eq!(what, Inbound::IngressReply { from: rogue.member.id, client, server, ip });
    assert_eq!(packet, b"unasked");
    let other = data(INGRESS_REPLY, SocketAddr::from(([198, 51, 100, 7], 40_001)), server, b"another");
    are_dropped(&node, &rogue, &connection, [other], LinkDrop::UnaskedReply)
}

#[test]
fn nothing_goes_round() -> Result<()> {
    let (_ca, node, rogue, connection) = infiltrated(&[])?;
    let tag = |name: &str| {
        use sha2::Digest;
        let digest = sha2::Sha256::digest(name.as_bytes());
        digest[..8].to_vec()
    };
    let via = |name: &str| Bytes::from([&[0x13][..], &tag(name), b"packet"].concat());
    // Back to who sends it, to the one in the middle itself, to nobody.
    let nowhere = ["relay-9", "relay-1", "somebody"].map(via);
    are_dropped(&node, &rogue, &connection, nowhere, LinkDrop::NotPassedOn)?;
    // Said to come from somebody who is no member, or from the one in the middle.
    let relayed = ["somebody", "relay-9"].map(|name| Bytes::from([&[0x14][..], &tag(name), b"packet"].concat()));
    are_dropped(&node, &rogue, &connection, relayed, LinkDrop::NotDelivered)
}

#[test]
fn a_flood_of_first_packets_costs_links_nothing() -> Result<()> {
    let (_ca, mut one, two) = pair()?;
    // First packets of QUIC that nobody can read, from many ports.
    let target = two.address();
    let flood = std::thread::spawn(move || -> std::io::Result<u32> {
        let (mut sent, began) = (0u32, Instant::now());
        while began.elapsed() < Duration::from_secs(2) {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            for _ in 0..5 {
                let mut packet = [0u8; 1200];
                packet[..6].copy_from_slice(&[0xC3, 0, 0, 0, 1, 8]);
                packet[6..10].copy_from_slice(&sent.to_be_bytes());
                socket.send_to(&packet, target)?;
                sent += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(sent)
    });
    let mut number = 0;
    while !flood.is_finished() {
        assert!(one.send(&two, 0, b"beside it"));
        assert_eq!(one.usability(two.id()), Usability::Link);
        number += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    let flooded = flood.join().expect("no panic")?;
    let arrived = std::cell::Cell::new(0);
    wait_until("what was sent beside it arrives", || {
        arrived.set(arrived.get() + two.all().len());
        arrived.get() * 100 >= number * 99
    })?;
    assert!(flooded > 1_000 && number > 100, "{number} beside {flooded}");
    Ok(())
}

#[test]
fn a_stranger_who_begins_handshakes_and_leaves_them_does_not_keep_members_out() -> Result<()> {
    let ca = Ca::new()?;
    let (one, two) = (Node::start(&ca, 1)?, Node::start(&ca, 2)?);
    let stranger = Rogue::new(&Ca::new()?.issue("turnpike://relay/relay-8", 8)?, 8)?;
    let target = two.address();
    // Many at once, none of which can succeed.
    let connecting: Vec<_> = {
        let _context = stranger.runtime.enter();
        (0..200)
            .map(|_| stranger.endpoint.connect_with(stranger.config.clone(), target, "relay.turnpike"))
            .collect::<Result<_, _>>()?
    };
    one.set_members(vec![two.member()]);
    two.set_members(vec![one.member()]);
    let took = one.wait_for(two.id(), Usability::Link)?;
    assert!(took < Duration::from_secs(3), "{took:?}");
    drop(connecting);
    Ok(())
}

#[test]
fn whoever_comes_from_no_members_address_shows_where_it_is_first() -> Result<()> {
    let ca = Ca::new()?;
    let (node, other) = (Node::start(&ca, 1)?, Node::start(&ca, 2)?);
    let rogue = Rogue::new(&ca.issue("turnpike://relay/relay-9", 9)?, 9)?;
    let connect = || -> Result<usize> {
        let wire = Wire::between([rogue.endpoint.local_addr()?, node.address()], Conditions::default())?;
        rogue.connect(wire.ends()[0])?;
        Ok(wire.retries())
    };
    assert_eq!(connect()?, 1, "a stranger");
    // From now on 127.0.0.1 is the address of a member.
    node.set_members(vec![other.member()]);
    wait_until("the list is in force", || node.report(other.id()).is_some())?;
    assert_eq!(connect()?, 0, "it may be a member");
    Ok(())
}
