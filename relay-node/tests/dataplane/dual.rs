//! Dual allocations, DONT-FRAGMENT and ICMP errors over real sockets (RFC 8656 §7.2, §11.5, §14).

use std::net::SocketAddr;

use anyhow::{Result, bail};
use turn_core::Transport;
use turn_core::client::{Event, Extensions};
use turn_core::wire::attribute::Icmp;

use crate::client::{TurnClient, again, config, heard, peer, start};

fn dual(client: &mut TurnClient) -> Result<[SocketAddr; 2]> {
    client.extend(Extensions { dual: true, ..Extensions::default() });
    let first = client.allocate()?;
    match client.event()? {
        Event::AlsoRelayed(second) => Ok([first, second]),
        other => bail!("one address only: {other:?}"),
    }
}

#[test]
fn peers_of_both_families_and_after_a_restart_too() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let first = config("127.1.5.1", 2, directory.path());
    let (dataplane, changes) = start(&first)?;
    let open = || TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice");
    let (mut alice, mut bob) = (open()?, open()?);
    let (of_alice, of_bob) = (dual(&mut alice)?, dual(&mut bob)?);
    assert!(of_alice[0].is_ipv4() && of_alice[1].is_ipv6(), "{of_alice:?}");
    // Loopback has one address of IPv6, and it is the relay's: the other client stands for a peer.
    let peer = peer("127.0.0.1")?;
    let address = peer.local_addr()?;
    alice.bind_channel(0x4000, address)?;
    alice.bind_channel(0x4001, of_bob[1])?;
    bob.permit(of_alice[1])?;
    let mut talk = || -> Result<()> {
        alice.send(address, b"there")?;
        assert_eq!(heard(&peer)?, (of_alice[0], b"there".to_vec()));
        peer.send_to(b"back", of_alice[0])?;
        assert_eq!(alice.receive()?, (address, b"back".to_vec()));
        alice.send(of_bob[1], b"there")?;
        assert_eq!(bob.receive()?, (of_alice[1], b"there".to_vec()));
        bob.send(of_alice[1], b"back")?;
        assert_eq!(alice.receive()?, (of_bob[1], b"back".to_vec()));
        Ok(())
    };
    talk()?;
    let second = again(&first, &dataplane);
    dataplane.stop();
    drop(changes);
    let (_dataplane, _changes) = start(&second)?;
    talk()?;
    alice.delete()?;
    for relayed in of_alice {
        std::net::UdpSocket::bind(relayed)?;
    }
    Ok(())
}

#[test]
fn a_closed_port_is_told_to_the_client() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.5.2", 2, directory.path()))?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    client.allocate()?;
    let closed = peer("127.0.0.1")?.local_addr()?;
    client.permit(closed)?;
    client.send(closed, b"nobody")?;
    assert_eq!(client.event()?, Event::Icmp(closed, Icmp { kind: 3, code: 3, data: 0 }));
    Ok(())
}

#[test]
fn data_that_must_not_be_fragmented_arrives_between_others() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.5.3", 1, directory.path()))?;
    let mut client = TurnClient::to(&dataplane, Transport::Udp, "127.0.0.1", "alice")?;
    let relayed = client.allocate()?;
    let peer = peer("127.0.0.1")?;
    let address = peer.local_addr()?;
    client.permit(address)?;
    for round in 0..5u8 {
        // No more than the peer's buffer holds.
        for number in 0..40 {
            let data = [round * 40 + number; 1200];
            if number % 3 == 0 {
                client.send_unfragmented(address, &data)?;
            } else {
                client.send(address, &data)?;
            }
        }
        for number in 0..40 {
            assert_eq!(heard(&peer)?, (relayed, vec![round * 40 + number; 1200]));
        }
    }
    Ok(())
}
