//! PROXY headers (version 2) on datagrams: each one carries its own, and answers go back to the proxy without one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use relay_node::dataplane::{DataplaneConfig, StreamConfig};
use turn_core::Transport;
use turn_core::policy::Network;
use turn_core::wire::attribute::XorMappedAddress;
use turn_core::wire::{Class, Message, MessageWriter, Method, TransactionId};

use crate::client::{PATIENCE, TurnClient, config, dropped, eventually, heard, peer, start};

/// A proxy of one client.
struct Proxy {
    socket: UdpSocket,
    header: Vec<u8>,
}

impl Proxy {
    fn new(local: &str, relay: SocketAddr, client: (Ipv4Addr, u16)) -> Result<Self> {
        let socket = UdpSocket::bind((local, 0))?;
        socket.connect(relay)?;
        socket.set_read_timeout(Some(Duration::from_millis(10)))?;
        // PROXY, IPv4 and UDP, 12 bytes of addresses; the destination is the proxy's.
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0C".to_vec();
        header.extend(client.0.octets());
        header.extend([203, 0, 113, 1]);
        header.extend(client.1.to_be_bytes());
        header.extend(3478u16.to_be_bytes());
        Ok(Self { socket, header })
    }
}

impl Read for Proxy {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.socket.recv(buffer)
    }
}

impl Write for Proxy {
    fn write(&mut self, datagram: &[u8]) -> std::io::Result<usize> {
        self.socket.send(&[&self.header, datagram].concat())?;
        Ok(datagram.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn trusting(config: DataplaneConfig) -> DataplaneConfig {
    let trusted = Network { address: Ipv4Addr::new(127, 1, 7, 100).into(), prefix: 32 };
    DataplaneConfig { streams: StreamConfig { trusted_proxies: vec![trusted], ..config.streams }, ..config }
}

#[test]
fn clients_of_a_trusted_proxy_are_served_by_it() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&trusting(config("127.1.7.1", 3, directory.path())))?;
    let relay = dataplane.listen()[0].bind;
    // The kernel chooses a worker by the proxy's address, the relay by the client's: most packets cross.
    for number in 1..=12 {
        let client = (Ipv4Addr::new(198, 51, 100, number), 5000);
        let proxy = Proxy::new("127.1.7.100", relay, client)?;
        let local = proxy.socket.local_addr()?;
        let mut client = TurnClient::over(Box::new(proxy), local, Transport::Udp, "alice")?;
        let relayed = client.allocate()?;
        let peer = peer("127.0.0.1")?;
        client.permit(peer.local_addr()?)?;
        client.send(peer.local_addr()?, b"to the peer.")?;
        assert_eq!(heard(&peer)?, (relayed, b"to the peer.".to_vec()));
        peer.send_to(b"and back", relayed)?;
        assert_eq!(client.receive()?, (peer.local_addr()?, b"and back".to_vec()));
    }
    Ok(())
}

#[test]
fn headers_of_others_and_broken_ones_are_dropped() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&trusting(config("127.1.7.2", 2, directory.path())))?;
    let relay = dataplane.listen()[0].bind;
    let client = (Ipv4Addr::new(198, 51, 100, 1), 5000);
    let mut request = [0; 64];
    let id = TransactionId(*b"abcdefghijkl");
    let length = MessageWriter::new(&mut request, Class::Request, Method::Binding, id).finish().context("room")?;
    let request = &request[..length];
    let mapped = |socket: &UdpSocket| -> Result<SocketAddr> {
        let mut buffer = [0; 512];
        socket.set_read_timeout(Some(PATIENCE))?;
        let length = socket.recv(&mut buffer)?;
        let message = Message::parse(&buffer[..length]).context("an answer, and nothing before it")?;
        let XorMappedAddress(mapped) = message.attribute().ok().flatten().context("XOR-MAPPED-ADDRESS")?;
        Ok(mapped)
    };

    // abuse.md F: a header of an untrusted source does not count.
    let mut stranger = Proxy::new("127.1.7.101", relay, client)?;
    stranger.write_all(request)?;
    let mut proxy = Proxy::new("127.1.7.100", relay, client)?;
    proxy.socket.send(&proxy.header[..20])?;
    proxy.socket.send(&[&proxy.header[..12], &[0x31, 0x12, 0, 0][..], request].concat())?;
    eventually("three are dropped", || (dropped(&dataplane, "proxy_header") == 3).then_some(()))?;
    // Version 1 is for streams.
    proxy.socket.send(b"PROXY UDP4 198.51.100.1 203.0.113.1 5000 3478\r\n")?;
    eventually("noise", || (dropped(&dataplane, "malformed") == 1).then_some(()))?;

    proxy.write_all(request)?;
    assert_eq!(mapped(&proxy.socket)?, client.into(), "the client of the header");
    // What the proxy says for itself, with LOCAL or without a header.
    let local = [b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", request].concat();
    for packet in [&local[..], request] {
        proxy.socket.send(packet)?;
        assert_eq!(mapped(&proxy.socket)?, proxy.socket.local_addr()?);
    }
    Ok(())
}
