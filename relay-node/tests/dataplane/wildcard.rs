//! One socket for all relayed addresses. What holds either way is tested by all other files: with
//! `TURNPIKE_RELAYED=wildcard` they run so.

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result};
use relay_node::dataplane::{Dataplane, DataplaneConfig, RelayedMode};
use turn_core::Transport;
use turn_core::client::Event;
use turn_core::wire::attribute::Icmp;

use crate::client::{TurnClient, config, dropped, eventually, heard, peer, start};

fn wildcard(config: DataplaneConfig) -> DataplaneConfig {
    DataplaneConfig { relayed: RelayedMode::Wildcard, ..config }
}

fn descriptors() -> Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

fn allocations(dataplane: &Dataplane) -> u64 {
    dataplane.snapshots().iter().map(|worker| worker.allocations).sum()
}

/// A client's address, and the call it makes.
fn call(dataplane: &Dataplane, local: &str) -> Result<(TurnClient, UdpSocket, SocketAddr)> {
    let mut client = TurnClient::to(dataplane, Transport::Udp, local, "alice")?;
    let (relayed, peer) = (client.allocate()?, peer(local)?);
    client.permit(peer.local_addr()?)?;
    Ok((client, peer, relayed))
}

fn goes_on((client, peer, relayed): &mut (TurnClient, UdpSocket, SocketAddr)) -> Result<()> {
    let address = peer.local_addr()?;
    client.send(address, b"there")?;
    assert_eq!(heard(peer)?, (*relayed, b"there".to_vec()));
    peer.send_to(b"back", *relayed)?;
    assert_eq!(client.receive()?, (address, b"back".to_vec()));
    Ok(())
}

#[test]
fn thousands_of_allocations_take_no_descriptors() -> Result<()> {
    // By hand with all ports there are: TURNPIKE_ALLOCATIONS=50000.
    let count: u32 = std::env::var("TURNPIKE_ALLOCATIONS").map_or(Ok(5000), |count| count.parse())?;
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) =
        start(&DataplaneConfig { relay_ports: 10_000..=65_535, ..wildcard(config("127.1.8.1", 2, directory.path())) })?;
    let before = descriptors()?;
    let (mut kept, mut ports) = (Vec::new(), HashSet::new());
    for number in 0..count {
        // Another address each, because who has gone has its port taken by the next.
        let [_, high, middle, low] = number.to_be_bytes();
        let local = format!("127.{}.{middle}.{low}", 16 + high);
        let mut client = TurnClient::to(&dataplane, Transport::Udp, &local, "alice")?;
        let relayed = client.allocate().with_context(|| format!("allocation {number}"))?;
        assert!(ports.insert(relayed.port()), "a port twice");
        if number % (count / 20) == 0 {
            let peer = peer("127.0.0.1")?;
            client.permit(peer.local_addr()?)?;
            kept.push((client, peer, relayed));
        }
    }
    kept.iter_mut().try_for_each(goes_on)?;
    eventually("all of them", || (allocations(&dataplane) == u64::from(count)).then_some(()))?;
    let taken = descriptors()?.saturating_sub(before);
    assert_eq!(taken, 2 * kept.len(), "the test's own");
    Ok(())
}

#[test]
fn a_flood_of_strangers_stays_in_the_kernel() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&wildcard(config("127.1.8.2", 1, directory.path())))?;
    let mut one = call(&dataplane, "127.0.0.1")?;
    let mut other = call(&dataplane, "127.0.0.1")?;
    let stranger = UdpSocket::bind("127.0.0.2:0")?;
    for round in 0..20 {
        for _ in 0..1000 {
            stranger.send_to(&[0; 1200], one.2)?;
        }
        goes_on(&mut other).with_context(|| format!("round {round}"))?;
        goes_on(&mut one)?;
    }
    // A count of later than the flood.
    eventually("counted", || {
        let packets: u64 = dataplane.snapshots().iter().map(|worker| worker.packets[0]).sum();
        (packets == 40).then_some(())
    })?;
    assert_eq!(dropped(&dataplane, "no_permission"), 0);
    Ok(())
}

#[test]
fn errors_come_to_whom_they_concern() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&wildcard(config("127.1.8.3", 2, directory.path())))?;
    // IPv6: `sys/raw.rs`, because a relay at ::1 has no peers there.
    let (mut client, _peer, _) = call(&dataplane, "127.0.0.1")?;
    let mut other = call(&dataplane, "127.0.0.1")?;
    let closed = peer("127.0.0.1")?.local_addr()?;
    client.send(closed, b"nobody")?;
    assert_eq!(client.event()?, Event::Icmp(closed, Icmp { kind: 3, code: 3, data: 0 }));
    goes_on(&mut other).context("it has heard of nothing")
}

#[test]
fn a_port_that_another_program_has_is_not_given_away() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { relay_ports: 9000..=9001, ..wildcard(config("127.1.8.4", 1, directory.path())) };
    let (dataplane, _changes) = start(&config)?;
    let other = UdpSocket::bind("127.1.8.4:9000")?;
    let (mut client, peer, relayed) = call(&dataplane, "127.0.0.1")?;
    assert_eq!(relayed.port(), 9001);
    assert_eq!(TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?.refused()?, 508);
    // And is the other's as before.
    peer.send_to(b"x", other.local_addr()?)?;
    assert_eq!(heard(&other)?, (peer.local_addr()?, b"x".to_vec()));
    client.delete()?;
    drop(UdpSocket::bind(relayed).context("free again")?);
    Ok(())
}

#[test]
fn long_datagrams_are_fragmented_and_short_ones_are_not_in_their_way() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&wildcard(config("127.1.8.5", 1, directory.path())))?;
    let (mut client, peer, relayed) = call(&dataplane, "127.0.0.1")?;
    let address = peer.local_addr()?;
    for length in [1, 1232, 1233, 3, 20_000, 1500, 2, 65_000, 4] {
        client.send(address, &vec![7; length])?;
        let (from, data) = heard(&peer)?;
        assert_eq!((from, data.len()), (relayed, length));
    }
    Ok(())
}
