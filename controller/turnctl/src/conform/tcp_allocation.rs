//! RFC 6062: TCP allocations, Connect, ConnectionBind, ConnectionAttempt.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use turn_core::wire::AttributeType as A;

use super::allocate::EVEN;
use super::check::{Check, On, Step, expect, fail, must, not_applicable, not_offered};
use super::client::{Client, expect_code};
use super::craft::{ALLOCATE, CONNECT, CONNECTION_ATTEMPT, CONNECTION_BIND, CREATE_PERMISSION, Craft, INDICATION, TCP};
use super::lab::Lab;
use super::reply::Reply;
use super::wire::connect;

pub(super) const CHECKS: &[Check] = &[
    must("tcp-over-datagrams", "RFC 6062 §5.1", "a TCP allocation asked for over UDP is 400", over_datagrams)
        .on(On::Datagrams),
    must("tcp-allocate", "RFC 6062 §5.1", "a TCP allocation over a stream succeeds, or is declined with 442", |lab| {
        allocation(lab).map(drop)
    })
    .on(On::Streams),
    must("tcp-dont-fragment", "RFC 6062 §5.1", "with DONT-FRAGMENT it is 400", |lab| with(lab, A::DONT_FRAGMENT, &[]))
        .on(On::Streams),
    must("tcp-even-port", "RFC 6062 §5.1", "with EVEN-PORT it is 400", |lab| with(lab, A::EVEN_PORT, &EVEN))
        .on(On::Streams),
    must("tcp-reservation", "RFC 6062 §5.1", "with RESERVATION-TOKEN it is 400", |lab| {
        with(lab, A::RESERVATION_TOKEN, b"notoken!")
    })
    .on(On::Streams),
    must("connect-no-allocation", "RFC 6062 §5.2", "Connect without an allocation is 437", |lab| {
        drop(allocation(lab)?);
        let peer = lab.peer()?.address;
        lab.client()?.expect(437, Craft::request(CONNECT).peer(peer)).map(drop)
    })
    .on(On::Streams),
    must("connect-without-peer", "RFC 6062 §5.2", "Connect without XOR-PEER-ADDRESS is 400", |lab| {
        allocation(lab)?.expect(400, Craft::request(CONNECT)).map(drop)
    })
    .on(On::Streams),
    must("connect", "RFC 6062 §5.2", "Connect reaches the peer and gives a CONNECTION-ID", |lab| {
        connected(lab).map(drop)
    })
    .on(On::Streams),
    must("connect-twice", "RFC 6062 §5.2", "a second Connect to the same peer is 446", twice).on(On::Streams),
    must("connect-refused", "RFC 6062 §5.2", "a peer that does not listen is 447", refused).on(On::Streams),
    must("connect-source", "RFC 6062 §5.2", "the connection comes from the relayed address", from_relayed)
        .on(On::Streams),
    must("connection-bind", "RFC 6062 §5.4", "after ConnectionBind bytes pass both ways, as they are", pipe)
        .on(On::Streams),
    must("connection-early", "RFC 6062 §5.4", "what the peer sent before ConnectionBind is not lost", early)
        .on(On::Streams),
    must("connection-bind-unknown", "RFC 6062 §5.4", "an id that nobody gave out is 400", |lab| {
        let control = allocation(lab)?;
        let request = Craft::request(CONNECTION_BIND).word(A::CONNECTION_ID, 0x7BAD_1DEA);
        expect_code(&bind(lab, &control, request)?.1, 400)
    })
    .on(On::Streams),
    must("connection-bind-without", "RFC 6062 §5.4", "ConnectionBind without CONNECTION-ID is 400", |lab| {
        let control = allocation(lab)?;
        let request = Craft::request(CONNECTION_BIND);
        expect_code(&bind(lab, &control, request)?.1, 400)
    })
    .on(On::Streams),
    must("connection-bind-datagrams", "RFC 6062 §5.4", "ConnectionBind over UDP is 400", bind_over_datagrams)
        .on(On::Datagrams),
    must("connection-bind-once", "RFC 6062 §5.4", "an id that was bound is 400", once).on(On::Streams),
    must("connection-close", "RFC 6062 §5.5", "when the peer closes, the client data connection closes", peer_closes)
        .on(On::Streams),
    must(
        "connection-close-client",
        "RFC 6062 §5.5",
        "when the client closes, the peer connection closes",
        client_closes,
    )
    .on(On::Streams),
    must("connection-end", "RFC 6062 §5.5", "the end of the allocation closes its data connections", ends)
        .on(On::Streams),
    must("connection-attempt", "RFC 6062 §5.3", "a permitted peer's connection is told in ConnectionAttempt", attempt)
        .on(On::Streams),
    must("connection-unpermitted", "RFC 6062 §5.3", "a connection without permission is closed at once", unpermitted)
        .on(On::Streams),
];

fn request(lab: &Lab<'_>) -> Craft {
    let request = Craft::request(ALLOCATE).attr(A::REQUESTED_TRANSPORT, &TCP);
    if lab.target.peer_ip.is_ipv4() { request } else { request.attr(A::REQUESTED_ADDRESS_FAMILY, &[2, 0, 0, 0]) }
}

/// A client with a TCP allocation.
pub(crate) fn allocation(lab: &Lab<'_>) -> Step<Client> {
    if !lab.transport.is_stream() {
        return not_applicable("only over TCP and TLS");
    }
    let mut client = lab.client()?;
    let reply = client.signed(request(lab))?;
    match reply.code() {
        442 => not_offered("declined with 442"),
        403 => not_offered("forbidden with 403"),
        0 => match reply.xor_address(A::XOR_RELAYED_ADDRESS) {
            Some(relayed) => {
                client.adopt(relayed);
                Ok(client)
            }
            None => fail("no XOR-RELAYED-ADDRESS"),
        },
        code => fail(format!("{code}")),
    }
}

fn over_datagrams(lab: &Lab<'_>) -> Step {
    let reply = lab.client()?.signed(request(lab))?;
    match reply.code() {
        442 => not_offered("declined with 442"),
        _ => expect_code(&reply, 400),
    }
}

fn with(lab: &Lab<'_>, attribute: A, value: &[u8]) -> Step {
    drop(allocation(lab)?);
    lab.client()?.expect(400, request(lab).attr(attribute, value)).map(drop)
}

/// The control connection, the id, and the peer's end.
fn connected(lab: &Lab<'_>) -> Step<(Client, Vec<u8>, TcpStream)> {
    let mut client = allocation(lab)?;
    let listener = lab.tcp_peer()?;
    let reply = client.signed(Craft::request(CONNECT).peer(listener.local_addr()?))?;
    if reply.code() == 403 {
        return not_applicable("the server forbids the peers of this check: --peer-ip names others");
    }
    expect_code(&reply, 0)?;
    let Some(id) = reply.get(A::CONNECTION_ID).filter(|id| id.len() == 4) else { return fail("no CONNECTION-ID") };
    let stream = accept(&listener, lab.target.patience)?;
    Ok((client, id.to_vec(), stream))
}

fn accept(listener: &TcpListener, patience: Duration) -> Step<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(patience))?;
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    fail("no connection reached the peer")
}

/// What ConnectionBind on a new connection of the same user gives. The nonce of the control connection is tried first, as
/// RFC 8489 §9.2.3.2 has it, and replaced when it is not valid here.
fn bind(lab: &Lab<'_>, control: &Client, request: Craft) -> Step<(Client, Reply)> {
    let mut data = lab.stranger()?;
    data.credentials = control.credentials.clone();
    let reply = data.signed(request)?;
    Ok((data, reply))
}

/// A data connection bound to an id.
fn bound(lab: &Lab<'_>, control: &Client, id: &[u8]) -> Step<Client> {
    let (data, reply) = bind(lab, control, Craft::request(CONNECTION_BIND).attr(A::CONNECTION_ID, id))?;
    expect_code(&reply, 0)?;
    Ok(data)
}

fn twice(lab: &Lab<'_>) -> Step {
    let mut client = allocation(lab)?;
    let listener = lab.tcp_peer()?;
    let peer = listener.local_addr()?;
    let reply = client.signed(Craft::request(CONNECT).peer(peer))?;
    if reply.code() == 403 {
        return not_applicable("the server forbids the peers of this check");
    }
    expect_code(&reply, 0)?;
    client.expect(446, Craft::request(CONNECT).peer(peer)).map(drop)
}

fn refused(lab: &Lab<'_>) -> Step {
    let mut client = allocation(lab)?;
    let listener = lab.tcp_peer()?;
    let peer = listener.local_addr()?;
    drop(listener);
    let reply = client.signed(Craft::request(CONNECT).peer(peer))?;
    if reply.code() == 403 {
        return not_applicable("the server forbids the peers of this check");
    }
    expect_code(&reply, 447)
}

fn from_relayed(lab: &Lab<'_>) -> Step {
    let (client, _, stream) = connected(lab)?;
    let (from, relayed) = (stream.peer_addr()?, client.relayed()?);
    expect(from == relayed, || format!("it comes from {from}, the relayed address is {relayed}"))
}

/// Reads exactly what is expected from a data connection.
fn must_read(data: &mut Client, wanted: &[u8], patience: Duration) -> Step {
    let deadline = Instant::now() + patience;
    let mut got = Vec::new();
    while got.len() < wanted.len() && Instant::now() < deadline {
        match data.wire.receive_raw(deadline) {
            Some(bytes) => got.extend(bytes),
            None => break,
        }
    }
    expect(got == wanted, || format!("{} of {} bytes came through as they were", got.len(), wanted.len()))
}

fn pipe(lab: &Lab<'_>) -> Step {
    let (control, id, mut peer) = connected(lab)?;
    let mut data = bound(lab, &control, &id)?;
    // Bytes that look like STUN and like ChannelData are neither here.
    let there =
        [Craft::request(1).into_bytes(), vec![0x40, 0, 0, 1, 9], (0..=255).cycle().take(40_000).collect()].concat();
    data.send(&there)?;
    let mut got = vec![0; there.len()];
    peer.read_exact(&mut got)?;
    expect(got == there, || "the bytes to the peer were changed".into())?;
    let back: Vec<u8> = there.iter().rev().copied().collect();
    peer.write_all(&back)?;
    must_read(&mut data, &back, lab.target.patience)
}

fn early(lab: &Lab<'_>) -> Step {
    let (control, id, mut peer) = connected(lab)?;
    peer.write_all(b"the peer speaks first")?;
    lab.settle();
    let mut data = bound(lab, &control, &id)?;
    must_read(&mut data, b"the peer speaks first", lab.target.patience)
}

fn bind_over_datagrams(lab: &Lab<'_>) -> Step {
    let mut client = lab.client()?;
    let request = client.credentials.sign(Craft::request(CONNECTION_BIND).word(A::CONNECTION_ID, 7));
    client.send(request.bytes())?;
    let deadline = Instant::now() + lab.target.settle * 3;
    match client.answer_to(&request.id(), deadline)? {
        None => not_offered("the method is unknown"),
        Some(reply) => expect_code(&reply, 400),
    }
}

fn once(lab: &Lab<'_>) -> Step {
    let (control, id, _peer) = connected(lab)?;
    let _data = bound(lab, &control, &id)?;
    let (_, reply) = bind(lab, &control, Craft::request(CONNECTION_BIND).attr(A::CONNECTION_ID, &id))?;
    expect_code(&reply, 400)
}

fn closes(data: &mut Client, patience: Duration) -> Step {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if data.wire.receive_raw(deadline).is_none() {
            return Ok(());
        }
    }
    fail("it stays open")
}

fn peer_closed(mut peer: TcpStream) -> Step {
    let mut byte = [0; 64];
    loop {
        match peer.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if super::wire::is_timeout(&error) => return fail("it stays open"),
            // A reset is an end too.
            Err(_) => return Ok(()),
        }
    }
}

fn peer_closes(lab: &Lab<'_>) -> Step {
    let (control, id, peer) = connected(lab)?;
    let mut data = bound(lab, &control, &id)?;
    drop(peer);
    closes(&mut data, lab.target.patience)
}

fn client_closes(lab: &Lab<'_>) -> Step {
    let (control, id, peer) = connected(lab)?;
    drop(bound(lab, &control, &id)?);
    peer_closed(peer)
}

fn ends(lab: &Lab<'_>) -> Step {
    let (mut control, id, peer) = connected(lab)?;
    let mut data = bound(lab, &control, &id)?;
    control.delete()?;
    closes(&mut data, lab.target.patience)?;
    peer_closed(peer)
}

fn permit(client: &mut Client, peer: SocketAddr) -> Step {
    let reply = client.signed(Craft::request(CREATE_PERMISSION).peer(peer))?;
    if reply.code() == 403 {
        return not_applicable("the server forbids the peers of this check");
    }
    expect_code(&reply, 0)
}

fn attempt(lab: &Lab<'_>) -> Step {
    let mut control = allocation(lab)?;
    permit(&mut control, SocketAddr::new(lab.target.peer_ip, 9))?;
    let mut peer = connect(control.relayed()?, lab.target.peer_ip)?;
    let Some(reply) = Reply::parse(control.next()?) else { return fail("what arrived is no STUN message") };
    expect((reply.class(), reply.method()) == (INDICATION, CONNECTION_ATTEMPT), || format!("{reply}"))?;
    let from = reply.xor_address(A::XOR_PEER_ADDRESS);
    expect(from == Some(peer.local_addr()?), || format!("it names {from:?}"))?;
    let Some(id) = reply.get(A::CONNECTION_ID) else { return fail("no CONNECTION-ID") };
    let mut data = bound(lab, &control, id)?;
    peer.write_all(b"hello")?;
    must_read(&mut data, b"hello", lab.target.patience)
}

fn unpermitted(lab: &Lab<'_>) -> Step {
    let mut control = allocation(lab)?;
    let peer = match connect(control.relayed()?, lab.target.peer_ip) {
        Ok(peer) => peer,
        // Closed before we saw that it was open.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    peer.set_read_timeout(Some(lab.target.patience))?;
    peer_closed(peer)?;
    control.quiet().map(drop)
}
