//! A: peer addresses. One policy for CreatePermission, ChannelBind, Send and Connect, whatever form an address takes.

use std::net::{IpAddr, SocketAddr};

use turn_core::wire::AttributeType as A;

use crate::conform::allocate::{IPV4, IPV6};
use crate::conform::check::{Check, Step, Stop, expect, fail, must, not_applicable};
use crate::conform::client::Client;
use crate::conform::craft::{BINDING, CHANNEL_BIND, CONNECT, CREATE_PERMISSION, Craft, SEND};
use crate::conform::lab::Lab;
use crate::conform::tcp_allocation;

const SECTION: &str = "abuse A, RFC 8656 §21.1.5";

/// Rows for addresses that a relay on the internet must not reach for its clients.
macro_rules! forbidden {
    ($($id:literal $address:literal $what:literal;)*) => {
        &[$(must(
            concat!("peer-", $id),
            SECTION,
            concat!($what, " ", $address, " is refused as a peer"),
            |lab| forbidden(lab, $address),
        )),*]
    };
}

pub(super) const FORBIDDEN: &[Check] = forbidden! {
    "this-host" "0.0.0.0" "this host";
    "this-network" "0.1.2.3" "this network";
    "loopback" "127.0.0.1" "loopback";
    "loopback-last" "127.255.255.254" "loopback";
    "private-10" "10.0.0.1" "private";
    "private-172" "172.16.0.1" "private";
    "private-172-last" "172.31.255.254" "private";
    "private-192" "192.168.0.1" "private";
    "carrier-nat" "100.64.0.1" "carrier-grade NAT";
    "metadata" "169.254.169.254" "the metadata service";
    "multicast" "224.0.0.1" "multicast";
    "multicast-last" "239.255.255.255" "multicast";
    "reserved" "240.0.0.1" "reserved";
    "broadcast" "255.255.255.255" "broadcast";
    "v6-unspecified" "::" "unspecified";
    "v6-loopback" "::1" "loopback";
    "v6-unique-local" "fc00::1" "unique local";
    "v6-unique-local-fd" "fd12:3456::1" "unique local";
    "v6-site-local" "fec0::1" "site-local";
    "v6-link-local" "fe80::1" "link-local";
    "v6-multicast" "ff02::1" "multicast";
    "v6-mapped-loopback" "::ffff:127.0.0.1" "IPv4-mapped";
    "v6-mapped-private" "::ffff:10.0.0.1" "IPv4-mapped";
    "v6-mapped-public" "::ffff:8.8.8.8" "IPv4-mapped";
    "v6-compatible-loopback" "::127.0.0.1" "IPv4-compatible";
    "v6-compatible-private" "::10.0.0.1" "IPv4-compatible";
    "v6-nat64-loopback" "64:ff9b::7f00:1" "NAT64";
    "v6-nat64-private" "64:ff9b::a00:1" "NAT64";
    "v6-teredo" "2001::1" "Teredo";
    "v6-6to4-loopback" "2002:7f00:1::1" "6to4";
    "v6-6to4-private" "2002:a00:1::1" "6to4";
};

pub(super) const OTHERS: &[Check] = &[
    must("peer-port-0", SECTION, "port 0 is nobody: no channel, no packet", port_zero),
    must("peer-own-listener", SECTION, "a client does not reach the server's own port through the relay", own_listener),
    must("peer-mixed", SECTION, "one forbidden address refuses the whole CreatePermission", mixed),
    must("peer-mapped-own", SECTION, "the IPv4-mapped form of a permitted peer is no way around the family", mapped),
    must("peer-itself", SECTION, "a packet to the allocation's own relayed address comes back once at most", itself),
];

fn allocation_of(lab: &Lab<'_>, family: &[u8; 4]) -> Step<Option<Client>> {
    let mut client = lab.client()?;
    let reply = client.signed(lab.allocate_plain().attr(A::REQUESTED_ADDRESS_FAMILY, family))?;
    match (reply.code(), reply.xor_address(A::XOR_RELAYED_ADDRESS)) {
        (0, Some(relayed)) => {
            client.adopt(relayed);
            Ok(Some(client))
        }
        (440, _) => Ok(None),
        _ => fail(format!("Allocate: {reply}")),
    }
}

fn forbidden(lab: &Lab<'_>, address: &str) -> Step {
    let Ok(ip) = address.parse::<IpAddr>() else { return fail("not an address") };
    let peer = SocketAddr::new(ip, 9);
    let mut through = Vec::new();
    // On an allocation of the same family; where there is none, on the other, which refuses with 443.
    let own = if ip.is_ipv4() { &IPV4 } else { &IPV6 };
    let mut client = match allocation_of(lab, own)? {
        Some(client) => client,
        None => lab.allocation()?,
    };
    for (way, request) in [
        ("CreatePermission", Craft::request(CREATE_PERMISSION).peer(peer)),
        ("ChannelBind", Craft::request(CHANNEL_BIND).channel(0x4000).peer(peer)),
    ] {
        let reply = client.signed(request)?;
        match reply.code() {
            0 => through.push(way.to_owned()),
            400 | 403 | 443 => {}
            code => through.push(format!("{way} ({code})")),
        }
    }
    client.send(Craft::indication(SEND).peer(peer).attr(A::DATA, b"into the house").bytes())?;
    drop(client);
    if lab.transport.is_stream()
        && let Ok(mut client) = tcp_allocation::allocation(lab)
    {
        match client.signed(Craft::request(CONNECT).peer(peer)) {
            Ok(reply) if matches!(reply.code(), 400 | 403 | 443) => {}
            Ok(reply) => through.push(format!("Connect ({})", reply.code())),
            // It is trying to connect.
            Err(Stop::Fail(seen)) => through.push(format!("Connect ({seen})")),
            Err(stop) => return Err(stop),
        }
    }
    lab.alive()?;
    expect(through.is_empty(), || format!("let through: {}", through.join(", ")))
}

fn port_zero(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = SocketAddr::new(lab.target.peer_ip, 0);
    let reply = client.signed(Craft::request(CHANNEL_BIND).channel(0x4000).peer(peer))?;
    expect(matches!(reply.code(), 400 | 403), || format!("ChannelBind: {reply}"))?;
    client.silence(Craft::indication(SEND).peer(peer).attr(A::DATA, b"nobody").bytes())?;
    lab.alive()
}

fn own_listener(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let server = lab.server()?;
    if server.is_ipv4() != client.relayed()?.is_ipv4() {
        return not_applicable("the server's address is of the other family");
    }
    let reply = client.signed(Craft::request(CREATE_PERMISSION).peer(server))?;
    if reply.code() != 0 {
        return Ok(());
    }
    // A server may be the peer of its own clients, at relayed ports.
    let inner = Craft::request(BINDING);
    client.send_to(server, inner.bytes())?;
    match client.next_within(lab.target.settle * 2)? {
        None => Ok(()),
        Some(_) => fail("its STUN port answered through the relay"),
    }
}

fn mixed(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    let other: SocketAddr = if lab.target.peer_ip.is_ipv4() {
        ([169, 254, 169, 254], 80).into()
    } else {
        (std::net::Ipv6Addr::new(0xFE80, 0, 0, 0, 0, 0, 0, 1), 80).into()
    };
    let reply = client.signed(Craft::request(CREATE_PERMISSION).peer(peer.address).peer(other))?;
    expect(reply.code() == 403, || format!("{reply}"))?;
    peer.send(client.relayed()?, b"not permitted")?;
    lab.settle();
    client.quiet().map(drop)
}

fn mapped(lab: &Lab<'_>) -> Step {
    let IpAddr::V4(ip) = lab.target.peer_ip else { return not_applicable("needs IPv4 peers") };
    let mut client = lab.allocation()?;
    let peer = lab.peer()?;
    client.permit(&peer)?;
    let disguised = SocketAddr::new(ip.to_ipv6_mapped().into(), peer.address.port());
    let reply = client.signed(Craft::request(CREATE_PERMISSION).peer(disguised))?;
    expect(matches!(reply.code(), 400 | 403 | 443), || format!("CreatePermission: {reply}"))?;
    client.send_to(disguised, b"disguised")?;
    peer.must_get_nothing(lab.target.settle)
}

fn itself(lab: &Lab<'_>) -> Step {
    let mut client = lab.allocation()?;
    let relayed = client.relayed()?;
    let reply = client.signed(Craft::request(CHANNEL_BIND).channel(0x4000).peer(relayed))?;
    if reply.code() != 0 {
        return lab.alive();
    }
    client.send_on(0x4000, b"round and round")?;
    let mut came = 0;
    while client.next_within(lab.target.settle)?.is_some() && came < 10 {
        came += 1;
    }
    expect(came <= 1, || format!("it came back {came} times"))?;
    lab.alive()
}
