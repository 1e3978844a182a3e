//! TLS and DTLS: RFC 8489 §6.2.3, RFC 7443 (ALPN), RFC 7350 (DTLS), RFC 6347 §4.2.1 (cookies).

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use openssl::ssl::SslVersion;
use turn_core::Transport;

use super::check::{Check, On, Step, Stop, expect, fail, must, not_offered, should};
use super::client::Client;
use super::craft::{BINDING, Craft};
use super::lab::Lab;
use super::wire::{Handshake, connect};

const TLS: On = On::Only(Transport::Tls);
const DTLS: On = On::Only(Transport::Dtls);

pub(super) const CHECKS: &[Check] = &[
    must("tls-1.2", "RFC 8489 §6.2.3", "TLS 1.2 is served", |lab| version(lab, SslVersion::TLS1_2)).on(TLS),
    should("tls-1.3", "RFC 8489 §6.2.3", "TLS 1.3 is served", |lab| version(lab, SslVersion::TLS1_3)).on(TLS),
    should("tls-1.1", "RFC 8996 §5", "TLS 1.1 is not served", |lab| refused(lab, SslVersion::TLS1_1)).on(TLS),
    must("dtls-1.2", "RFC 7350 §3", "DTLS 1.2 is served", |lab| version(lab, SslVersion::DTLS1_2)).on(DTLS),
    should("dtls-1.0", "RFC 8996 §5", "DTLS 1.0 is not served", |lab| refused(lab, SslVersion::DTLS1)).on(DTLS),
    should("alpn-turn", "RFC 7443 §3", "ALPN stun.turn is chosen", |lab| alpn(lab, b"\x09stun.turn")).on(TLS),
    should("alpn-stun", "RFC 7443 §3", "ALPN stun.nat-discovery is chosen", |lab| {
        alpn(lab, b"\x12stun.nat-discovery")
    })
    .on(TLS),
    should("alpn-dtls", "RFC 7443 §3", "ALPN stun.turn is chosen over DTLS", |lab| alpn(lab, b"\x09stun.turn"))
        .on(DTLS),
    should("dtls-cookie", "RFC 6347 §4.2.1", "the first ClientHello gets HelloVerifyRequest and no more", cookie)
        .on(DTLS),
    must("dtls-again", "RFC 6347 §4.2.8", "a new handshake from the same address and port is taken up", rehandshake)
        .on(DTLS),
    should("handshake-unfinished", "RFC 8656 §21.3", "an unfinished handshake keeps nobody else waiting", unfinished)
        .on(TLS),
];

fn version(lab: &Lab<'_>, version: SslVersion) -> Step {
    let wire = lab.wire_over(lab.transport, Handshake { version: Some(version), alpn: None })?;
    let reply = Client::new(wire, lab.user(), lab.target).ask(&Craft::request(BINDING))?;
    expect(reply.code() == 0, || format!("{reply}"))
}

fn refused(lab: &Lab<'_>, version: SslVersion) -> Step {
    match lab.wire_over(lab.transport, Handshake { version: Some(version), alpn: None }) {
        Ok(_) => fail("it is"),
        Err(_) => lab.alive(),
    }
}

fn alpn(lab: &Lab<'_>, name: &'static [u8]) -> Step {
    let wire = lab.wire_over(lab.transport, Handshake { version: None, alpn: Some(name) })?;
    match wire.alpn() {
        Some(chosen) if chosen == name[1..] => {}
        Some(chosen) => return fail(format!("chosen is {:?}", String::from_utf8_lossy(&chosen))),
        None => return not_offered("no ALPN in the answer"),
    }
    let reply = Client::new(wire, lab.user(), lab.target).ask(&Craft::request(BINDING))?;
    expect(reply.code() == 0, || format!("{reply}"))
}

/// A ClientHello of DTLS 1.2 without a cookie.
pub(crate) fn client_hello() -> Vec<u8> {
    let mut random = [0; 32];
    let _ = getrandom::fill(&mut random);
    let mut body = vec![0xFE, 0xFD];
    body.extend(random);
    // No session, no cookie, two cipher suites, no compression.
    body.extend([0, 0, 0, 4, 0xC0, 0x2F, 0xC0, 0x2B, 1, 0]);
    // Extensions: groups, point formats, signature algorithms.
    let extensions =
        [&[0, 10, 0, 6, 0, 4, 0, 29, 0, 23][..], &[0, 11, 0, 2, 1, 0], &[0, 13, 0, 8, 0, 6, 4, 3, 8, 4, 4, 1]].concat();
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let len = (body.len() as u32).to_be_bytes();
    let mut handshake = vec![1, len[1], len[2], len[3], 0, 0, 0, 0, 0, len[1], len[2], len[3]];
    handshake.extend(body);
    let mut record = vec![22, 0xFE, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0];
    record.extend((handshake.len() as u16).to_be_bytes());
    record.extend(handshake);
    record
}

fn cookie(lab: &Lab<'_>) -> Step {
    let socket = UdpSocket::bind((lab.target.from, 0))?;
    socket.connect(lab.server()?)?;
    socket.send(&client_hello())?;
    socket.set_read_timeout(Some(lab.target.patience))?;
    let mut bytes = [0; 2000];
    let Ok(len) = socket.recv(&mut bytes) else { return fail("no answer to a ClientHello") };
    // Record type handshake, message type HelloVerifyRequest.
    expect(len > 13 && bytes[0] == 22 && bytes[13] == 3, || {
        format!("an answer of {len} bytes, handshake message {}", bytes[13])
    })?;
    socket.set_read_timeout(Some(lab.target.settle))?;
    expect(socket.recv(&mut bytes).is_err(), || "more than one datagram".into())
}

fn rehandshake(lab: &Lab<'_>) -> Step {
    let mut first = lab.stranger()?;
    first.ask(&Craft::request(BINDING))?;
    let port = first.wire.local.port();
    // The client lost its state, not its port: no close_notify reaches the server.
    drop(first);
    let server = lab.server()?;
    let wire = super::wire::Wire::open(
        Transport::Dtls,
        server,
        (lab.target.from, port).into(),
        &lab.target.host,
        &lab.target.trust,
        Handshake::default(),
    )
    .map_err(|error| Stop::Fail(format!("the second handshake: {error}")))?;
    let reply = Client::new(wire, lab.user(), lab.target).ask(&Craft::request(BINDING))?;
    expect(reply.code() == 0, || format!("{reply}"))
}

fn unfinished(lab: &Lab<'_>) -> Step {
    let server = lab.server()?;
    // The first bytes of a TLS record, and then nothing.
    let mut held = Vec::new();
    for _ in 0..8 {
        let mut stream = connect(server, lab.target.from)?;
        std::io::Write::write_all(&mut stream, &[0x16, 3, 1, 1])?;
        held.push(stream);
    }
    let start = Instant::now();
    lab.alive()?;
    expect(start.elapsed() < Duration::from_secs(1), || format!("a newcomer waited {:?}", start.elapsed()))
}
