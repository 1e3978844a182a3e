//! RFC 8656 §12: channels and ChannelData.

use turn_core::wire::AttributeType as A;

use super::check::{Check, On, Step, expect, must};
use super::client::expect_code;
use super::craft::{CHANNEL_BIND, Craft, REFRESH, channel_data};
use super::lab::Lab;

pub(super) const CHECKS: &[Check] = &[
    must("channel-out", "RFC 8656 §12.6", "ChannelData reaches the peer from the relayed address", out),
    must("channel-in", "RFC 8656 §12.5", "with a channel bound the peer's packets come as ChannelData", inward),
    must("channel-permits", "RFC 8656 §12.2", "ChannelBind installs a permission for the peer's IP", permits),
    must("channel-without-number", "RFC 8656 §12.2", "ChannelBind without CHANNEL-NUMBER is 400", |lab| {
        let peer = lab.peer()?.address;
        lab.allocation()?.expect(400, Craft::request(CHANNEL_BIND).peer(peer)).map(drop)
    }),
    must("channel-without-peer", "RFC 8656 §12.2", "ChannelBind without XOR-PEER-ADDRESS is 400", |lab| {
        lab.allocation()?.expect(400, Craft::request(CHANNEL_BIND).channel(0x4000)).map(drop)
    }),
    must("channel-malformed", "RFC 8656 §18.1", "a CHANNEL-NUMBER of 1 byte is 400", |lab| {
        let peer = lab.peer()?.address;
        let request = Craft::request(CHANNEL_BIND).attr(A::CHANNEL_NUMBER, &[0x40]).peer(peer);
        lab.allocation()?.expect(400, request).map(drop)
    }),
    must("channel-rffu", "RFC 8656 §18.1", "the reserved half of CHANNEL-NUMBER is ignored", |lab| {
        let peer = lab.peer()?;
        let mut client = lab.allocation()?;
        client.permit(&peer)?;
        let request = Craft::request(CHANNEL_BIND).word(A::CHANNEL_NUMBER, 0x4000_BEEF).peer(peer.address);
        client.expect(0, request).map(drop)
    }),
    must("channel-0x0000", "RFC 8656 §12.2", "channel 0x0000 is 400", |lab| number(lab, 0x0000, 400)),
    must("channel-0x3fff", "RFC 8656 §12.2", "channel 0x3FFF is 400", |lab| number(lab, 0x3FFF, 400)),
    must("channel-0x4000", "RFC 8656 §12.2", "channel 0x4000 is good", |lab| number(lab, 0x4000, 0)),
    must("channel-0x4fff", "RFC 8656 §12.2", "channel 0x4FFF is good", |lab| number(lab, 0x4FFF, 0)),
    must("channel-0x5000", "RFC 8656 §12.2", "channel 0x5000 is 400", |lab| number(lab, 0x5000, 400)),
    must("channel-0x7ffe", "RFC 8656 §12.2", "channel 0x7FFE is 400", |lab| number(lab, 0x7FFE, 400)),
    must("channel-0xffff", "RFC 8656 §12.2", "channel 0xFFFF is 400", |lab| number(lab, 0xFFFF, 400)),
    must("channel-family", "RFC 8656 §12.2", "a peer of another family than the relayed address is 443", |lab| {
        let peer = lab.other_family();
        lab.allocation()?.expect(443, Craft::request(CHANNEL_BIND).channel(0x4000).peer(peer)).map(drop)
    }),
    must("channel-refresh", "RFC 8656 §12.2", "binding the same channel to the same peer again succeeds", |lab| {
        rebind(lab, 0x4000, false, 0)
    }),
    must("channel-other-peer", "RFC 8656 §12.2", "a bound channel cannot be bound to another peer: 400", |lab| {
        rebind(lab, 0x4000, true, 400)
    }),
    must("channel-other-number", "RFC 8656 §12.2", "a bound peer cannot be bound to another channel: 400", |lab| {
        rebind(lab, 0x4001, false, 400)
    }),
    must("channel-two", "RFC 8656 §12", "two channels to two peers do not meddle with each other", two),
    must("channel-own", "RFC 8656 §12", "channel numbers are the allocation's own", own),
    must("channel-unbound", "RFC 8656 §12.6", "ChannelData on a channel that is not bound is dropped", |lab| {
        let mut client = lab.allocation()?;
        client.silence(&channel_data(0x4ABC, b"nobody", lab.transport.is_stream())).map(drop)
    }),
    must("channel-no-allocation", "RFC 8656 §5", "ChannelData without an allocation is dropped", |lab| {
        let mut client = lab.stranger()?;
        client.silence(&channel_data(0x4000, b"nobody", lab.transport.is_stream())).map(drop)
    }),
    must("channel-reserved", "RFC 8656 §12.6", "ChannelData with a reserved number is dropped", |lab| {
        lab.allocation()?.silence(&channel_data(0x5000, b"data", lab.transport.is_stream())).map(drop)
    })
    .on(On::Datagrams),
    must("channel-truncated", "RFC 8656 §12.6", "a datagram too short for its ChannelData is dropped", truncated)
        .on(On::Datagrams),
    must("channel-padded", "RFC 8656 §12.5", "padding of a datagram's ChannelData is not relayed", padded)
        .on(On::Datagrams),
    must("channel-empty", "RFC 8656 §12.6", "ChannelData of length 0 sends an empty packet", empty),
    must(
        "channel-empty-in",
        "RFC 8656 §12.7",
        "an empty packet of the peer comes as ChannelData of length 0",
        empty_in,
    ),
    must("channel-sizes", "RFC 8656 §12.5", "every length of data from 1 to 9 bytes and 1200 is kept", sizes),
    must("channel-and-send", "RFC 8656 §12.5", "Send works beside a channel to the same peer", and_send),
    must("channel-other-port", "RFC 8656 §12.7", "another port of the peer's IP comes in Data indications", other_port),
    must("channel-keeps", "RFC 8656 §12", "channels outlive a Refresh", keeps),
];

fn out(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4123, &peer)?;
    client.send_on(0x4123, b"hello peer")?;
    peer.must_get(b"hello peer", client.relayed()?, lab.target.patience)
}

fn inward(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4123, &peer)?;
    peer.send(client.relayed()?, b"hello client")?;
    client.must_get_on(0x4123, b"hello client")
}

fn permits(lab: &Lab<'_>) -> Step {
    let (mut client, peer, other) = (lab.allocation()?, lab.peer()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    client.send_to(other.address, b"same IP")?;
    other.must_get(b"same IP", client.relayed()?, lab.target.patience)
}

fn number(lab: &Lab<'_>, number: u16, code: u16) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    if code == 0 {
        return client.bind(number, &peer);
    }
    client.permit(&peer)?;
    client.expect(code, Craft::request(CHANNEL_BIND).channel(number).peer(peer.address)).map(drop)
}

fn rebind(lab: &Lab<'_>, number: u16, other: bool, code: u16) -> Step {
    let (mut client, peer, another) = (lab.allocation()?, lab.peer()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let to = if other { another.address } else { peer.address };
    client.expect(code, Craft::request(CHANNEL_BIND).channel(number).peer(to))?;
    // What was bound first goes on.
    client.send_on(0x4000, b"first")?;
    peer.must_get(b"first", client.relayed()?, lab.target.patience)
}

fn two(lab: &Lab<'_>) -> Step {
    let (mut client, first, second) = (lab.allocation()?, lab.peer()?, lab.peer()?);
    client.bind(0x4000, &first)?;
    client.bind(0x4001, &second)?;
    let relayed = client.relayed()?;
    for (number, peer) in [(0x4000_u16, &first), (0x4001, &second), (0x4000, &first)] {
        let data = number.to_be_bytes();
        client.send_on(number, &data)?;
        peer.must_get(&data, relayed, lab.target.patience)?;
        peer.send(relayed, &data)?;
        client.must_get_on(number, &data)?;
    }
    Ok(())
}

fn own(lab: &Lab<'_>) -> Step {
    let (mut first, mut second) = (lab.allocation()?, lab.allocation()?);
    let (mine, yours) = (lab.peer()?, lab.peer()?);
    first.bind(0x4000, &mine)?;
    second.bind(0x4000, &yours)?;
    first.send_on(0x4000, b"first")?;
    second.send_on(0x4000, b"second")?;
    mine.must_get(b"first", first.relayed()?, lab.target.patience)?;
    yours.must_get(b"second", second.relayed()?, lab.target.patience)
}

fn truncated(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let message = channel_data(0x4000, b"whole message", false);
    client.silence(&message[..message.len() - 1])?;
    client.silence(&message[..4])?;
    client.silence(&message[..3])?;
    peer.must_get_nothing(lab.target.settle)
}

fn padded(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    client.send(&channel_data(0x4000, b"x", true))?;
    peer.must_get(b"x", client.relayed()?, lab.target.patience)
}

fn empty(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    client.send_on(0x4000, b"")?;
    peer.must_get(b"", client.relayed()?, lab.target.patience)
}

fn empty_in(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    peer.send(client.relayed()?, b"")?;
    client.must_get_on(0x4000, b"")
}

fn sizes(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let relayed = client.relayed()?;
    for len in (1..10).chain([1200]) {
        let data: Vec<u8> = (0..len).map(|at: usize| at as u8 | 1).collect();
        client.send_on(0x4000, &data)?;
        peer.must_get(&data, relayed, lab.target.patience)?;
        peer.send(relayed, &data)?;
        client.must_get_on(0x4000, &data)?;
    }
    Ok(())
}

fn and_send(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    client.send_to(peer.address, b"by Send")?;
    peer.must_get(b"by Send", client.relayed()?, lab.target.patience)
}

fn other_port(lab: &Lab<'_>) -> Step {
    let (mut client, peer, other) = (lab.allocation()?, lab.peer()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    other.send(client.relayed()?, b"no channel")?;
    client.must_get(other.address, b"no channel")
}

fn keeps(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let reply = client.signed(Craft::request(REFRESH))?;
    expect_code(&reply, 0)?;
    client.send_on(0x4000, b"still")?;
    let got = peer.receive(lab.target.patience);
    expect(got.is_some_and(|(data, _)| data == b"still"), || "the channel is gone".into())
}
