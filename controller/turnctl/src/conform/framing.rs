//! RFC 8656 §12.5 and RFC 8489 §6.2.2: frames on TCP and TLS.

use std::time::Duration;

use super::check::{Check, On, Step, expect, fail, must, should};
use super::craft::{BINDING, Craft, channel_data};
use super::lab::Lab;

pub(super) const CHECKS: &[Check] = &[
    must("stream-bytewise", "RFC 8489 §6.2.2", "a request that comes byte by byte is answered", bytewise)
        .on(On::Streams),
    must("stream-joined", "RFC 8489 §6.2.2", "several messages in one segment are all read", joined).on(On::Streams),
    must("stream-padding-in", "RFC 8656 §12.5", "ChannelData is read with its padding and relayed without", padding_in)
        .on(On::Streams),
    must("stream-padding-out", "RFC 8656 §12.5", "ChannelData from the server is padded to 4 bytes", padding_out)
        .on(On::Streams),
    must("stream-split", "RFC 8656 §12.5", "ChannelData split anywhere is put together", split).on(On::Streams),
    should("stream-stays", "RFC 8489 §6.2.2", "the server leaves closing the connection to the client", stays)
        .on(On::Streams),
    must("stream-long", "RFC 8656 §12.5", "frames of 8 KiB pass", long).on(On::Streams),
];

fn bytewise(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    let request = Craft::request(BINDING).fingerprint();
    for byte in request.bytes() {
        client.send(&[*byte])?;
        std::thread::sleep(Duration::from_millis(1));
    }
    let deadline = std::time::Instant::now() + lab.target.patience;
    match client.answer_to(&request.id(), deadline)? {
        Some(reply) => expect(reply.code() == 0, || format!("{reply}")),
        None => fail("no answer"),
    }
}

fn joined(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let binding = Craft::request(BINDING);
    let all =
        [&channel_data(0x4000, b"abc", true)[..], binding.bytes(), &channel_data(0x4000, b"defgh", true)].concat();
    client.send(&all)?;
    let deadline = std::time::Instant::now() + lab.target.patience;
    expect(client.answer_to(&binding.id(), deadline)?.is_some(), || "the Binding request was lost".into())?;
    let relayed = client.relayed()?;
    peer.must_get(b"abc", relayed, lab.target.patience)?;
    peer.must_get(b"defgh", relayed, lab.target.patience)
}

fn padding_in(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let relayed = client.relayed()?;
    for data in [&b"1"[..], b"22", b"333", b"4444", b"55555"] {
        // Padding of any bytes: what is not part of the data must not matter.
        let mut message = channel_data(0x4000, data, false);
        message.resize(message.len().next_multiple_of(4), 0xEE);
        client.send(&message)?;
        peer.must_get(data, relayed, lab.target.patience)?;
    }
    client.quiet().map(drop)
}

fn padding_out(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let relayed = client.relayed()?;
    for data in [&b"1"[..], b"22", b"333", b"4444", b"55555"] {
        peer.send(relayed, data)?;
        // Without padding the framing of what follows would break.
        client.must_get_on(0x4000, data)?;
    }
    client.quiet().map(drop)
}

fn split(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let relayed = client.relayed()?;
    let message = channel_data(0x4000, b"in pieces", true);
    for at in 1..message.len() {
        client.send(&message[..at])?;
        std::thread::sleep(Duration::from_millis(2));
        client.send(&message[at..])?;
        peer.must_get(b"in pieces", relayed, lab.target.patience)?;
    }
    Ok(())
}

fn stays(lab: &Lab<'_>) -> Step {
    let mut client = lab.stranger()?;
    client.ask(&Craft::request(BINDING))?;
    std::thread::sleep(Duration::from_secs(1));
    expect(!client.closed(), || "closed within a second after the answer".into())
}

fn long(lab: &Lab<'_>) -> Step {
    let (mut client, peer) = (lab.allocation()?, lab.peer()?);
    client.bind(0x4000, &peer)?;
    let data = vec![7; 8192];
    client.send_on(0x4000, &data)?;
    peer.must_get(&data, client.relayed()?, lab.target.patience)?;
    peer.send(client.relayed()?, &data)?;
    client.must_get_on(0x4000, &data)
}
