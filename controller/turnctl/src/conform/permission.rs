//! RFC 8656 §9 to §11: permissions, Send and Data.

use std::net::SocketAddr;
use std::time::Duration;

use turn_core::wire::AttributeType as A;

use super::check::{Check, Step, expect, fail, must, not_offered, should};
use super::client::expect_code;
use super::craft::{CREATE_PERMISSION, Craft, SEND};
use super::lab::Lab;

pub(super) const CHECKS: &[Check] = &[
    must("permission-without-peer", "RFC 8656 §10.2", "CreatePermission without XOR-PEER-ADDRESS is 400", |lab| {
        lab.allocation()?.expect(400, Craft::request(CREATE_PERMISSION)).map(drop)
    }),
    must("permission-malformed", "RFC 8656 §10.2", "an XOR-PEER-ADDRESS that cannot be read is 400", malformed),
    must("permission-family", "RFC 8656 §10.2", "a peer of another family than the relayed address is 443", |lab| {
        let peer = lab.other_family();
        lab.allocation()?.expect(443, Craft::request(CREATE_PERMISSION).peer(peer)).map(drop)
    }),
    must("permission-whole", "RFC 8656 §10.2", "a request that fails installs none of its permissions", whole),
    must("permission-several", "RFC 8656 §10.2", "one request permits several peers", several),
    must("permission-port", "RFC 8656 §10.2", "the port of a permission is ignored", port_ignored),
    must("permission-ip", "RFC 8656 §9.1", "a permission for one IP admits no other", other_ip),
    must("permission-own", "RFC 8656 §9.1", "permissions are the allocation's own", own),
    must("permission-needed-in", "RFC 8656 §11.3", "without a permission a peer's packet is dropped", needed_in),
    must("permission-needed-out", "RFC 8656 §11.2", "without a permission a Send indication is dropped", needed_out),
    must("send", "RFC 8656 §11.2", "Send reaches the peer from the relayed address, unchanged", send),
    must("data", "RFC 8656 §11.3", "a peer's packet comes in a Data indication, unchanged", data),
    must("data-indication", "RFC 8656 §11.3", "Data holds the peer's address and port and is not signed", data_form),
    must("send-empty", "RFC 8656 §11.2", "Send with empty DATA sends an empty packet", send_empty),
    must("data-empty", "RFC 8656 §11.3", "an empty packet of a peer comes as empty DATA", data_empty),
    must("send-without-peer", "RFC 8656 §11.2", "Send without XOR-PEER-ADDRESS is dropped", |lab| {
        dropped(lab, |_| Craft::indication(SEND).attr(A::DATA, b"x"))
    }),
    must("send-without-data", "RFC 8656 §11.2", "Send without DATA is dropped", |lab| {
        dropped(lab, |peer| Craft::indication(SEND).peer(peer))
    }),
    must("send-malformed", "RFC 8656 §11.2", "Send with a peer address that cannot be read is dropped", |lab| {
        dropped(lab, |_| Craft::indication(SEND).attr(A::XOR_PEER_ADDRESS, &[0, 1, 2]).attr(A::DATA, b"x"))
    }),
    must(
        "send-unknown",
        "RFC 8489 §6.3.2",
        "Send with an unknown comprehension-required attribute is dropped",
        |lab| dropped(lab, |peer| Craft::indication(SEND).attr(A(0x7F1A), b"?").peer(peer).attr(A::DATA, b"x")),
    ),
    must("send-request", "RFC 8656 §11.2", "Send as a request is no indication: nothing is relayed", |lab| {
        dropped_loudly(lab, |peer| Craft::request(SEND).peer(peer).attr(A::DATA, b"x"))
    }),
    must("send-sizes", "RFC 8656 §11.2", "every length of data from 0 to 9 bytes and 1200 is kept", sizes),
    must("send-dont-fragment", "RFC 8656 §11.2", "Send with DONT-FRAGMENT is relayed, or dropped in silence", fragment),
    should("icmp", "RFC 8656 §11.5", "a peer port that nobody serves comes back as an ICMP attribute", icmp),
];

fn malformed(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    for value in [&[][..], &[0, 1], &[0, 1, 2, 3, 4], &[0, 9, 1, 2, 3, 4, 5, 6], &[0, 2, 1, 2, 3, 4, 5, 6]] {
        let reply = client.signed(Craft::request(CREATE_PERMISSION).attr(A::XOR_PEER_ADDRESS, value))?;
        match reply.code() {
            400 => {}
            // A family that does not exist is another one too.
            443 if value.get(1) == Some(&9) => {}
            code => return fail(format!("{code} for {value:02x?}")),
        }
    }
    Ok(())
}

fn whole(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    let request = Craft::request(CREATE_PERMISSION).peer(peer.address).attr(A::XOR_PEER_ADDRESS, &[0, 1]);
    let reply = client.signed(request)?;
    expect(reply.code() != 0, || "success".into())?;
    peer.send(client.relayed()?, b"not permitted")?;
    lab.settle();
    client.quiet().map(drop)
}

fn several(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let (peer, other) = (lab.peer()?, lab.other_peer()?);
    let reply = client.signed(Craft::request(CREATE_PERMISSION).peer(peer.address).peer(other.address))?;
    if reply.code() == 403 {
        return super::check::not_applicable("the server forbids the peers of this check");
    }
    expect_code(&reply, 0)?;
    for peer in [&peer, &other] {
        peer.send(client.relayed()?, b"hello")?;
        client.must_get(peer.address, b"hello")?;
    }
    Ok(())
}

fn port_ignored(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let (peer, other) = (lab.peer()?, lab.peer()?);
    client.permit(&peer)?;
    other.send(client.relayed()?, b"another port")?;
    client.must_get(other.address, b"another port")
}

fn other_ip(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let (peer, other) = (lab.peer()?, lab.other_peer()?);
    client.permit(&peer)?;
    other.send(client.relayed()?, b"not permitted")?;
    lab.settle();
    client.quiet().map(drop)?;
    client.send_to(other.address, b"not permitted")?;
    other.must_get_nothing(lab.target.settle)
}

fn own(lab: &Lab<'_>) -> Step {
    let (mut first, mut second) = (lab.allocation()?, lab.allocation()?);
    let peer = lab.peer()?;
    first.permit(&peer)?;
    peer.send(second.relayed()?, b"not permitted")?;
    lab.settle();
    second.quiet().map(drop)
}

fn needed_in(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    peer.send(client.relayed()?, b"not permitted")?;
    lab.settle();
    client.quiet().map(drop)
}

fn needed_out(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.silence(Craft::indication(SEND).peer(peer.address).attr(A::DATA, b"not permitted").bytes())?;
    peer.must_get_nothing(lab.target.settle)?;
    // Nor does it install one.
    peer.send(client.relayed()?, b"not permitted either")?;
    lab.settle();
    client.quiet().map(drop)
}

fn send(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    client.send_to(peer.address, b"hello peer")?;
    peer.must_get(b"hello peer", client.relayed()?, lab.target.patience)
}

fn data(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    peer.send(client.relayed()?, b"hello client")?;
    client.must_get(peer.address, b"hello client")
}

fn data_form(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    peer.send(client.relayed()?, b"form")?;
    let (from, _, reply) = client.data()?;
    expect(from == peer.address, || format!("it names {from}, the packet came from {}", peer.address))?;
    expect(!reply.has(A::MESSAGE_INTEGRITY), || "it holds MESSAGE-INTEGRITY".into())
}

fn send_empty(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    client.send_to(peer.address, b"")?;
    peer.must_get(b"", client.relayed()?, lab.target.patience)
}

fn data_empty(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    peer.send(client.relayed()?, b"")?;
    client.must_get(peer.address, b"")
}

/// Neither the client nor the permitted peer hears of it.
fn dropped(lab: &Lab<'_>, message: fn(SocketAddr) -> Craft) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    client.silence(message(peer.address).bytes())?;
    peer.must_get_nothing(lab.target.settle)
}

/// The peer does not hear of it.
fn dropped_loudly(lab: &Lab<'_>, message: fn(SocketAddr) -> Craft) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    client.send(message(peer.address).bytes())?;
    peer.must_get_nothing(lab.target.settle)
}

fn sizes(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    let relayed = client.relayed()?;
    for len in (0..10).chain([1200]) {
        let data: Vec<u8> = (0..len).map(|at: usize| at as u8 | 1).collect();
        client.send_to(peer.address, &data)?;
        peer.must_get(&data, relayed, lab.target.patience)?;
        peer.send(relayed, &data)?;
        client.must_get(peer.address, &data)?;
    }
    Ok(())
}

fn fragment(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    client.silence(
        Craft::indication(SEND).peer(peer.address).attr(A::DONT_FRAGMENT, &[]).attr(A::DATA, b"whole").bytes(),
    )?;
    match peer.receive(lab.target.settle.max(Duration::from_millis(200))) {
        Some((data, _)) if data == b"whole" => Ok(()),
        Some(_) => fail("something else arrived"),
        None => not_offered("dropped"),
    }
}

fn icmp(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    let closed = peer.address;
    drop(peer);
    // The kernel limits how often it says so; two packets are two chances.
    for _ in 0..2 {
        client.send_to(closed, b"anybody?")?;
        let Some(packet) = client.next_within(Duration::from_millis(500))? else { continue };
        let Some(reply) = super::reply::Reply::parse(packet) else { return fail("what arrived is no STUN message") };
        let Some(value) = reply.get(A::ICMP) else { return fail(format!("{reply} without ICMP")) };
        let port_unreachable = if closed.is_ipv4() { [3, 3] } else { [1, 4] };
        expect(value.len() == 8 && value[2..4] == port_unreachable, || format!("ICMP holds {value:02x?}"))?;
        let from = reply.xor_address(A::XOR_PEER_ADDRESS);
        return expect(from.is_some_and(|from| from.ip() == closed.ip()), || format!("it names {from:?}"));
    }
    not_offered("no ICMP attribute")
}
