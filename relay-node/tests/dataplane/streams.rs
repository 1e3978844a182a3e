//! TCP between client and relay (RFC 8656 §12.5).

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result};
use relay_node::dataplane::{Dataplane, DataplaneConfig};
use turn_core::{Change, EndReason, Transport};

use crate::client::{self, PATIENCE, TurnClient, again, config, dropped, eventually, heard, peer, start};

fn tcp(dataplane: &Dataplane) -> Result<std::net::SocketAddr> {
    let mut listen = dataplane.listen().iter();
    Ok(listen.find(|listen| listen.transport == Transport::Tcp).context("a TCP listener")?.bind)
}

#[test]
fn frames_are_found_however_they_are_cut_and_joined() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.1.1", 2, directory.path()))?;
    let peer = peer("127.0.0.1")?;
    let address = peer.local_addr()?;
    for piece in [1, 7, 1000] {
        let mut client = TurnClient::to(&dataplane, Transport::Tcp, "127.0.0.1", "alice")?;
        client.piece = piece;
        let relayed = client.allocate()?;
        client.bind_channel(0x4000, address)?;
        for length in [0, 1, 2, 3, 4, 300, 20_000] {
            let data = vec![9; length];
            client.send(address, &data)?;
            assert_eq!(heard(&peer)?, (relayed, data.clone()), "in pieces of {piece}");
            peer.send_to(&data, relayed)?;
            assert_eq!(client.receive()?, (address, data), "in pieces of {piece}");
        }
    }

    // Several frames in one segment, the last one cut.
    let mut client = TurnClient::to(&dataplane, Transport::Tcp, "127.0.0.1", "alice")?;
    client.allocate()?;
    client.bind_channel(0x4000, address)?;
    let frame = |text: &[u8]| [&[0x40, 0, 0, text.len() as u8], text, &[0; 3][..(4 - text.len() % 4) % 4]].concat();
    let joined = [frame(b"one"), frame(b"two"), frame(b"three"), frame(b"four")].concat();
    let (now, later) = joined.split_at(joined.len() - 5);
    client.write(now)?;
    for expected in [&b"one"[..], b"two", b"three"] {
        assert_eq!(heard(&peer)?.1, expected);
    }
    client.write(later)?;
    assert_eq!(heard(&peer)?.1, b"four");
    Ok(())
}

#[test]
fn the_allocation_ends_with_its_connection() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, mut changes) = start(&config("127.1.1.2", 2, directory.path()))?;
    let mut client = TurnClient::to(&dataplane, Transport::Tcp, "127.0.0.1", "alice")?;
    let relayed = client.allocate()?;
    client::hear(&mut changes);
    drop(client);
    let closed = eventually("the end is reported", || match changes.try_recv() {
        Ok(Change::End { reason, .. }) => Some(reason == EndReason::Closed),
        _ => None,
    })?;
    assert!(closed);
    eventually("the relayed address is free", || std::net::UdpSocket::bind(relayed).ok())?;
    eventually("the connection is gone", || {
        let open: u64 = dataplane.snapshots().iter().map(|worker| worker.connections).sum();
        (open == 0).then_some(())
    })?;
    Ok(())
}

#[test]
fn allocations_of_streams_end_with_the_process() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = config("127.1.1.3", 2, directory.path());
    let (dataplane, _changes) = start(&config)?;
    let mut client = TurnClient::to(&dataplane, Transport::Tcp, "127.0.0.1", "alice")?;
    let relayed = client.allocate()?;
    let config = again(&config, &dataplane);
    dataplane.stop();
    let (dataplane, mut changes) = start(&config)?;
    let Ok(Change::End { reason, epoch, .. }) = changes.try_recv() else {
        anyhow::bail!("the end is not reported");
    };
    assert_eq!((reason, epoch), (EndReason::Closed, 2));
    assert!(std::net::UdpSocket::bind(relayed).is_ok(), "nobody holds its address");
    dataplane.stop();
    let (_dataplane, mut changes) = start(&config)?;
    assert!(changes.try_recv().is_err(), "it ends once");
    Ok(())
}

#[test]
fn what_is_not_turn_is_closed_and_connections_are_bounded() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { max_connections: 2, ..config("127.1.1.4", 1, directory.path()) };
    let (dataplane, _changes) = start(&config)?;
    let address = tcp(&dataplane)?;
    let ends = |mut stream: TcpStream| -> Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        // The end of the stream, or a reset where the relay had not read everything.
        match stream.read(&mut [0; 64]) {
            Ok(0) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            other => anyhow::bail!("still open: {other:?}"),
        }
    };
    let mut browser = TcpStream::connect(address)?;
    browser.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    ends(browser)?;
    let mut hoarder = TcpStream::connect(address)?;
    // ChannelData of 65,535 bytes is announced by somebody without an allocation.
    hoarder.write_all(&[0x40, 0, 0xff, 0xff])?;
    ends(hoarder)?;

    let mut first = TurnClient::to(&dataplane, Transport::Tcp, "127.0.0.1", "alice")?;
    first.allocate()?;
    // Holds half a message for ever; it hurts nobody.
    let mut second = TcpStream::connect(address)?;
    second.write_all(&[0, 1, 0, 0, 0x21])?;
    ends(TcpStream::connect(address)?).context("one too many")?;
    first.delete()?;
    drop(second);
    eventually("the refusal is counted", || (dropped(&dataplane, "connections") == 1).then_some(()))?;
    Ok(())
}

#[test]
fn media_for_a_client_that_does_not_read_are_dropped_whole() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { stream_send_cap: 20_000, ..config("127.1.1.5", 1, directory.path()) };
    let (dataplane, _changes) = start(&config)?;
    let mut client = TurnClient::to(&dataplane, Transport::Tcp, "127.0.0.1", "alice")?;
    let relayed = client.allocate()?;
    let peer = peer("127.0.0.1")?;
    client.bind_channel(0x4000, peer.local_addr()?)?;
    eventually("the send queue is full", || {
        for _ in 0..200 {
            peer.send_to(&[5; 1001], relayed).ok()?;
        }
        (dropped(&dataplane, "stream_queue") > 0).then_some(())
    })?;
    // Framing is intact and answers are not lost: the client finds its answer behind the media.
    client.permit(peer.local_addr()?)?;
    assert!(client.data.iter().all(|(_, data)| data == &[5; 1001]));
    assert!(client.data.len() > 20);
    Ok(())
}
