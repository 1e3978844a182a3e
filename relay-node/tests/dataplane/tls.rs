//! TURN over TLS: calls, certificates by name and anew, handshakes that end badly or never.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use relay_node::certificates::Certificates;
use relay_node::dataplane::DataplaneConfig;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::version::{TLS12, TLS13};
use turn_core::Transport;

use crate::authority::{Authority, TlsStream, address, is_closed, is_served, shake, tls_config};
use crate::call;
use crate::client::{TurnClient, connect, eventually, refused, start};

#[test]
fn a_client_and_a_peer_talk_over_tls_and_plaintext_is_served_beside_it() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["turn.example.org"])?];
    let config = tls_config("127.1.3.1", 2, directory.path(), &files)?;
    let (dataplane, _changes) = start(&config)?;
    let tls = address(&dataplane, Transport::Tls)?;
    for _ in 0..4 {
        call(&mut authority.turn_client(tls, "turn.example.org", "alice")?).context("TLS")?;
    }
    // RFC 8656 §12.5's frames in records of any cut.
    for piece in [1, 7, 300] {
        let mut client = authority.turn_client(tls, "turn.example.org", "alice")?;
        client.piece = piece;
        call(&mut client).with_context(|| format!("records of {piece}"))?;
    }
    // Janus sends plaintext to the TLS port; and with certificates every TCP port takes TLS.
    call(&mut TurnClient::new(Transport::Tcp, "127.0.0.1", tls, "alice")?).context("plaintext on the TLS port")?;
    let tcp = address(&dataplane, Transport::Tcp)?;
    call(&mut authority.turn_client(tcp, "turn.example.org", "alice")?).context("TLS on the TCP port")?;
    Ok(())
}

/// The end of the connection is the end of the allocation (RFC 8656 §5), and the client is told (RFC 8446 §6.1).
#[test]
fn an_end_of_tls_ends_the_allocation() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["turn.example.org"])?];
    let (dataplane, _changes) = start(&tls_config("127.1.3.2", 1, directory.path(), &files)?)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let held = || dataplane.snapshots().iter().map(|worker| worker.allocations).sum::<u64>();
    let mut client = authority.turn_client(tls, "turn.example.org", "alice")?;
    client.allocate()?;
    eventually("it is counted", || (held() == 1).then_some(()))?;
    drop(client);
    eventually("it ends with its connection", || (held() == 0).then_some(()))?;

    let mut stream = authority.dial(tls, "turn.example.org", &[])?;
    stream.conn.send_close_notify();
    stream.conn.complete_io(&mut stream.sock)?;
    is_closed(&mut stream).context("after close_notify")?;
    Ok(())
}

fn presented(stream: &TlsStream) -> CertificateDer<'static> {
    stream.conn.peer_certificates().expect("a certificate")[0].clone().into_owned()
}

#[test]
fn the_name_asked_for_chooses_the_certificate() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files =
        [authority.issue("a", &["a.example.org"])?, authority.issue("b", &["b.example.org", "*.b.example.org"])?];
    let (dataplane, _changes) = start(&tls_config("127.1.3.3", 1, directory.path(), &files)?)?;
    let tls = address(&dataplane, Transport::Tls)?;
    // The client checks that the certificate is for the name it asked for.
    for name in ["a.example.org", "b.example.org", "eu.b.example.org"] {
        is_served(&mut authority.dial(tls, name, &[])?).with_context(|| name.to_owned())?;
    }
    let error = authority.dial(tls, "c.example.org", &[]).map(drop).expect_err("the default is not for it");
    assert!(error.to_string().contains("not valid for name"), "{error}");
    Ok(())
}

/// RFC 7443 §3; RFC 7301 §3.2 for a client that offers nothing of ours.
#[test]
fn application_protocols_of_stun_are_agreed_on_and_others_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["a.example.org"])?];
    let (dataplane, _changes) = start(&tls_config("127.1.3.4", 1, directory.path(), &files)?)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let (turn, stun, http): (&[u8], &[u8], &[u8]) = (b"stun.turn", b"stun.nat-discovery", b"h2");
    for (offered, agreed) in
        [(vec![], None), (vec![turn], Some(turn)), (vec![stun], Some(stun)), (vec![http, turn], Some(turn))]
    {
        let mut stream = authority.dial(tls, "a.example.org", &offered)?;
        assert_eq!(stream.conn.alpn_protocol(), agreed);
        is_served(&mut stream)?;
    }
    let error = authority.dial(tls, "a.example.org", &[b"h2", b"http/1.1"]).map(drop).expect_err("HTTP");
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    eventually("it is counted", || (refused(&dataplane, "tls_handshake") == 1).then_some(()))?;
    Ok(())
}

#[test]
fn both_versions_of_tls_are_spoken() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["a.example.org"])?];
    let (dataplane, _changes) = start(&tls_config("127.1.3.5", 1, directory.path(), &files)?)?;
    let tls = address(&dataplane, Transport::Tls)?;
    for version in [&TLS12, &TLS13] {
        let trusting = authority.client(&[])?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(trusting.crypto_provider()))
            .with_protocol_versions(&[version])?
            .with_root_certificates(authority.roots()?)
            .with_no_client_auth();
        config.resumption = trusting.resumption.clone();
        // The second time by a ticket.
        for _ in 0..2 {
            let mut stream = shake(connect(tls)?, "a.example.org", config.clone())?;
            assert_eq!(stream.conn.protocol_version(), Some(version.version));
            is_served(&mut stream)?;
        }
    }
    Ok(())
}

#[test]
fn a_new_certificate_is_served_within_two_seconds_and_calls_go_on() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["a.example.org"])?];
    let config = tls_config("127.1.3.6", 2, directory.path(), &files)?;
    let certificates: Arc<Certificates> = config.streams.certificates.clone().context("certificates")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.spawn(certificates.watch());
    let (dataplane, _changes) = start(&config)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let mut calls: Vec<TurnClient> =
        (0..10).map(|_| authority.turn_client(tls, "a.example.org", "alice")).collect::<Result<_>>()?;
    for client in &mut calls {
        client.allocate()?;
    }
    let old = presented(&authority.dial(tls, "a.example.org", &[])?);
    authority.issue("a", &["a.example.org"])?;
    let changed = Instant::now();
    eventually("the new one", || {
        let stream = authority.dial(tls, "a.example.org", &[]).ok()?;
        (presented(&stream) != old).then_some(())
    })?;
    assert!(changed.elapsed() < Duration::from_secs(2), "after {:?}", changed.elapsed());
    let peer = crate::client::peer("127.0.0.1")?;
    for client in &mut calls {
        client.permit(peer.local_addr()?)?;
        client.send(peer.local_addr()?, b"still here")?;
        assert_eq!(crate::client::heard(&peer)?.1, b"still here");
    }
    runtime.shutdown_background();
    Ok(())
}

/// A thousand handshakes that never end hurt neither the next one nor a call.
#[test]
fn unfinished_handshakes_block_nobody() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["a.example.org"])?];
    let config = DataplaneConfig { max_connections: 5000, ..tls_config("127.1.3.7", 1, directory.path(), &files)? };
    let (dataplane, _changes) = start(&config)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let mut calling = authority.turn_client(tls, "a.example.org", "alice")?;
    let relayed = calling.allocate()?;
    let peer = crate::client::peer("127.0.0.1")?;
    calling.bind_channel(0x4000, peer.local_addr()?)?;

    let hello = client_hello(&authority)?;
    let mut stalled = Vec::new();
    for number in 0..900 {
        let mut stream = connect(tls)?;
        // Whole, so that the server waits for the client's Finished; or cut anywhere.
        let cut = if number % 2 == 0 { hello.len() } else { 1 + number % (hello.len() - 1) };
        stream.write_all(&hello[..cut])?;
        stalled.push(stream);
        if number % 100 == 0 {
            peer.send_to(b"media", relayed)?;
            assert_eq!(calling.receive()?.1, b"media");
        }
    }
    let began = Instant::now();
    is_served(&mut authority.dial(tls, "a.example.org", &[])?)?;
    assert!(began.elapsed() < Duration::from_secs(1), "a newcomer waits {:?}", began.elapsed());
    Ok(())
}

/// The first flight of a client.
fn client_hello(authority: &Authority) -> Result<Vec<u8>> {
    let config = Arc::new(authority.client(&[b"stun.turn"])?);
    let mut session = rustls::ClientConnection::new(config, "a.example.org".try_into()?)?;
    let mut hello = Vec::new();
    session.write_tls(&mut hello)?;
    Ok(hello)
}

#[test]
fn a_ticket_or_garbage_in_tls_ends_its_connection_only() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let authority = Authority::new(directory.path())?;
    let files = [authority.issue("a", &["a.example.org"])?];
    let (dataplane, _changes) = start(&tls_config("127.1.3.8", 1, directory.path(), &files)?)?;
    let tls = address(&dataplane, Transport::Tls)?;
    let hello = client_hello(&authority)?;
    let garbage: [&[u8]; 5] = [
        // A record that is longer than there may be.
        b"\x16\x03\x01\xff\xff",
        // No handshake message.
        b"\x16\x03\x01\x00\x04abcd",
        // A ServerHello from a client.
        b"\x16\x03\x03\x00\x04\x02\x00\x00\x00",
        // A handshake message of 16 MiB, and the first of its records.
        &[&b"\x16\x03\x01\x40\x00\x01\xff\xff\xff"[..], &[7; 16_380]].concat(),
        // A hello, then application data that nobody can open.
        &[&hello[..], b"\x17\x03\x03\x00\x14aaaabbbbccccddddeeee"].concat(),
    ];
    for (number, bytes) in garbage.into_iter().enumerate() {
        let mut stream = connect(tls)?;
        stream.write_all(bytes)?;
        is_closed(&mut stream).with_context(|| format!("garbage {number}"))?;
    }
    is_served(&mut authority.dial(tls, "a.example.org", &[])?)?;
    // What is inside the TLS is held to the same framing.
    let mut stream = authority.dial(tls, "a.example.org", &[])?;
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    is_closed(&mut stream)?;
    eventually("they are counted", || (refused(&dataplane, "tls_handshake") == 5).then_some(()))?;
    Ok(())
}
