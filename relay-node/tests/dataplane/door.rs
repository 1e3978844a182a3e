//! Who is let in: first bytes, PROXY headers, and the limits on connections.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use relay_node::dataplane::{DataplaneConfig, StreamConfig};
use turn_core::policy::Network;
use turn_core::{Change, Transport};

use crate::authority::{Authority, MOMENT, address, is_closed, is_served, shake, tls_config};
use crate::client::{TurnClient, config, connect, eventually, refused, start};

const CLIENT: &str = "198.51.100.7:4321";
const V1: &[u8] = b"PROXY TCP4 198.51.100.7 203.0.113.1 4321 443\r\n";
const V2: &[u8] =
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x13\xc6\x33\x64\x07\xcb\x00\x71\x01\x10\xe1\x01\xbb\x04\x00\x04abcd";
const V2_LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";

fn trusting(config: DataplaneConfig) -> DataplaneConfig {
    let loopback = Network { address: [127, 0, 0, 0].into(), prefix: 8 };
    DataplaneConfig { streams: StreamConfig { trusted_proxies: vec![loopback], ..config.streams }, ..config }
}

/// XOR-MAPPED-ADDRESS of an answer: who the server says the client is.
fn mapped(answer: &[u8]) -> Result<SocketAddr> {
    let message = turn_core::wire::Message::parse(answer)?;
    let mapped = message.attribute::<turn_core::wire::attribute::XorMappedAddress>()?.context("XOR-MAPPED-ADDRESS")?;
    Ok(mapped.0)
}

#[test]
fn a_proxy_says_who_the_client_is() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["a.example.org"])?];
    let config = trusting(tls_config("127.1.4.1", 2, directory.path(), &files)?);
    let (dataplane, mut changes) = start(&config)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let client: SocketAddr = CLIENT.parse()?;
    for (what, header, expected) in [
        ("version 1", V1, Some(client)),
        ("version 2 with a TLV", V2, Some(client)),
        ("version 2, LOCAL", V2_LOCAL, None),
        ("no header", b"", None),
    ] {
        let mut stream = connect(tls)?;
        let expected = expected.unwrap_or(stream.local_addr()?);
        stream.write_all(header)?;
        assert_eq!(mapped(&is_served(&mut stream)?)?, expected, "{what}, plaintext");

        let mut stream = connect(tls)?;
        let expected = if expected == client { client } else { stream.local_addr()? };
        // In pieces, the last one together with the ClientHello.
        for byte in &header[..header.len().saturating_sub(1)] {
            stream.write_all(&[*byte])?;
        }
        stream.write_all(&header[header.len().saturating_sub(1)..])?;
        let mut stream = shake(stream, "a.example.org", authority.client(&[])?)?;
        assert_eq!(mapped(&is_served(&mut stream)?)?, expected, "{what}, TLS");
    }
    // The allocation is the client's, at the address the proxy was reached at.
    let mut stream = connect(tls)?;
    stream.write_all(V1)?;
    let local = stream.local_addr()?;
    TurnClient::over(Box::new(stream), local, Transport::Tcp, "alice")?.allocate()?;
    let Change::Put(record) = eventually("the record", || changes.try_recv().ok())? else {
        anyhow::bail!("no record");
    };
    assert_eq!((record.five_tuple.client, record.five_tuple.server), (client, "203.0.113.1:443".parse()?));
    Ok(())
}

#[test]
fn a_header_of_anybody_else_is_nonsense() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.4.2", 1, directory.path()))?;
    let tcp = address(&dataplane, Transport::Tcp)?;
    for header in [V1, V2, V2_LOCAL] {
        let mut stream = connect(tcp)?;
        stream.write_all(header)?;
        stream.write_all(b"\x00\x01\x00\x00\x21\x12\xa4\x42abcdefghijkl")?;
        is_closed(&mut stream)?;
    }
    eventually("they are counted", || (refused(&dataplane, "nonsense") == 3).then_some(()))?;
    Ok(())
}

#[test]
fn a_malformed_header_ends_the_connection() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&trusting(config("127.1.4.3", 1, directory.path())))?;
    let tcp = address(&dataplane, Transport::Tcp)?;
    let malformed: [&[u8]; 4] = [
        b"PROXY TCP4 198.51.100.7 203.0.113.1 99999 443\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x41\x11\x00\x0c",
        // A second header where STUN has to be.
        &[V1, V1].concat(),
    ];
    for bytes in malformed {
        let mut stream = connect(tcp)?;
        stream.write_all(bytes)?;
        is_closed(&mut stream)?;
    }
    eventually("they are counted", || {
        (refused(&dataplane, "proxy_header") == 3 && refused(&dataplane, "nonsense") == 1).then_some(())
    })?;
    Ok(())
}

#[test]
fn what_is_neither_stun_nor_tls_is_closed_at_its_first_byte() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (dataplane, _changes) = start(&config("127.1.4.4", 1, directory.path()))?;
    let tcp = address(&dataplane, Transport::Tcp)?;
    // TLS without certificates too.
    let firsts = [0x04, 0x0d, 0x13, 0x16, 0x3f, 0x50, 0x7f, 0x80, 0xff];
    for first in firsts {
        let mut stream = connect(tcp)?;
        stream.write_all(&[first])?;
        is_closed(&mut stream).with_context(|| format!("{first:#04x}"))?;
    }
    eventually("they are counted", || (refused(&dataplane, "nonsense") == firsts.len() as u64).then_some(()))?;
    is_served(&mut connect(tcp)?)?;
    Ok(())
}

#[test]
fn the_oldest_half_open_connection_makes_room() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = config("127.1.4.5", 1, directory.path());
    config.streams.handshakes = 3;
    let (dataplane, _changes) = start(&config)?;
    let tcp = address(&dataplane, Transport::Tcp)?;
    // One that has said what it is does not count.
    let mut settled = connect(tcp)?;
    is_served(&mut settled)?;
    let mut silent: Vec<TcpStream> = (0..4).map(|_| connect(tcp)).collect::<Result<_>>()?;
    is_closed(&mut silent[0]).context("the oldest")?;
    is_served(&mut silent[1]).context("the others live")?;
    is_served(&mut settled)?;
    eventually("it is counted", || (refused(&dataplane, "half_open_limit") == 1).then_some(()))?;
    Ok(())
}

#[test]
fn who_does_not_say_what_it_is_in_time_is_closed() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["a.example.org"])?];
    let mut config = tls_config("127.1.4.6", 1, directory.path(), &files)?;
    config.streams.handshake_time = Duration::from_secs(1);
    let (dataplane, _changes) = start(&config)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let mut served = authority.dial(tls, "a.example.org", &[])?;
    let (mut silent, mut halting) = (connect(tls)?, connect(tls)?);
    halting.write_all(b"\x16\x03\x01\x02\x00\x01")?;
    let began = Instant::now();
    is_closed(&mut silent)?;
    is_closed(&mut halting)?;
    assert!(began.elapsed() >= MOMENT, "it had its time");
    eventually("they are counted", || (refused(&dataplane, "slow") == 2).then_some(()))?;
    is_served(&mut served).context("one whose handshake has ended stays")?;
    Ok(())
}

#[test]
fn connections_of_a_prefix_are_bounded_until_they_have_an_allocation() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = trusting(config("127.1.4.7", 2, directory.path()));
    config.streams.connections_per_prefix = 2;
    let (dataplane, _changes) = start(&config)?;
    let tcp = address(&dataplane, Transport::Tcp)?;
    let dial = |ip: &str| -> Result<TcpStream> {
        let mut stream = connect(tcp)?;
        stream.write_all(format!("PROXY TCP4 {ip} 203.0.113.1 4321 443\r\n").as_bytes())?;
        Ok(stream)
    };
    let over = |stream: TcpStream| -> Result<TurnClient> {
        let local = stream.local_addr()?;
        TurnClient::over(Box::new(stream), local, Transport::Tcp, "alice")
    };
    // Two that call, and have places no longer; each with an address of its own, as 5-tuples are.
    let mut calls = Vec::new();
    for port in [1, 2] {
        let mut stream = connect(tcp)?;
        stream.write_all(format!("PROXY TCP4 198.51.100.7 203.0.113.1 {port} 443\r\n").as_bytes())?;
        let mut client = over(stream)?;
        client.allocate()?;
        calls.push(client);
    }
    let (mut first, mut second) = (dial("198.51.100.7")?, dial("198.51.100.7")?);
    is_served(&mut first)?;
    is_served(&mut second)?;
    let mut third = dial("198.51.100.7")?;
    third.write_all(b"\x00")?;
    is_closed(&mut third).context("one too many")?;
    is_served(&mut dial("198.51.100.8")?).context("somebody else")?;
    drop(first);
    eventually("a place is free again", || is_served(&mut dial("198.51.100.7").ok()?).ok())?;
    eventually("they are counted", || (refused(&dataplane, "prefix_limit") >= 1).then_some(()))?;
    Ok(())
}

/// Without a proxy the connection is closed as it is accepted.
#[test]
fn a_source_with_too_many_connections_gets_no_more() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = config("127.1.4.8", 2, directory.path());
    config.streams.connections_per_prefix = 3;
    let (dataplane, _changes) = start(&config)?;
    let tcp = address(&dataplane, Transport::Tcp)?;
    let mut held: Vec<TcpStream> = (0..3).map(|_| connect(tcp)).collect::<Result<_>>()?;
    for stream in &mut held {
        is_served(stream)?;
    }
    is_closed(&mut connect(tcp)?)?;
    eventually("it is counted", || (refused(&dataplane, "prefix_limit") == 1).then_some(()))?;
    Ok(())
}
