//! RFC 5780, NAT behaviour discovery: offered with a second address, declined without.

use std::net::{SocketAddr, UdpSocket};

use turn_core::Transport;
use turn_core::wire::AttributeType as A;

use super::check::{Check, On, Step, expect, fail, must, not_offered};
use super::client::expect_code;
use super::craft::{BINDING, Craft};
use super::lab::Lab;
use super::reply::Reply;
use super::stun::unknown_types;

pub(super) const CHECKS: &[Check] = &[
    must("change-request-declined", "RFC 5780 §6.1", "without a second address CHANGE-REQUEST is 420", declined)
        .on(On::Only(Transport::Udp)),
    must("change-port", "RFC 5780 §6.1", "\"change port\" is answered from the other port", |lab| change(lab, 2))
        .on(On::Only(Transport::Udp)),
    must("change-ip", "RFC 5780 §6.1", "\"change IP\" is answered from the other IP", |lab| change(lab, 4))
        .on(On::Only(Transport::Udp)),
    must("change-both", "RFC 5780 §6.1", "both flags are answered from OTHER-ADDRESS", |lab| change(lab, 6))
        .on(On::Only(Transport::Udp)),
    must("response-origin", "RFC 5780 §6.1", "RESPONSE-ORIGIN is where the answer comes from", origin)
        .on(On::Only(Transport::Udp)),
    must("other-address", "RFC 5780 §7.4", "OTHER-ADDRESS differs from the server's address in IP and port", other)
        .on(On::Only(Transport::Udp)),
    must("mapped-too", "RFC 5780 §6.1", "a server of RFC 5780 answers with MAPPED-ADDRESS too", mapped)
        .on(On::Only(Transport::Udp)),
    must("response-port", "RFC 5780 §7.5", "RESPONSE-PORT sends the answer there, or is 420", response_port)
        .on(On::Only(Transport::Udp)),
    must("response-port-padding", "RFC 5780 §6.1", "RESPONSE-PORT with PADDING is not processed", with_padding)
        .on(On::Only(Transport::Udp)),
];

fn offered(lab: &Lab<'_>) -> Step<(Reply, SocketAddr)> {
    let reply = lab.stranger()?.ask(&Craft::request(BINDING))?;
    match reply.address(A::OTHER_ADDRESS) {
        Some(other) => Ok((reply, other)),
        None => not_offered("no OTHER-ADDRESS in the answer to Binding"),
    }
}

fn declined(lab: &Lab<'_>) -> Step {
    match offered(lab) {
        Ok(_) => return not_offered("it has a second address"),
        Err(super::check::Stop::NotOffered(_)) => {}
        Err(stop) => return Err(stop),
    }
    let reply = lab.stranger()?.ask(&Craft::request(BINDING).word(A::CHANGE_REQUEST, 6))?;
    expect_code(&reply, 420)?;
    let types = unknown_types(&reply);
    expect(types == [A::CHANGE_REQUEST.0], || format!("UNKNOWN-ATTRIBUTES lists {types:#06x?}"))
}

fn change(lab: &Lab<'_>, flags: u32) -> Step {
    let (_, other) = offered(lab)?;
    let mut client = lab.stranger()?;
    let server = client.wire.server;
    let reply = client.ask(&Craft::request(BINDING).word(A::CHANGE_REQUEST, flags))?;
    expect_code(&reply, 0)?;
    let ip = if flags & 4 != 0 { other.ip() } else { server.ip() };
    let port = if flags & 2 != 0 { other.port() } else { server.port() };
    let (from, wanted) = (client.wire.source, SocketAddr::new(ip, port));
    expect(from == wanted, || format!("from {from}, not {wanted}"))?;
    let origin = reply.address(A::RESPONSE_ORIGIN);
    expect(origin == Some(from), || format!("RESPONSE-ORIGIN {origin:?}, the answer came from {from}"))
}

fn origin(lab: &Lab<'_>) -> Step {
    let (reply, _) = offered(lab)?;
    let (origin, server) = (reply.address(A::RESPONSE_ORIGIN), lab.server()?);
    expect(origin == Some(server), || format!("{origin:?} instead of {server}"))
}

fn other(lab: &Lab<'_>) -> Step {
    let (_, other) = offered(lab)?;
    let server = lab.server()?;
    expect(other.ip() != server.ip() && other.port() != server.port(), || format!("{other} beside {server}"))
}

fn mapped(lab: &Lab<'_>) -> Step {
    let (reply, _) = offered(lab)?;
    expect(reply.address(A::MAPPED_ADDRESS) == reply.xor_address(A::XOR_MAPPED_ADDRESS), || "it does not".into())
}

fn response_port(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let socket = UdpSocket::bind((lab.target.from, 0))?;
    socket.set_read_timeout(Some(lab.target.patience))?;
    let port = socket.local_addr()?.port();
    let request = Craft::request(BINDING).word(A::RESPONSE_PORT, u32::from(port) << 16);
    client.send(request.bytes())?;
    let deadline = std::time::Instant::now() + lab.target.settle * 2;
    if let Some(reply) = client.answer_to(&request.id(), deadline)? {
        expect_code(&reply, 420)?;
        return not_offered("declined with 420");
    }
    let mut bytes = [0; 1500];
    match socket.recv(&mut bytes) {
        Ok(len) if bytes.get(8..20) == Some(&request.id()[..]) && len >= 20 => Ok(()),
        _ => fail("the answer came nowhere"),
    }
}

fn with_padding(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let port = u32::from(client.wire.local.port()) << 16;
    let reply = client.ask(&Craft::request(BINDING).word(A::RESPONSE_PORT, port).attr(A::PADDING, &[0; 64]))?;
    match reply.code() {
        400 => Ok(()),
        420 => not_offered("declined with 420"),
        _ => fail(format!("{reply}")),
    }
}
