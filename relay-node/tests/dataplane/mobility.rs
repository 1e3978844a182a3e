//! Mobility (RFC 8016) over real sockets: from network to network, worker to worker, transport to transport.

use std::net::UdpSocket;

use anyhow::{Context, Result};
use relay_node::dataplane::{Dataplane, shard};
use relay_node::journal;
use turn_core::{KeyRing, Transport};

use crate::authority::{Authority, address, tls_config};
use crate::client::{TurnClient, again, config, eventually, heard, peer, start};

const WORKERS: u16 = 3;

/// A client from a fresh port, or from any, that a worker owns by its address.
fn client(dataplane: &Dataplane, transport: Transport, worker: Option<u16>) -> Result<TurnClient> {
    eventually("a port of that worker", || {
        let client = TurnClient::to(dataplane, transport, "127.0.0.1", "alice").ok()?;
        let owner = shard::worker(client.local().ok()?, WORKERS).0;
        worker.is_none_or(|worker| worker == owner).then_some(client)
    })
}

fn both_ways(client: &mut TurnClient, peer: &UdpSocket, relayed: std::net::SocketAddr) -> Result<()> {
    let address = peer.local_addr()?;
    for number in 0..50u8 {
        client.send(address, &[number; 700])?;
        assert_eq!(heard(peer)?, (relayed, vec![number; 700]));
        peer.send_to(&[number; 301], relayed)?;
        assert_eq!(client.receive()?, (address, vec![number; 301]));
    }
    Ok(())
}

#[test]
fn a_client_moves_between_workers_and_loses_nothing() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.4.1", WORKERS, directory.path()))?;
    for (from, to) in [(0, 1), (1, 0), (2, 2), (0, 2)] {
        let mut roamer = client(&dataplane, Transport::Udp, Some(from))?;
        let mut ticket = {
            let (relayed, ticket) = roamer.allocate_mobile()?;
            let peer = peer("127.0.0.1")?;
            roamer.bind_channel(0x4000, peer.local_addr()?)?;
            both_ways(&mut roamer, &peer, relayed)?;
            // Make before break: the new socket is there, and what the peer sends still comes to the old one.
            let mut new = client(&dataplane, Transport::Udp, Some(to))?;
            let next = new.resume(&ticket).with_context(|| format!("{from} to {to}"))?;
            peer.send_to(b"on the old way", relayed)?;
            assert_eq!(roamer.receive()?.1, b"on the old way");
            roamer.send(peer.local_addr()?, b"and back")?;
            assert_eq!(heard(&peer)?.1, b"and back");
            roamer.rewire(new);
            both_ways(&mut roamer, &peer, relayed).with_context(|| format!("{from} to {to}"))?;
            // Requests too.
            roamer.bind_channel(0x4001, "127.0.0.2:9".parse()?)?;
            next
        };
        // Again and again.
        for worker in [1, 2, 0] {
            roamer.rewire(client(&dataplane, Transport::Udp, Some(worker))?);
            ticket = roamer.resume(&ticket)?;
        }
        assert_eq!(roamer.not_resumed(&ticket)?, 400, "from where it is");
        roamer.delete()?;
        assert_eq!(client(&dataplane, Transport::Udp, None)?.not_resumed(&ticket)?, 437, "it has ended");
    }
    eventually("nothing is left", || {
        let held: u64 = dataplane.snapshots().iter().map(|worker| worker.allocations).sum();
        (held == 0).then_some(())
    })?;
    Ok(())
}

#[test]
fn a_ticket_is_of_its_owner() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.4.2", WORKERS, directory.path()))?;
    let mut alice = client(&dataplane, Transport::Udp, Some(0))?;
    let (relayed, ticket) = alice.allocate_mobile()?;
    let peer = peer("127.0.0.1")?;
    alice.permit(peer.local_addr()?)?;
    for _ in 0..6 {
        let mut bob = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "bob")?;
        assert_eq!(bob.not_resumed(&ticket)?, 441);
        assert_eq!(bob.not_resumed(&[b'A'; 32])?, 400);
    }
    both_ways(&mut alice, &peer, relayed)
}

#[test]
fn from_transport_to_transport() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["turn.example.org"])?];
    let (dataplane, _changes) = start(&tls_config("127.1.4.3", WORKERS, directory.path(), &files)?)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let client = |transport| match transport {
        Transport::Tls => authority.turn_client(tls, "turn.example.org", "alice"),
        transport => client(&dataplane, transport, None),
    };
    for (from, to) in [
        (Transport::Udp, Transport::Tcp),
        (Transport::Tcp, Transport::Udp),
        (Transport::Tcp, Transport::Tcp),
        (Transport::Udp, Transport::Tls),
        (Transport::Tls, Transport::Udp),
        (Transport::Tls, Transport::Tls),
        (Transport::Tls, Transport::Tcp),
        (Transport::Udp, Transport::Dtls),
        (Transport::Dtls, Transport::Udp),
        (Transport::Dtls, Transport::Dtls),
    ] {
        // The kernel chooses the worker of a connection: often enough for every pair.
        for round in 0..8 {
            let place = || format!("{from:?} to {to:?}, round {round}");
            let mut old = client(from)?;
            let (relayed, ticket) = old.allocate_mobile()?;
            let peer = peer("127.0.0.1")?;
            old.permit(peer.local_addr()?)?;
            both_ways(&mut old, &peer, relayed)?;
            let mut new = client(to)?;
            if round % 2 == 1 {
                // Break before make.
                drop(old);
                let next = new.resume(&ticket).with_context(place)?;
                both_ways(&mut new, &peer, relayed).with_context(place)?;
                assert_ne!(next, ticket);
            } else {
                new.resume(&ticket).with_context(place)?;
                both_ways(&mut old, &peer, relayed).with_context(place)?;
                both_ways(&mut new, &peer, relayed).with_context(place)?;
            }
            new.delete()?;
        }
    }
    Ok(())
}

#[test]
fn a_move_outlives_the_process() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let first = config("127.1.4.4", WORKERS, directory.path());
    let (dataplane, changes) = start(&first)?;
    let mut calls = Vec::new();
    for worker in 0..WORKERS {
        let mut roamer = client(&dataplane, Transport::Udp, Some(0))?;
        let (relayed, ticket) = roamer.allocate_mobile()?;
        let peer = peer("127.0.0.1")?;
        roamer.bind_channel(0x4000, peer.local_addr()?)?;
        roamer.rewire(client(&dataplane, Transport::Udp, Some(worker))?);
        let ticket = roamer.resume(&ticket)?;
        if worker > 0 {
            both_ways(&mut roamer, &peer, relayed)?;
        }
        calls.push((roamer, peer, relayed, ticket));
    }
    let second = again(&first, &dataplane);
    dataplane.stop();
    drop(changes);
    assert_eq!(journal::load(directory.path(), &KeyRing::default())?.records.len(), calls.len());
    let (dataplane, _changes) = start(&second)?;
    for (roamer, peer, relayed, ticket) in &mut calls {
        both_ways(roamer, peer, *relayed)?;
        roamer.rewire(client(&dataplane, Transport::Udp, None)?);
        roamer.resume(ticket)?;
        both_ways(roamer, peer, *relayed)?;
    }
    Ok(())
}
