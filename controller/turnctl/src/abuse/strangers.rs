//! D: using the server against others. An answer to a stranger is at most three times as long as what asked for it, IP
//! and UDP headers counted, because the sender's address may be forged.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use turn_core::Transport;
use turn_core::wire::AttributeType as A;

use super::grammar::{Noise, foreign};
use crate::conform::check::{Check, On, Step, expect, must, not_applicable};
use crate::conform::craft::{
    ALLOCATE, BINDING, CHANNEL_BIND, CONNECT, CONNECTION_BIND, CREATE_PERMISSION, Craft, REFRESH,
};
use crate::conform::lab::Lab;
use crate::conform::secure::client_hello;

const SECTION: &str = "abuse D";
/// Most an answer may be longer than its request.
const MOST: f64 = 3.0;
/// Bytes of the IPv4 and the UDP header.
const HEADERS: usize = 28;

/// Rows that measure an answer.
macro_rules! amplified {
    ($($id:literal $what:literal => $request:expr;)*) => {
        &[$(must(
            concat!("amplify-", $id),
            SECTION,
            concat!("the answer to ", $what, " is at most 3 times as long"),
            |lab| amplification(lab, &$request),
        )
        .on(On::Only(Transport::Udp))),*]
    };
}

pub(super) const AMPLIFIED: &[Check] = amplified! {
    "binding" "Binding" => Craft::request(BINDING).into_bytes();
    "binding-fingerprint" "Binding with FINGERPRINT" => Craft::request(BINDING).fingerprint().into_bytes();
    "binding-unknown" "Binding with an unknown attribute" => Craft::request(BINDING).attr(A(0x7F20), b"").into_bytes();
    "binding-padding" "Binding with PADDING" => Craft::request(BINDING).attr(A::PADDING, &[0; 4]).into_bytes();
    "binding-padding-long" "Binding with 64 bytes of PADDING" => Craft::request(BINDING).attr(A::PADDING, &[0; 64]).into_bytes();
    "binding-change" "Binding with CHANGE-REQUEST" => Craft::request(BINDING).word(A::CHANGE_REQUEST, 6).into_bytes();
    "binding-change-padding" "Binding with CHANGE-REQUEST and PADDING" =>
        Craft::request(BINDING).word(A::CHANGE_REQUEST, 0).attr(A::PADDING, &[0; 4]).into_bytes();
    "binding-port" "Binding with RESPONSE-PORT" => Craft::request(BINDING).word(A::RESPONSE_PORT, 9 << 16).into_bytes();
    "allocate-empty" "an empty Allocate" => Craft::request(ALLOCATE).into_bytes();
    "allocate" "Allocate" => Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &[17, 0, 0, 0]).into_bytes();
    "refresh" "an unsigned Refresh" => Craft::request(REFRESH).into_bytes();
    "permission" "an unsigned CreatePermission" => Craft::request(CREATE_PERMISSION).into_bytes();
    "channel" "an unsigned ChannelBind" => Craft::request(CHANNEL_BIND).into_bytes();
    "connect" "an unsigned Connect" => Craft::request(CONNECT).into_bytes();
    "connection-bind" "an unsigned ConnectionBind" => Craft::request(CONNECTION_BIND).into_bytes();
    "integrity-alone" "a signature without a name" => Craft::request(ALLOCATE).attr(A::MESSAGE_INTEGRITY, &[0; 20]).into_bytes();
    "integrity-forged" "a forged signature" => Craft::request(ALLOCATE)
        .attr(A::USERNAME, b"x").attr(A::REALM, b"x").attr(A::NONCE, b"x").attr(A::MESSAGE_INTEGRITY, &[0; 20]).into_bytes();
    "unknown-method" "an unknown method" => Craft::request(0x0F5).into_bytes();
    "client-hello" "a ClientHello of DTLS" => client_hello();
    "classic" "Binding of RFC 3489" => {
        let mut bytes = Craft::request(BINDING).into_bytes();
        bytes[4] = 0;
        bytes
    };
};

pub(super) const CHECKS: &[Check] = &[
    must("amplify-foreign", SECTION, "QUIC, RTP, SIP and HTTP packets get nothing", foreign_packets)
        .on(On::Only(Transport::Udp)),
    must("reflect-elsewhere", SECTION, "no unsigned request makes the server send to a third address", reflect)
        .on(On::Only(Transport::Udp)),
    must("flood-binding", SECTION, "2,000 Binding requests of 200 sources leave a newcomer served within 1 s", |lab| {
        flood(lab, || Craft::request(BINDING).into_bytes())
    })
    .on(On::Only(Transport::Udp))
    .alone(),
    must("flood-allocate", SECTION, "2,000 unsigned Allocates leave a newcomer authenticated within 1 s", |lab| {
        flood(lab, || Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &[17, 0, 0, 0]).into_bytes())
    })
    .on(On::Only(Transport::Udp))
    .alone(),
    must("flood-forged", SECTION, "so do 2,000 forged signatures", |lab| {
        flood(lab, || {
            let request = Craft::request(ALLOCATE).attr(A::USERNAME, b"x").attr(A::REALM, b"x").attr(A::NONCE, b"x");
            request.attr(A::MESSAGE_INTEGRITY, &[7; 20]).into_bytes()
        })
    })
    .on(On::Only(Transport::Udp))
    .alone(),
    must("flood-client-hello", SECTION, "so do 2,000 ClientHellos of DTLS", |lab| flood(lab, client_hello))
        .on(On::Datagrams)
        .alone(),
    must("flood-noise", SECTION, "so do 2,000 packets of noise", |lab| {
        flood(lab, || Noise::new(u64::from(std::process::id())).next().to_be_bytes().repeat(100))
    })
    .on(On::Only(Transport::Udp))
    .alone(),
    must("flood-connections", SECTION, "200 idle connections leave a newcomer authenticated within 1 s", idle)
        .on(On::Streams)
        .alone(),
];

/// Bytes of all that comes back within a while, headers counted.
fn measured(lab: &Lab<'_>, request: &[u8]) -> Step<(usize, usize)> {
    let socket = UdpSocket::bind((lab.target.from, 0))?;
    socket.send_to(request, lab.server()?)?;
    let deadline = Instant::now() + lab.target.settle * 2;
    let mut answered = 0;
    let mut bytes = vec![0; 66_000];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok((request.len() + HEADERS, answered));
        }
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        if let Ok(len) = socket.recv(&mut bytes) {
            answered += len + HEADERS;
        }
    }
}

fn amplification(lab: &Lab<'_>, request: &[u8]) -> Step {
    let (asked, answered) = measured(lab, request)?;
    let factor = answered as f64 / asked as f64;
    expect(factor <= MOST, || format!("{answered} bytes for {asked}: {factor:.1} times"))
}

fn foreign_packets(lab: &Lab<'_>) -> Step {
    for packet in foreign() {
        let (_, answered) = measured(lab, &packet)?;
        expect(answered == 0, || format!("{answered} bytes for a packet that starts with {:#04x}", packet[0]))?;
    }
    Ok(())
}

fn reflect(lab: &Lab<'_>) -> Step {
    let victim = lab.peer()?;
    let port = u32::from(victim.address.port()) << 16;
    let mut client = lab.stranger()?;
    let address = crate::conform::craft::plain_address(victim.address);
    // RESPONSE-PORT (RFC 5780) and RESPONSE-ADDRESS (RFC 3489).
    for request in [
        Craft::request(BINDING).word(A::RESPONSE_PORT, port),
        Craft::request(BINDING).attr(A(0x0002), &address),
        Craft::request(ALLOCATE).peer(victim.address).word(A::RESPONSE_PORT, port),
    ] {
        client.send(request.bytes())?;
    }
    victim.must_get_nothing(lab.target.settle * 2)
}

/// Whether a load that is more than a client's is wanted.
pub(super) fn load_allowed(lab: &Lab<'_>) -> Step {
    match lab.server()?.ip().is_loopback() || lab.target.owned {
        true => Ok(()),
        false => not_applicable("not on loopback: --i-own-this-server allows bounded load"),
    }
}

fn flood(lab: &Lab<'_>, packet: fn() -> Vec<u8>) -> Step {
    load_allowed(lab)?;
    let server = lab.server()?;
    let sources = (0..200).map(|_| UdpSocket::bind((lab.target.from, 0))).collect::<Result<Vec<_>, _>>()?;
    for _ in 0..10 {
        for source in &sources {
            source.send_to(&packet(), server)?;
        }
    }
    newcomer(lab)
}

fn newcomer(lab: &Lab<'_>) -> Step {
    let start = Instant::now();
    let mut client = lab.client()?;
    client.allocate(lab.allocate())?;
    expect(start.elapsed() < Duration::from_secs(1), || format!("a newcomer waited {:?}", start.elapsed()))
}

fn idle(lab: &Lab<'_>) -> Step {
    load_allowed(lab)?;
    let _held = (0..200).map(|_| lab.wire()).collect::<Step<Vec<_>>>()?;
    newcomer(lab)
}
