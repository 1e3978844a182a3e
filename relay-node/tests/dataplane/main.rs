//! The data plane on loopback, with real sockets and real threads. Each test has a loopback address of its own.

mod accounts;
mod authentication;
mod authority;
mod backbone;
mod bandwidth;
mod bursts;
mod client;
mod connected;
mod discovery;
mod door;
mod drain;
mod dtls;
mod dual;
mod mobility;
mod pairs;
mod pipe_limits;
mod proxy;
mod restart;
mod streams;
mod tcp_allocations;
mod tls;
mod web;
mod wildcard;

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result};
use client::{TurnClient, config, dropped, eventually, heard, peer, start};
use relay_node::dataplane::{Dataplane, DataplaneConfig, Listen, shard};
use turn_core::{Change, EndReason, Transport};

/// Permission, Send and Data indications, then a channel: both ways, sources right.
pub(crate) fn call(client: &mut TurnClient) -> Result<()> {
    let relayed = client.allocate()?;
    let peer = peer("127.0.0.1")?;
    let address = peer.local_addr()?;
    client.permit(address)?;
    for round in 0..2 {
        for length in [0, 1, 5, 172, 1200, 9000] {
            let data = vec![length as u8; length];
            client.send(address, &data)?;
            assert_eq!(heard(&peer)?, (relayed, data.clone()), "round {round}");
            peer.send_to(&data, relayed)?;
            assert_eq!(client.receive()?, (address, data), "round {round}");
        }
        if round == 0 {
            client.bind_channel(0x4001, address)?;
        }
    }
    Ok(())
}

#[test]
fn a_client_and_a_peer_talk_over_udp_and_tcp() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.0.1", 2, directory.path()))?;
    for transport in [Transport::Udp, Transport::Tcp] {
        // More than one of each, so that both workers have some.
        for _ in 0..4 {
            call(&mut TurnClient::to(&dataplane, transport, "127.0.0.1", "alice")?)
                .with_context(|| format!("over {transport:?}"))?;
        }
    }
    let count = |index: usize| dataplane.snapshots().iter().map(|worker| worker.packets[index]).sum::<u64>();
    eventually("both directions are counted", || (count(0) == 8 * 12 && count(1) == 8 * 12).then_some(()))?;
    assert!(dataplane.alive(Duration::from_secs(5)));
    Ok(())
}

/// A client that a given worker owns.
fn client_of(dataplane: &Dataplane, worker: u16, workers: u16, local: &str) -> Result<TurnClient> {
    eventually("a port of that worker", || {
        let client = TurnClient::to(dataplane, Transport::Udp, local, "alice").ok()?;
        (shard::worker(client.local().ok()?, workers).0 == worker).then_some(client)
    })
}

#[test]
fn pairs_meet_on_one_node_whichever_workers_own_them() -> Result<()> {
    const MESSAGES: u32 = 500;
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.0.2", 3, directory.path()))?;
    for local in ["127.0.0.1", "::1"] {
        for (one, other) in [(0, 1), (1, 0), (2, 2), (0, 2)] {
            let mut alice = client_of(&dataplane, one, 3, local)?;
            let mut bob = client_of(&dataplane, other, 3, local)?;
            let (of_alice, of_bob) = (alice.allocate()?, bob.allocate()?);
            alice.bind_channel(0x4000, of_bob)?;
            bob.permit(of_alice)?;
            for number in 0..MESSAGES {
                let data = number.to_be_bytes();
                alice.send(of_bob, &data)?;
                assert_eq!(bob.receive()?, (of_alice, data.to_vec()), "{one} to {other} over {local}");
                bob.send(of_alice, &data)?;
                assert_eq!(alice.receive()?, (of_bob, data.to_vec()), "{other} to {one} over {local}");
            }
            // Without waiting for each other: a burst crosses in order and whole.
            for number in 0..100u32 {
                alice.send(of_bob, &number.to_be_bytes())?;
            }
            for number in 0..100u32 {
                assert_eq!(bob.receive()?, (of_alice, number.to_be_bytes().to_vec()));
            }
        }
    }
    assert_eq!(dataplane.snapshots().iter().map(|worker| worker.crossed).sum::<u64>(), 0);
    Ok(())
}

#[test]
fn answers_leave_from_the_address_that_was_asked() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let any = Listen { transport: Transport::Udp, bind: "0.0.0.0:0".parse()? };
    let config = DataplaneConfig { listen: vec![any], ..config("127.1.0.3", 2, directory.path()) };
    let (dataplane, _changes) = start(&config)?;
    let port = dataplane.listen()[0].bind.port();
    for address in ["127.9.0.1", "127.9.0.2", "127.1.0.3"] {
        // The socket is connected: nothing from another address gets through.
        let relay = std::net::SocketAddr::new(address.parse()?, port);
        call(&mut TurnClient::new(Transport::Udp, "127.0.0.1", relay, "alice")?)?;
    }
    Ok(())
}

#[test]
fn no_two_allocations_share_a_port_and_an_ended_one_frees_its_own() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { relay_ports: 30_000..=30_019, ..config("127.1.0.4", 2, directory.path()) };
    let (dataplane, mut changes) = start(&config)?;
    let mut clients = Vec::new();
    let mut ports = HashSet::new();
    for _ in 0..20 {
        let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
        assert!(ports.insert(client.allocate()?.port()), "a port twice");
        clients.push(client);
    }
    let mut late = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    assert_eq!(late.refused()?, 508, "no port is left");
    client::hear(&mut changes);
    clients[7].delete()?;
    let freed = late.allocate()?.port();
    assert!(ports.contains(&freed));
    let mut ended = 0;
    while let Ok(change) = changes.try_recv() {
        ended += u32::from(matches!(change, Change::End { reason: EndReason::Deleted, .. }));
    }
    assert_eq!(ended, 1, "reported once");
    Ok(())
}

#[test]
fn a_user_has_no_more_than_the_quota_whichever_workers_serve() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { user_quota: 3, max_allocations: 5, ..config("127.1.0.5", 4, directory.path()) };
    let (dataplane, _changes) = start(&config)?;
    let client = |user| TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", user);
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(client("alice")?);
        clients.last_mut().context("pushed")?.allocate()?;
    }
    assert_eq!(client("alice")?.refused()?, 486);
    let (mut bob, mut more) = (client("bob")?, client("bob")?);
    bob.allocate()?;
    more.allocate()?;
    assert_eq!(client("bob")?.refused()?, 508, "of the node");
    clients[0].delete()?;
    client("alice")?.allocate()?;
    assert_eq!(client("alice")?.refused()?, 486);
    Ok(())
}

#[test]
fn own_addresses_without_an_allocation_are_nobody() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.0.6", 2, directory.path()))?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let relayed = client.allocate()?;
    client.permit(relayed)?;
    let service = peer("127.1.0.6")?;
    client.send(service.local_addr()?, b"to a service of the relay's machine")?;
    client.send(dataplane.listen()[0].bind, b"to the relay itself")?;
    eventually("both are dropped", || (dropped(&dataplane, "nobody_there") == 2).then_some(()))?;
    service.set_nonblocking(true)?;
    assert!(heard(&service).is_err());
    Ok(())
}

#[test]
fn unreachable_peers_neither_stop_nor_spin_a_worker() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.0.7", 1, directory.path()))?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let relayed = client.allocate()?;
    let closed = peer("127.0.0.1")?.local_addr()?;
    let alive = peer("127.0.0.1")?;
    client.permit(closed)?;
    for number in 0..50u8 {
        client.send(closed, b"nobody listens")?;
        client.send(alive.local_addr()?, &[number])?;
        assert_eq!(heard(&alive)?, (relayed, vec![number]), "no error costs another packet");
    }
    // A worker that spins uses all the time there is between two snapshots.
    let busy = || dataplane.snapshots()[0].cpu_micros;
    let first = eventually("a snapshot", || (busy() > 0).then(busy))?;
    let second = eventually("another snapshot", || (busy() > first).then(busy))?;
    let third = eventually("a third snapshot", || (busy() > second).then(busy))?;
    assert!(third - second < 500_000, "{} us of a second with nothing to do", third - second);
    Ok(())
}

#[test]
fn revoked_allocations_end_whichever_worker_has_them() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, mut changes) = start(&config("127.1.0.8", 3, directory.path()))?;
    let mut clients = Vec::new();
    for _ in 0..6 {
        let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
        client.allocate()?;
        clients.push(client);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let records = runtime.block_on(dataplane.records());
    assert_eq!(records.len(), 6);
    records.iter().for_each(|record| dataplane.revoke(record.id));
    let mut revoked = HashSet::new();
    eventually("every end is reported", || {
        while let Ok(change) = changes.try_recv() {
            if let Change::End { id, reason, .. } = change {
                assert_eq!(reason, EndReason::Revoked);
                revoked.insert(id);
            }
        }
        (revoked.len() == 6).then_some(())
    })?;
    assert!(runtime.block_on(dataplane.records()).is_empty());
    assert!(!dataplane.take_overflow());
    Ok(())
}
